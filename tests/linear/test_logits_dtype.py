"""Float32 logits of 16-bit operands, and operands of two dtypes: against float64 of the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import (
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    nn,
)
from llmloss_ext.linear import cpu_products

from .problem import D, N, Problem, V, error, linear, reference

WIDE = {"logits_dtype": torch.float32}
HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place, relative."""
OPTIONS = {
    "no option": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "dropped": {"drop_ignored": True},
    "kept": {"drop_ignored": False},
    "one chunk": {"chunk_tokens": N},
    "num_items": {"num_items": 50},
    "no item": {"num_items": 0},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "capped": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 0.8},
    "16-bit sums": {"weight_grad_dtype": torch.bfloat16},
}


@pytest.fixture(params=[False, True], ids=["upcast", "16-bit products"])
def products(request, monkeypatch):
    """As on a CPU with and without products of 16 bits."""
    monkeypatch.setattr(cpu_products, "has_products_of", lambda dtype: request.param)


def wide_problem(device, dtype, features=256, classes=2000, tokens=64):
    hidden = torch.randn(tokens, features, device=device).to(dtype)
    weight = (torch.randn(classes, features, device=device) * 0.3).to(dtype)
    bias = torch.randn(classes, device=device).to(dtype)
    target = torch.randint(0, classes, (tokens,), device=device)
    return hidden, weight, bias, target


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("features", [256, 3000])  # which are upcast by 1024 rows, and by 128
def test_log_probs_are_those_of_the_same_operands(device, dtype, features):
    hidden, weight, bias, target = wide_problem(device, dtype, features)
    logits = hidden.double() @ weight.double().t() + bias.double()
    exact = torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0]
    arguments = (hidden, weight, target)
    ours = linear_log_probs(*arguments, linear_bias=bias, chunk_tokens=20, **WIDE)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-4
    rounded = linear_log_probs(*arguments, linear_bias=bias, chunk_tokens=20)
    assert (rounded - exact).abs().max() > 5e-3  # what it is for


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("option", OPTIONS)
def test_as_the_dense_loss(device, dtype, option, products):
    problem = Problem(device, dtype)
    options = {"chunk_tokens": 8} | OPTIONS[option]
    if dtype == torch.float16:
        options.pop("weight_grad_dtype", None)
    upstream = torch.rand(N, device=device) if option == "none" else None
    loss, grads = problem.run(linear(problem.target, **options, **WIDE), upstream=upstream)
    for name in ("chunk_tokens", "drop_ignored", "weight_grad_dtype"):
        options.pop(name, None)
    exact, expected = problem.run(reference(problem.target, **options), True, upstream)
    assert_close(loss, exact, 1e-5)
    # The gradient of the logits and the result are rounded once each.
    limit = (4 if option == "16-bit sums" else 1) * ROUNDING[dtype]
    for grad, want in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert error(grad, want) <= limit


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_and_their_gradients(device, dtype, products):
    problem = Problem(device, dtype)
    names = ("log_prob", "lse", "entropy", "mean_log_prob", "log_sum_sq_probs")
    factors = torch.randn(len(names), N, device=device, dtype=torch.float64)

    def total(stats):
        return sum((stats[name] * f).sum() for name, f in zip(names, factors, strict=True))

    leaves = problem.leaves()
    got = linear_token_stats(
        leaves[0], leaves[1], problem.target, linear_bias=leaves[2], with_rank=True,
        extra=("log_sum_sq_probs",), chunk_tokens=8, **WIDE,
    )  # fmt: skip
    exact = problem.leaves(True)
    x = F.linear(*exact)
    log_p = torch.log_softmax(x, -1)
    valid = problem.target >= 0
    index = problem.target.clamp_min(0)[:, None]
    wanted = {
        "log_prob": log_p.gather(-1, index)[:, 0],
        "lse": torch.logsumexp(x, -1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_log_prob": log_p.mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
    }
    wanted = {name: torch.where(valid, value, 0) for name, value in wanted.items()}
    for name in names:
        assert_close(getattr(got, name), wanted[name], 1e-5)
    assert torch.equal(got.argmax, torch.where(valid, x.argmax(-1), -1))
    grads = torch.autograd.grad(total(got._asdict()), leaves)
    expected = torch.autograd.grad(total(wanted), exact)
    for grad, want in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert error(grad, want) <= ROUNDING[dtype]


def test_an_accumulator(device, products):
    problem = Problem(device, torch.bfloat16, bias=False)
    (hidden, weight), total = problem.leaves(), torch.ones(V, D, device=device)
    loss = linear_cross_entropy(
        hidden, weight, problem.target, weight_grad_accumulator=total, chunk_tokens=8, **WIDE
    )
    loss.backward()
    assert weight.grad is None
    _, expected = problem.run(reference(problem.target), True)
    assert error(total - 1, expected[1]) <= ROUNDING[torch.bfloat16]
    assert error(hidden.grad, expected[0]) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_probability_targets(device, given):
    """They are converted to the dtype of the logits."""
    problem = Problem(device, torch.bfloat16)
    target = torch.softmax(torch.randn(N, V, device=device), -1).to(given)
    loss, grads = problem.run(linear(target, chunk_tokens=8, **WIDE))
    exact, expected = problem.run(reference(target.double()), True)
    assert_close(loss, exact, 1e-5)
    for grad, want in zip(grads, expected, strict=True):
        assert error(grad, want) <= ROUNDING[torch.bfloat16]
    leaf = target.clone().requires_grad_()
    (of_target,) = torch.autograd.grad(linear(leaf, **WIDE)(*problem.leaves()), leaf)
    double = target.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(double)(*problem.leaves(True)), double)
    assert error(of_target, wanted) <= (1e-5 if given == torch.float32 else 2**-8)


