"""The walk over chunks: its products, its sums, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, GRADIENT, VALUE, assert_close

from llmloss_ext import linear_cross_entropy
from llmloss_ext.linear import projection

from .problem import D, N, Problem, V, error, linear, reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_error_above_eager_torchs(device, dtype, reduction):
    problem = Problem(device, dtype, tokens=300, bias=False)
    upstream = torch.full((300,), 1 / 240, device=device) if reduction == "none" else None

    def eager(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight), problem.target, reduction=reduction)

    loss, grads = problem.run(
        linear(problem.target, reduction=reduction, chunk_tokens=64), upstream=upstream
    )
    theirs, their_grads = problem.run(eager, upstream=upstream)
    exact, exact_grads = problem.run(eager, True, upstream)
    assert error(loss, exact) <= 1.05 * error(theirs, exact) + VALUE[dtype]
    for ours, their, want in zip(grads, their_grads, exact_grads, strict=True):
        assert error(ours, want) <= 1.2 * error(their, want) + 1e-12


def test_the_weights_gradient_is_not_accumulated_in_16_bits(device):
    """Many chunks whose gradients point one way: 16-bit sums stand still after a few hundred."""
    tokens = 2048
    hidden = torch.ones(tokens, D, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(V, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.long, device=device)
    linear_cross_entropy(hidden, weight, target, chunk_tokens=4, reduction="sum").backward()
    expected = torch.full((V, D), tokens / V, device=device)
    expected[0] -= tokens
    assert_close(weight.grad / tokens, expected / tokens, 4e-3)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, N])
def test_any_number_of_tokens_and_chunks(device, tokens):
    problem = Problem(device, tokens=tokens)
    for chunk in (1, 8, 1000):
        options = {"num_items": 3.0}
        loss, grads = problem.run(linear(problem.target, chunk_tokens=chunk, **options))
        exact, expected = problem.run(reference(problem.target, **options), True)
        assert_close(loss, exact, 1e-5)
        for grad, want in zip(grads, expected, strict=True):
            assert_close(grad, want, 1e-5)


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1, 2}])
def test_what_is_frozen_gets_no_gradient(device, frozen):
    problem = Problem(device)
    for reduction in ("mean", "none"):
        leaves = problem.leaves()
        for i in frozen:
            leaves[i].requires_grad_(False)
        hidden, weight, bias = leaves
        loss = linear_cross_entropy(
            hidden, weight, problem.target, linear_bias=bias, reduction=reduction
        ).sum()
        if len(frozen) == 3:
            assert not loss.requires_grad
            continue
        loss.backward()
        exact = reference(problem.target, reduction=reduction)
        _, expected = problem.run(lambda *leaves, exact=exact: exact(*leaves).sum(), True)
        for i, leaf in enumerate(leaves):
            if i in frozen:
                assert leaf.grad is None
            else:
                assert_close(leaf.grad, expected[i], 1e-5)


@pytest.mark.parametrize(
    ("frozen", "reduction", "mode", "products"),
    [(set(), "mean", torch.enable_grad, 3), ({0}, "mean", torch.enable_grad, 2),
     ({1}, "sum", torch.enable_grad, 2), ({0, 1}, "mean", torch.enable_grad, 1),
     (set(), "none", torch.enable_grad, 4), ({1}, "none", torch.enable_grad, 3),
     (set(), "mean", torch.no_grad, 1), (set(), "sum", torch.inference_mode, 1),
     (set(), "none", torch.no_grad, 1)],
)  # fmt: skip
def test_no_product_more_than_needed(monkeypatch, frozen, reduction, mode, products):
    problem = Problem("cpu", bias=False)
    leaves = problem.leaves()
    for i in frozen:
        leaves[i].requires_grad_(False)
    count = 0
    right = torch.mm

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return right(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    with mode():
        loss = linear_cross_entropy(*leaves, problem.target, reduction=reduction).sum()
    if loss.requires_grad:
        loss.backward()
    assert count == products


def test_float16_keeps_small_gradients(device):
    """1 / N is subnormal in float16; the loss scale comes after the matrix products."""
    tokens, scale = 65536, 4096.0
    hidden = torch.randn(tokens, 4, device=device).half().requires_grad_()
    weight = torch.randn(9, 4, device=device).half().requires_grad_()
    target = torch.randint(0, 9, (tokens,), device=device)
    (linear_cross_entropy(hidden, weight, target) * scale).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (F.cross_entropy(F.linear(*exact), target) * scale).backward()
    for ours, want in zip((hidden, weight), exact, strict=True):
        assert error(ours.grad, want.grad) < 2e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulate_in", [None, torch.float16])
def test_float16_sums_over_tokens_do_not_overflow(device, compiled, accumulate_in):
    """The denominator goes in before float16 has to hold them, not after."""
    tokens = 8192
    leaves = [
        torch.full((tokens, 4), 16.0, device=device).half(),
        torch.zeros(9, 4, device=device).half(),
        torch.zeros(9, device=device).half(),
    ]
    target = torch.zeros(tokens, dtype=torch.long, device=device)
    loss, gradients = linear(target, weight_grad_dtype=accumulate_in), []
    for dtype in (torch.float16, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in leaves]
        if dtype == torch.float64:
            loss = linear(target)
        run = torch.compile(loss, fullgraph=True) if compiled and dtype == torch.float16 else loss
        gradients.append(torch.autograd.grad(8.0 * run(*inputs), inputs))
    for ours, want in zip(*gradients, strict=True):
        assert_close(ours, want, 2e-3)
        assert ours.dtype == torch.float16


@pytest.mark.parametrize("rows", [1, 63, 64, 127, 128, 200, V, 8300])
def test_a_rounded_weight_gradient_keeps_no_other_memory(device, rows):
    """Whatever the parts in which it is summed: equal to sums that are rounded elsewhere."""
    hidden = torch.randn(N, D, device=device).bfloat16()
    weight = torch.randn(rows, D, device=device).bfloat16().requires_grad_()
    target = torch.randint(0, rows, (N,), device=device)
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, chunk_tokens=8)
        (grad,) = torch.autograd.grad(loss.sum(), weight)
        total = torch.zeros(rows, D, device=device)
        linear_cross_entropy(hidden, weight, target, reduction=reduction, chunk_tokens=8,
                             weight_grad_accumulator=total).sum().backward()  # fmt: skip
        assert_close(grad, total, 4e-3)
        assert grad.is_contiguous()
        assert grad.untyped_storage().nbytes() <= 2 * D * (rows + 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accumulator_takes_the_weights_gradient(device, dtype):
    problem = Problem(device, dtype)
    _, expected = problem.run(reference(problem.target), True)
    for reduction in ("mean", "sum"):
        leaves = problem.leaves()
        total = torch.full((V, D), 2.0, device=device)
        loss = linear_cross_entropy(
            leaves[0], leaves[1], problem.target, linear_bias=leaves[2], reduction=reduction,
            weight_grad_accumulator=total, chunk_tokens=8,
        )  # fmt: skip
        factor = 1.0 if reduction == "mean" else 1 / int((problem.target != -100).sum())
        (loss * factor).backward()
        assert leaves[1].grad is None
        assert_close(total - 2, expected[1], 1e-5 if dtype == torch.float32 else 2e-2)
        assert_close(leaves[0].grad, expected[0], 1e-5 if dtype == torch.float32 else 2e-2)


def test_weight_grad_dtype(device):
    problem = Problem(device, torch.bfloat16, bias=False)
    _, expected = problem.run(reference(problem.target), True)
    _, grads = problem.run(linear(problem.target, weight_grad_dtype=torch.bfloat16))
    assert_close(grads[1], expected[1], GRADIENT[torch.bfloat16] * 4)


def test_the_same_bits_again(device):
    problem = Problem(device)
    one, two = (problem.run(linear(problem.target, chunk_tokens=8)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def test_nothing_is_kept_without_gradients(device):
    problem = Problem(device)
    with torch.no_grad():
        loss = linear_cross_entropy(*problem.leaves()[:2], problem.target)
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_chunk_equals_several(device, dtype, reduction):
    """Whose weight's gradient is one product, and not a sum that is rounded."""
    problem = Problem(device, dtype)
    upstream = torch.randn(N, device=device) if reduction == "none" else None
    runs = [
        problem.run(linear(problem.target, reduction=reduction, chunk_tokens=n), upstream=upstream)
        for n in (N, 8)
    ]
    (loss, grads), (other, other_grads) = runs
    assert_close(loss, other, VALUE[dtype])
    for one, several in zip(grads, other_grads, strict=True):
        assert one.dtype == several.dtype == dtype
        assert_close(one, several, 2 * GRADIENT[dtype])  # both are rounded