def test_padding_may_hold_anything(device, products):
    problem = Problem(device, torch.bfloat16, bias=False)
    problem.target.clamp_(max=89)
    clean, expected = problem.run(linear(problem.target, vocab_size=90, chunk_tokens=8, **WIDE))
    problem.weight[90:] = float("nan")
    problem.hidden[problem.target < 0] = float("nan")
    loss, grads = problem.run(linear(problem.target, vocab_size=90, chunk_tokens=8, **WIDE))
    assert torch.equal(loss, clean)
    for grad, want in zip(grads, expected, strict=True):
        assert torch.equal(grad, want)
    assert (grads[1][90:] == 0).all()


def test_no_token_takes_part(device):
    problem = Problem(device, torch.bfloat16)
    problem.target[:] = -100
    loss, grads = problem.run(linear(problem.target, num_items=3, **WIDE))
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)
    hidden = torch.empty(0, D, device=device, dtype=torch.bfloat16)
    none = linear_log_probs(hidden, problem.weight, problem.target[:0], **WIDE)
    assert none.shape == (0,)


def test_autocast(device):
    """Its dtype is that of the products; the weight's gradient stays float32."""
    problem = Problem(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, grads = problem.run(linear(problem.target, chunk_tokens=8, **WIDE))
    rounded = Problem(device)
    rounded.hidden, rounded.weight = problem.hidden.bfloat16(), problem.weight.bfloat16()
    rounded.bias = problem.bias
    exact, expected = rounded.run(reference(problem.target), True)
    assert_close(loss, exact, 1e-5)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for grad, want in zip(grads, expected, strict=True):
        assert error(grad, want) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("context", ["autocast", "no autocast"])
def test_more_than_a_first_derivative(device, context):
    problem = Problem(device, torch.bfloat16, bias=False)

    def penalty(leaves, loss):
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    leaves, exact = problem.leaves(), problem.leaves(True)
    wanted = torch.autograd.grad(penalty(exact, reference(problem.target)), exact)
    with torch.autocast(device.type, torch.bfloat16, enabled=context == "autocast"):
        ours = torch.autograd.grad(penalty(leaves, linear(problem.target, **WIDE)), leaves)
        each = torch.func.vmap(
            lambda h, y: linear_log_probs(h, problem.weight, y, **WIDE), in_dims=(0, 0)
        )(problem.hidden[:, None], problem.target[:, None])
    for grad, want in zip(ours, wanted, strict=True):
        assert error(grad, want) <= 8 * ROUNDING[torch.bfloat16]
    rows = linear_log_probs(problem.hidden, problem.weight, problem.target, **WIDE)
    assert_close(each[:, 0], rows, 1e-5)


def test_compiled(device):
    problem = Problem(device, torch.bfloat16)

    def step(hidden, weight, bias, target):
        loss = linear_cross_entropy(hidden, weight, target, linear_bias=bias, **WIDE)
        return loss + linear_log_probs(hidden, weight, target, **WIDE).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = problem.leaves()
    got, wanted = compiled(*leaves, problem.target), step(*leaves, problem.target)
    assert torch.equal(got, wanted)
    for grad, want in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        assert torch.equal(grad, want)


# --------------------------------------------------------------------------------- two dtypes


@pytest.mark.parametrize("of_weight", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operands_of_two_dtypes(device, of_hidden, of_weight, reduction):
    """The products are those of the dtype that holds both, each gradient has its own."""
    problem = Problem(device)
    problem.hidden, problem.weight = problem.hidden.to(of_hidden), problem.weight.to(of_weight)
    options = {"reduction": reduction}
    loss, grads = problem.run(linear(problem.target, chunk_tokens=8, **options, **WIDE))
    exact, expected = problem.run(reference(problem.target, **options), True)
    assert_close(loss, exact, 1e-5)
    assert [grad.dtype for grad in grads] == [of_hidden, of_weight, torch.float32]
    for grad, want in zip(grads, expected, strict=True):
        coarsest = of_hidden if of_hidden == of_weight else grad.dtype
        assert error(grad, want) <= max(ROUNDING.get(coarsest, 0), 1e-5)


def test_float64_operands_may_be_of_two_dtypes(device):
    problem = Problem(device, torch.float64)
    problem.weight = problem.weight.float()
    loss, grads = problem.run(linear(problem.target, logits_dtype=torch.float64))
    exact, expected = problem.run(reference(problem.target), True)
    assert_close(loss, exact, 1e-10)
    for grad, want in zip(grads, expected, strict=True):
        assert error(grad, want) <= (1e-10 if grad.dtype == torch.float64 else 1e-6)


# -------------------------------------------------------------------------------- other callers


def test_a_divergence(device, products):
    student, teacher = (wide_problem(device, torch.bfloat16, 32, 300)[:2] for _ in range(2))
    teacher = (teacher[0].float(), teacher[1])  # of two dtypes, too
    leaves = [t.clone().requires_grad_() for t in student]
    loss = linear_kl_div(*leaves, *teacher, chunk_tokens=10, temperature=2.0, **WIDE)
    exact = [t.double().requires_grad_() for t in student]
    p, q = (torch.log_softmax(h.double() @ w.double().t() / 2, -1) for h, w in (teacher, exact))
    wanted = 4 * (p.exp() * (p - q)).sum(-1).mean()
    assert_close(loss, wanted, 1e-5)
    for grad, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, exact), strict=True
    ):
        assert grad.dtype == torch.bfloat16
        assert error(grad, want) <= ROUNDING[torch.bfloat16]


def test_a_module(device):
    problem = Problem(device, torch.bfloat16, bias=False)
    module = nn.LinearCrossEntropyLoss(D, V, linear_weight=problem.weight, **WIDE)
    expected = linear(problem.target, **WIDE)(problem.hidden, problem.weight)
    assert torch.equal(module(problem.hidden, problem.target), expected)
    assert "logits_dtype=torch.float32" in repr(module)


def test_k_dimensional(device):
    hidden, weight, _, target = wide_problem(device, torch.bfloat16, 16, 50)
    stacked = torch.stack([weight, weight.flip(0)], 1)
    loss = linear_cross_entropy(hidden, stacked, torch.stack([target, target], 1), **WIDE)
    x = torch.einsum("nd,vkd->nvk", hidden.double(), stacked.double())
    assert_close(loss, F.cross_entropy(x, torch.stack([target, target], 1)), 1e-5)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("of_hidden", "of_weight", "asked", "words"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float64, "bfloat16 or torch.float32 for products"),
        (torch.bfloat16, torch.bfloat16, torch.float16, "got torch.float16"),
        (torch.float32, torch.float32, torch.bfloat16, "must be torch.float32 for products"),
        (torch.float64, torch.float64, torch.float32, "must be torch.float64 for products"),
        (torch.bfloat16, torch.float32, torch.bfloat16, "must be torch.float32 for products"),
    ],
)
def test_a_dtype_that_the_products_do_not_have(device, of_hidden, of_weight, asked, words):
    hidden = torch.randn(3, 4, device=device).to(of_hidden)
    weight = torch.randn(5, 4, device=device).to(of_weight)
    target = torch.zeros(3, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(hidden, weight, target, logits_dtype=asked)
    with pytest.raises(ValueError, match=words):
        linear_kl_div(hidden, weight, hidden, weight, logits_dtype=asked)


def test_what_is_no_dtype_and_two_dtypes_unasked(device):
    hidden, weight = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    target = torch.zeros(3, dtype=torch.long, device=device)
    with pytest.raises(TypeError, match="logits_dtype must be a torch.dtype, got 'float32'"):
        linear_log_probs(hidden, weight, target, logits_dtype="float32")
    with pytest.raises(RuntimeError, match="give logits_dtype"):
        linear_log_probs(hidden.bfloat16(), weight, target)


def test_the_same_dtype_changes_nothing(device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        problem = Problem(device, dtype)
        plain, grads = problem.run(linear(problem.target, chunk_tokens=8))
        said, again = problem.run(linear(problem.target, chunk_tokens=8, logits_dtype=dtype))
        assert torch.equal(plain, said)
        assert all(map(torch.equal, grads, again))