class OnCuda(torch.Tensor):
    """What takes the way of CUDA."""

    is_cuda = True


@pytest.fixture
def cudas_products(monkeypatch):
    """Stands in for CUDA's: memory holds nan at first; the products made and their dtypes."""
    made = []

    def product(name, total, left, right, out_dtype, out):
        made.append((name, out.dtype))
        assert (out_dtype or left.dtype) == out.dtype
        exact = left.float() @ right.float()
        out.copy_(exact if total is None else total + exact)

    def buffer(like, shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype).as_subclass(OnCuda)

    monkeypatch.setattr(projection, "new_buffer", buffer)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, *, out_dtype=None, out: product("mm", None, a, b, out_dtype, out)
    )
    monkeypatch.setattr(
        torch, "addmm",
        lambda total, a, b, *, out_dtype=None, out: product("addmm", total, a, b, out_dtype, out),
    )  # fmt: skip
    return made


@pytest.mark.parametrize("result_dtype", [torch.bfloat16, torch.float32])
def test_cudas_first_chunk_is_written_and_an_only_one_is_the_gradient(cudas_products, result_dtype):
    hidden, gradient = torch.randn(N, D).bfloat16(), torch.randn(N, V).bfloat16()
    exact = gradient.float().t() @ hidden.float()
    found = {}
    for name, chunks in (("only", [slice(0, N)]), ("two", [slice(0, 20), slice(20, N)])):
        cudas_products.clear()
        sums = projection.WeightGradient(hidden, (V, D), torch.float32, result_dtype)
        for rows in chunks:
            sums.add(gradient[rows], hidden[rows], is_only=len(chunks) == 1)
        result = sums.result().as_subclass(torch.Tensor)
        assert result.dtype == result_dtype
        assert torch.allclose(result.float(), exact, rtol=1e-2, atol=1e-2)
        found[name] = list(cudas_products)
    parts = 2 if result_dtype == torch.bfloat16 else 1
    assert found["only"] == [("mm", result_dtype)]
    assert found["two"] == [("mm", torch.float32)] * parts + [("addmm", torch.float32)] * parts


def test_a_callers_accumulator_is_added_to_by_an_only_chunk(cudas_products):
    hidden, gradient = torch.randn(N, D).bfloat16(), torch.randn(N, V).bfloat16()
    mine = torch.ones(V, D).as_subclass(OnCuda)
    sums = projection.WeightGradient(hidden, (V, D), torch.float32, torch.bfloat16, mine)
    sums.add(gradient, hidden, is_only=True)
    assert cudas_products == [("addmm", torch.float32)]
    exact = 1 + gradient.float().t() @ hidden.float()
    assert torch.allclose(mine.as_subclass(torch.Tensor), exact, rtol=1e-3, atol=1e-3)
