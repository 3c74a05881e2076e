"""The linear losses: as the projection followed by the dense loss, without its memory."""

from __future__ import annotations

import copy
import datetime
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FLOATS, GRADIENT, VALUE, assert_close
from ranks import leave_group
from torch import Tensor

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
    linear_token_stats,
    token_stats,
)
from llmloss_ext.linear import autograd

N, D, V = 37, 16, 101


class Problem:
    """Hidden states, a projection, targets, in one dtype; and the same in float64."""

    def __init__(self, device, dtype=torch.float32, tokens=N, bias=True) -> None:
        self.hidden = torch.randn(tokens, D, device=device).to(dtype)
        self.weight = (torch.randn(V, D, device=device) * 0.5).to(dtype)
        self.bias = torch.randn(V, device=device).to(dtype) if bias else None
        self.target = torch.randint(0, V, (tokens,), device=device)
        self.target[::5] = -100

    def leaves(self, double: bool = False) -> list[Tensor]:
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return [(t.double() if double else t).clone().requires_grad_() for t in tensors]

    def run(self, loss: Any, double: bool = False, upstream: Tensor | None = None):
        leaves = self.leaves(double)
        value = loss(*leaves)
        if upstream is None:
            upstream = torch.ones_like(value)
        return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def linear(target: Tensor, **options: Any) -> Any:
    def loss(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)

    return loss


def reference(target: Tensor, **options: Any) -> Any:
    def loss(hidden, weight, bias=None):
        return cross_entropy(F.linear(hidden, weight, bias), target, **options)

    return loss


def error(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach().double(), exact.detach()
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-300))


OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "sum": {"reduction": "sum"},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 0.7},
    "vocab_size": {"vocab_size": 90},
    "num_items": {"num_items": 50},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 9.0, "num_items": 7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["reduced", "none"])
@pytest.mark.parametrize("drop", [False, True])
def test_as_the_dense_loss(device, dtype, option, reduction, drop):
    problem = Problem(device, dtype)
    options = dict(OPTIONS[option])
    upstream = None
    if "vocab_size" in options:
        problem.target.clamp_(max=89)
    if reduction == "none":
        options.pop("num_items", None)
        options["reduction"] = "none"
        upstream = torch.randn(N, device=device)
    loss, grads = problem.run(
        linear(problem.target, chunk_tokens=8, drop_ignored=drop, **options), upstream=upstream
    )
    exact, expected = problem.run(reference(problem.target, **options), True, upstream)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_close(loss, exact, tolerance)
    for grad, want in zip(grads, expected, strict=True):
        assert_close(grad, want, tolerance)
        assert grad.dtype == dtype


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


def test_all_tokens_ignored(device):
    problem = Problem(device)
    problem.target[:] = -100
    for drop in (True, False):
        loss, grads = problem.run(linear(problem.target, drop_ignored=drop))
        assert loss.isnan()
        assert all((grad == 0).all() for grad in grads)
        loss, grads = problem.run(linear(problem.target, drop_ignored=drop, num_items=5))
        assert loss == 0


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4)])
def test_shapes(device, shape):
    hidden = torch.randn(*shape, D, device=device)
    weight = torch.randn(V, D, device=device)
    target = torch.randint(0, V, shape, device=device)
    rows = linear_cross_entropy(hidden, weight, target, reduction="none")
    assert rows.shape == shape
    expected = cross_entropy(hidden @ weight.t(), target, reduction="none")
    assert_close(rows, expected, 1e-5)
    assert_close(linear_cross_entropy(hidden, weight, target), expected.mean(), 1e-5)


def test_a_drop_in_for_torchs(device):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    problem = Problem(device)
    for options in ({}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"reduction": "none"},
                    {"weight": torch.rand(V, device=device)}):  # fmt: skip
        target = problem.target.clamp_min(0) if "ignore_index" in options else problem.target
        arguments = (problem.hidden, problem.weight, target)
        kwargs = {"linear_bias": problem.bias, **options}
        expected = F.linear_cross_entropy(*arguments, **kwargs)
        assert_close(linear_cross_entropy(*arguments, **kwargs), expected, 1e-5)


class Options:
    """The fields that are read of torch.nn.LinearCrossEntropyOptions, which torch 2.11 lacks."""

    batch_chunk_size = 8
    acc_dtype = torch.bfloat16


def test_torchs_options(device, monkeypatch):
    problem = Problem(device, torch.bfloat16, bias=False)
    seen = []
    monkeypatch.setattr(
        autograd, "loss", lambda *args: seen.append(args[-1]) or torch.zeros((), device=device)
    )
    arguments = (problem.hidden, problem.weight, problem.target)
    linear_cross_entropy(*arguments, options=Options())
    assert (seen[0].chunk_tokens, seen[0].weight_grad_dtype) == (8, torch.bfloat16)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        linear_cross_entropy(*arguments, options=torch.nn.LinearCrossEntropyOptions())
        linear_cross_entropy(*arguments)
        assert seen[1] == seen[2]
    with pytest.raises(ValueError, match="chunk_tokens=9, but options say 8"):
        linear_cross_entropy(*arguments, options=Options(), chunk_tokens=9)


@pytest.mark.parametrize("positions", [(3,), (2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_k_dimensional_losses(device, positions, reduction, probabilities):
    """As torch defines them: logits (N, V, d1, ...) = hidden @ weight of (V, d1, ..., D)."""
    hidden = torch.randn(N, D, device=device, requires_grad=True)
    weight = torch.randn(V, *positions, D, device=device, requires_grad=True)
    bias = torch.randn(V, *positions, device=device, requires_grad=True)
    if probabilities:
        target = torch.softmax(torch.randn(N, V, *positions, device=device), 1)
    else:
        target = torch.randint(0, V, (N, *positions), device=device)
        target[::3] = -100
    options = {"weight": torch.rand(V, device=device), "label_smoothing": 0.1}
    ours = linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction,
                                **options)  # fmt: skip
    logits = torch.einsum("nd,v...d->nv...", hidden, weight) + bias
    theirs = F.cross_entropy(logits, target, reduction=reduction, **options)
    assert_close(ours, theirs, 1e-5)
    leaves = (hidden, weight, bias)
    upstream = torch.randn_like(theirs)
    for grad, want in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        assert_close(grad, want, 1e-5)
    if hasattr(F, "linear_cross_entropy"):
        torchs = F.linear_cross_entropy(hidden, weight, target, linear_bias=bias,
                                        reduction=reduction, **options)  # fmt: skip
        assert_close(ours, torchs, 1e-5)


def test_probability_targets_of_another_dtype(device):
    problem = Problem(device, torch.bfloat16)
    target = torch.softmax(torch.randn(N, V, device=device), -1)
    ours = linear(target)(problem.hidden, problem.weight)
    assert torch.equal(ours, linear(target.bfloat16())(problem.hidden, problem.weight))


def test_int32_targets_and_an_ignore_index_they_cannot_hold(device):
    problem = Problem(device)
    target = problem.target.clamp_min(0)
    for shift in (0, 1):
        long, short = (
            linear_cross_entropy(problem.hidden, problem.weight, t, ignore_index=2**40, shift=shift)
            for t in (target, target.int())
        )
        assert torch.equal(long, short)
    logits = problem.hidden @ problem.weight.t()
    dense = cross_entropy(logits, target.int(), ignore_index=2**40)
    assert_close(dense, F.cross_entropy(logits, target), 1e-5)


def test_no_ignore_index_is_torchs_default(device):
    problem = Problem(device)
    arguments = (problem.hidden, problem.weight, problem.target)
    assert torch.equal(
        linear_log_probs(*arguments, ignore_index=None), linear_log_probs(*arguments)
    )
    stats = linear_token_stats(*arguments, ignore_index=None)
    assert torch.equal(stats.lse, linear_token_stats(*arguments, ignore_index=-100).lse)


@pytest.mark.parametrize("drop", [False, True])
def test_shift(device, drop):
    hidden = torch.randn(3, 9, D, device=device)
    weight = torch.randn(V, D, device=device)
    labels = torch.randint(0, V, (3, 9), device=device)
    labels[1, 4:] = -100
    loss = linear_cross_entropy(hidden, weight, labels, shift=1, drop_ignored=drop)
    logits = hidden @ weight.t()
    assert_close(loss, cross_entropy(logits[:, :-1], labels[:, 1:]), 1e-5)
    rows = linear_cross_entropy(hidden, weight, labels, shift=2, reduction="none")
    assert rows.shape == (3, 9)
    assert (rows[:, -2:] == 0).all()
    assert linear_cross_entropy(hidden, weight, labels, shift=20, reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learned", [False, True])
def test_shift_moves_token_weights_with_their_labels(device, reduction, learned):
    hidden, weight = torch.randn(2, 6, D, device=device), torch.randn(V, D, device=device)
    labels = torch.randint(0, V, (2, 6), device=device)
    labels[0, 3] = -100
    tokens = torch.rand(2, 6, device=device).requires_grad_(learned)
    ours = linear_cross_entropy(hidden, weight, labels, shift=1, token_weight=tokens,
                                reduction=reduction)  # fmt: skip
    dense = cross_entropy((hidden @ weight.t())[:, :-1], labels[:, 1:], reduction=reduction,
                          token_weight=tokens[:, 1:])  # fmt: skip
    assert_close(ours[:, :-1] if reduction == "none" else ours, dense, 1e-5)
    if learned:
        (grad,), (want,) = (torch.autograd.grad(loss.sum(), tokens) for loss in (ours, dense))
        assert_close(grad, want, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_tensors(reduction):
    """Shapes and dtypes without values, as model builders want them."""
    meta = torch.device("meta")
    hidden, weight = (
        torch.empty(n, D, device=meta, dtype=torch.bfloat16, requires_grad=True) for n in (N, V)
    )
    target = torch.empty(N, device=meta, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert (loss.shape, loss.dtype) == ((N,) if reduction == "none" else (), torch.float32)
    loss.sum().backward()
    assert (weight.grad.shape, weight.grad.dtype) == ((V, D), torch.bfloat16)
    assert linear_token_stats(hidden, weight, target).entropy.is_meta


def test_probability_targets(device):
    problem = Problem(device)
    target = torch.softmax(torch.randn(N, V, device=device), -1)
    weight = torch.rand(V, device=device)
    for options in ({}, {"label_smoothing": 0.2, "weight": weight}, {"reduction": "sum"}):
        loss, grads = problem.run(linear(target, chunk_tokens=8, **options))
        exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        want, expected = problem.run(reference(target.double(), **exact), True)
        assert_close(loss, want, 1e-5)
        for grad, other in zip(grads, expected, strict=True):
            assert_close(grad, other, 1e-5)
    leaf = target.clone().requires_grad_()
    linear_cross_entropy(problem.hidden, problem.weight, leaf).backward()
    assert leaf.grad is not None
    rows = linear_cross_entropy(problem.hidden, problem.weight, target, reduction="none")
    assert rows.shape == (N,)


def test_class_and_token_weights(device):
    problem = Problem(device)
    weight, tokens = torch.rand(V, device=device), torch.rand(N, device=device)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        given = {"weight": weight, "token_weight": tokens}
        loss, grads = problem.run(linear(problem.target, chunk_tokens=8, **given, **options))
        exact = {k: v.double() for k, v in given.items()}
        want, expected = problem.run(reference(problem.target, **exact, **options), True)
        assert_close(loss, want, 1e-5)
        for grad, other in zip(grads, expected, strict=True):
            assert_close(grad, other, 1e-5)
    leaf = tokens.clone().requires_grad_()
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target, token_weight=leaf)
    dense = cross_entropy(problem.hidden @ problem.weight.t(), problem.target, token_weight=leaf)
    assert_close(loss, dense, 1e-5)
    (ours,), (theirs,) = (torch.autograd.grad(x, leaf) for x in (loss, dense))
    assert_close(ours, theirs, 1e-5)


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


def test_a_learnable_scale(device):
    problem = Problem(device)
    for reduction in ("mean", "none"):
        scale = torch.tensor(0.7, device=device, requires_grad=True)
        loss = linear_cross_entropy(
            problem.hidden, problem.weight, problem.target, logit_scale=scale, softcap=5.0,
            reduction=reduction, chunk_tokens=8,
        ).sum()  # fmt: skip
        loss.backward()
        other = torch.tensor(0.7, device=device, requires_grad=True, dtype=torch.float64)
        cross_entropy(
            problem.hidden.double() @ problem.weight.double().t(), problem.target,
            logit_scale=other, softcap=5.0, reduction=reduction,
        ).sum().backward()  # fmt: skip
        assert_close(scale.grad, other.grad, 1e-5)


@pytest.mark.parametrize("with_rank", [False, True])
def test_token_stats(device, with_rank):
    problem = Problem(device)
    names = ("log_prob", "lse", "entropy", "mean_log_prob")
    upstreams = {name: torch.randn(N, device=device) for name in names}

    def total(stats):
        return sum((getattr(stats, name) * upstreams[name]).sum() for name in names)

    leaves = problem.leaves()
    stats = linear_token_stats(leaves[0], leaves[1], problem.target, linear_bias=leaves[2],
                               with_rank=with_rank, chunk_tokens=8)  # fmt: skip
    grads = torch.autograd.grad(total(stats), leaves)
    exact = problem.leaves(True)
    expected = token_stats(F.linear(*exact), problem.target, with_rank=with_rank)
    for ours, theirs in zip(stats, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, 1e-5)
    for grad, want in zip(grads, torch.autograd.grad(total(expected), exact), strict=True):
        assert_close(grad, want, 1e-5)


def test_log_probs(device):
    problem = Problem(device)
    log_probs = linear_log_probs(problem.hidden, problem.weight, problem.target)
    expected = token_stats(problem.hidden @ problem.weight.t(), problem.target).log_prob
    assert_close(log_probs, expected, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward(device, reduction):
    problem = Problem(device)
    leaves = problem.leaves()
    loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2],
                                reduction=reduction).sum()  # fmt: skip
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(3 * loss, leaves)
    for one, kept_one, other in zip(first, kept, second, strict=True):
        assert torch.equal(one, kept_one)  # the second has not touched what was handed out
        assert_close(other, 3 * one, 1e-5)


def test_accumulated_gradients(device):
    problem = Problem(device)
    leaves = problem.leaves()
    for _ in range(2):
        linear(problem.target)(*leaves).backward()
    _, expected = problem.run(reference(problem.target), True)
    for leaf, want in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, 2 * want, 1e-5)


def test_upstream_gradients_of_stride_0(device):
    problem = Problem(device)
    rows = linear(problem.target, reduction="none")
    _, expected = problem.run(rows, upstream=torch.full((N,), 2.0, device=device))
    _, grads = problem.run(rows, upstream=torch.tensor(2.0, device=device).expand(N))
    for grad, want in zip(grads, expected, strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_order_gradients(device, reduction):
    problem = Problem(device, torch.float64)

    def gradient_norm(loss):
        leaves = problem.leaves()
        value = loss(*leaves).square().sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    ours = gradient_norm(linear(problem.target, reduction=reduction, label_smoothing=0.1))
    dense = gradient_norm(reference(problem.target, reduction=reduction, label_smoothing=0.1))
    for a, b in zip(ours, dense, strict=True):
        assert_close(a, b, 1e-9)


def test_function_transforms(device):
    problem = Problem(device)
    for reduction in ("mean", "sum"):
        loss = linear(problem.target, reduction=reduction)
        plain = problem.leaves()
        grads = torch.func.grad(loss, argnums=(0, 1, 2))(*(p.detach() for p in plain))
        for grad, want in zip(grads, torch.autograd.grad(loss(*plain), plain), strict=True):
            assert_close(grad, want, 1e-5)
    hidden = torch.randn(4, N, D, device=device)
    targets = torch.randint(0, V, (4, N), device=device)

    def one(h, y):
        return linear_cross_entropy(h, problem.weight, y)

    batched = torch.func.vmap(one)(hidden, targets)
    assert_close(batched, torch.stack([one(*a) for a in zip(hidden, targets, strict=True)]), 1e-5)
    per_sample = torch.func.vmap(torch.func.grad(one))(hidden, targets)
    assert_close(per_sample[2], torch.func.grad(one)(hidden[2], targets[2]), 1e-5)
    tangent = torch.randn(N, D, device=device)
    _, slope = torch.func.jvp(lambda h: one(h, targets[0]), (hidden[0],), (tangent,))
    assert_close(slope, (torch.func.grad(one)(hidden[0], targets[0]) * tangent).sum(), 1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device, reduction, dynamic):
    problem = Problem(device)
    loss = linear(problem.target, reduction=reduction, z_loss=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    upstream = torch.tensor(2.0) if reduction == "mean" else torch.randn(N)
    value, grads = problem.run(compiled, upstream=upstream.to(device))
    expected, expected_grads = problem.run(loss, upstream=upstream.to(device))
    assert_close(value, expected, 1e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want, 1e-6)


def test_compiled_without_gradients(device):
    problem = Problem(device)
    loss = linear(problem.target)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    leaves = problem.leaves()
    with torch.no_grad():
        value = compiled(*leaves)
        assert not value.requires_grad
        assert_close(value, loss(*leaves), 1e-6)
    compiled(*leaves).backward()  # the graph without gradients is not taken for one with
    _, expected = problem.run(loss)
    assert_close(leaves[1].grad, expected[1], 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device, reduction):
    problem = Problem(device, tokens=400)
    leaves = problem.leaves()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2],
                                    reduction=reduction, chunk_tokens=64).sum()  # fmt: skip
        theirs = problem.leaves()
        their_loss = F.cross_entropy(F.linear(*theirs), problem.target, reduction=reduction).sum()
    loss.backward()
    their_loss.backward()
    exact_loss, exact = problem.run(
        lambda *p: reference(problem.target, reduction=reduction)(*p).sum(), True
    )
    assert error(loss, exact_loss) <= error(their_loss, exact_loss) + 1e-3
    for ours, their, want in zip(leaves, theirs, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert error(ours.grad, want) <= 1.2 * error(their.grad, want)


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


def test_rows_of_any_stride(device):
    whole = torch.randn(2, 9, 2 * D, device=device)
    weight = torch.randn(V, 2 * D, device=device)[:, ::2]
    target = torch.randint(0, V, (2, 7), device=device)
    hidden = whole[:, 1:8, ::2]
    expected = linear_cross_entropy(hidden.contiguous(), weight.contiguous(), target)
    assert_close(linear_cross_entropy(hidden, weight, target), expected, 1e-6)


def test_the_same_bits_again(device):
    problem = Problem(device)
    one, two = (problem.run(linear(problem.target, chunk_tokens=8)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def test_int32_targets(device):
    problem = Problem(device)
    a, b = (
        linear_cross_entropy(problem.hidden, problem.weight, target)
        for target in (problem.target, problem.target.int())
    )
    assert torch.equal(a, b)


def test_nothing_is_kept_without_gradients(device):
    problem = Problem(device)
    with torch.no_grad():
        loss = linear_cross_entropy(*problem.leaves()[:2], problem.target)
    assert not loss.requires_grad


def test_module_with_tied_embeddings(device):
    from llmloss_ext.nn import LinearCrossEntropyLoss

    embedding = torch.nn.Embedding(V, D, device=device)
    loss = LinearCrossEntropyLoss(D, V, linear_weight=embedding.weight, label_smoothing=0.1)
    assert loss.linear_weight is embedding.weight
    hidden = torch.randn(N, D, device=device)
    target = torch.randint(0, V, (N,), device=device)
    value = loss(hidden, target)
    value.backward()
    expected = cross_entropy(hidden @ embedding.weight.t(), target, label_smoothing=0.1)
    assert_close(value, expected, 1e-5)
    assert embedding.weight.grad is not None
    own = LinearCrossEntropyLoss(D, V, bias=True, device=device)
    assert {name for name, _ in own.named_parameters()} == {"linear_weight", "linear_bias"}
    again = copy.deepcopy(own)
    again.load_state_dict(own.state_dict())
    assert torch.equal(own(hidden, target), again(hidden, target))
    assert "features=16" in repr(own)


def test_module_with_a_borrowed_head_and_an_accumulator(device):
    from llmloss_ext.nn import LinearCrossEntropyLoss

    head = torch.nn.Linear(D, V, device=device)
    loss = LinearCrossEntropyLoss(D, V, linear_weight=head.weight, linear_bias=head.bias)
    assert loss.linear_bias is head.bias
    hidden, target = torch.randn(N, D, device=device), torch.randint(0, V, (N,), device=device)
    main_grad = torch.zeros_like(head.weight)
    value = loss(hidden, target, weight_grad_accumulator=main_grad)
    value.backward()
    assert head.weight.grad is None
    expected = F.cross_entropy(head(hidden), target)
    assert_close(value, expected, 1e-5)
    want = torch.autograd.grad(expected, (head.weight, head.bias))
    assert_close(main_grad, want[0], 1e-5)
    assert_close(head.bias.grad, want[1], 1e-5)


def test_tensors_of_modules_that_are_no_parameters_are_buffers():
    """So they move with the module; those it borrowed stay out of its state dict."""
    from llmloss_ext import nn

    scale = torch.tensor(0.5)
    linear_loss = nn.LinearCrossEntropyLoss(
        D, V, linear_weight=torch.randn(V, D), linear_bias=torch.randn(V), logit_scale=scale
    )
    for module in (linear_loss, nn.CrossEntropyLoss(logit_scale=scale)):
        assert set(module.state_dict()) == {"logit_scale"}
        assert module.to(torch.float64).logit_scale.dtype == torch.float64
        assert not list(module.parameters())
    assert linear_loss.linear_weight.dtype == torch.float64
    learned = torch.nn.Parameter(scale)
    for module in (nn.LinearCrossEntropyLoss(D, V, logit_scale=learned),
                   nn.CrossEntropyLoss(logit_scale=learned)):  # fmt: skip
        assert module.logit_scale is learned


def test_attributes_of_the_module():
    from llmloss_ext.nn import LinearCrossEntropyLoss

    loss = LinearCrossEntropyLoss(D, V, reduction="sum", ignore_index=3, label_smoothing=0.1)
    assert (loss.reduction, loss.ignore_index, loss.label_smoothing) == ("sum", 3, 0.1)
    hidden, target = torch.randn(N, D), torch.arange(N)
    loss.reduction = "none"
    assert loss(hidden, target).shape == (N,)
    assert "reduction=none, ignore_index=3, label_smoothing=0.1" in repr(loss)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between"),
     ({"z_loss": -1.0}, ValueError, "z_loss must be"),
     ({"reduction": "avg"}, ValueError, "not a valid value for reduction"),
     ({"weight": torch.ones(V + 1)}, ValueError, "weight must be"),
     ({"linear_bias": torch.ones(V + 1)}, ValueError, "linear_bias must be"),
     ({"linear_weight": torch.ones(V, D + 1)}, ValueError, "linear_weight must be"),
     ({"linear_bias": torch.ones(V), "bias": True}, ValueError, "linear_bias is one already"),
     ({"smoothing": 0.1}, TypeError, "has no option smoothing")],
)  # fmt: skip
def test_the_modules_constructor_refuses(options, kind, words):
    from llmloss_ext.nn import CrossEntropyLoss, LinearCrossEntropyLoss

    with pytest.raises(kind, match=words):
        LinearCrossEntropyLoss(D, V, **options)
    if options.keys() & {"label_smoothing", "z_loss", "reduction"}:
        with pytest.raises(kind, match=words):
            CrossEntropyLoss(**options)


def test_data_parallel(tmp_path):
    """The gradients pass through DistributedDataParallel's hooks, whichever backward it is."""
    from llmloss_ext.nn import LinearCrossEntropyLoss

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(D, D)
            self.loss = LinearCrossEntropyLoss(D, V, bias=True)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.loss(self.body(x), target)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = Model()
        parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        problem = Problem("cpu")
        for one in (model, parallel):
            one(problem.hidden, problem.target).backward()
        for (name, p), q in zip(model.named_parameters(), parallel.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
    finally:
        leave_group()


def rank_of_two(rank: int, folder: str) -> None:
    """One of two data-parallel ranks: their tokens differ, and one has none for the last loss."""
    from llmloss_ext.nn import LinearCrossEntropyLoss

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    torch.manual_seed(0)
    results = []
    for reduction, with_items in (("mean", False), ("none", False), ("mean", True)):
        model = LinearCrossEntropyLoss(D, V, bias=True, reduction=reduction)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        hidden, target = torch.randn(2, N, D), torch.randint(0, V, (2, N))
        target[1, : N if with_items else 9] = -100
        items = 20 if with_items else None
        parallel(hidden[rank], target[rank], num_items=items).sum().backward()
        alone = copy.deepcopy(model)
        alone.zero_grad()
        for x, y in zip(hidden, target, strict=True):
            (alone(x, y, num_items=items).sum() / 2).backward()
        results.append([(p.grad, q.grad) for p, q in
                        zip(model.parameters(), alone.parameters(), strict=True)])  # fmt: skip
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no rank leaves before the other is done
    leave_group()


@pytest.mark.slow
def test_data_parallel_with_two_ranks(tmp_path):
    """Each gets the mean of both gradients; a rank without tokens keeps nobody waiting."""
    context = torch.multiprocessing.start_processes(
        rank_of_two, args=(str(tmp_path),), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for one, two in zip(*ranks, strict=True):
        for (grad, expected), (other, _) in zip(one, two, strict=True):
            assert torch.equal(grad, other)
            assert_close(grad, expected, 1e-6)
            assert grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    """The operators that tracers see: their fake kernels give what they return."""
    problem = Problem("cpu", dtype)
    scale = torch.tensor(0.7)
    where = (problem.hidden, problem.weight, problem.target, problem.bias)
    logits = (1.0, 5.0, -100, V)
    needs, tests = [True] * 4, ("test_schema", "test_faketensor")
    ops = torch.ops.llmloss
    torch.library.opcheck(
        ops.linear_loss.default,
        (*where, None, None, None, scale, *logits, 0.1, 1e-3, 1, 8, True, needs, torch.float32),
        test_utils=tests,
    )
    stats = (*where, None, scale, *logits, [True] * 3, 8, True)
    torch.library.opcheck(ops.linear_stats.default, stats, test_utils=tests)
    *_, entropy, _, _, _, states = ops.linear_stats(*stats)
    upstream = torch.ones(N, dtype=entropy.dtype)
    torch.library.opcheck(
        ops.linear_stats_backward.default,
        (upstream, None, upstream, None, *where, None, scale, *logits, entropy, states, 8, True,
         needs, torch.float32),
        test_utils=tests,
    )  # fmt: skip


ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("features", {"linear_weight": torch.randn(V, D + 1)}, ValueError, "a weight (V, D), got"),
    ("rank", {"linear_weight": torch.randn(V)}, ValueError, "a weight (V, D), got"),
    ("dimensions", {"linear_weight": torch.randn(V, 2, D)}, ValueError,
     f"target must have shape ({N}, 2), got"),
    ("dimensions' shift", {"linear_weight": torch.randn(V, 2, D), "shift": 1}, ValueError,
     "shift and weight_grad_accumulator need a weight (V, D)"),
    ("empty", {"linear_weight": torch.randn(0, D)}, ValueError, "the weight is empty"),
    ("bias", {"linear_bias": torch.randn(V + 1)}, ValueError, "the bias must have shape"),
    ("target", {"target": torch.zeros(N + 1).long()}, ValueError, "does not fit hidden states"),
    ("class", {"target": torch.full((N,), V)}, IndexError, "out of bounds"),
    ("dtype", {"linear_weight": torch.randn(V, D).bfloat16()}, RuntimeError, "the same dtype"),
    ("integer input", {"input": torch.ones(N, D).long()}, RuntimeError, "expected hidden states"),
    ("chunk", {"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
    ("budget", {"max_chunk_bytes": 100}, ValueError, "at least 512, the logits of one token"),
    ("shift", {"shift": -1}, ValueError, "shift must be an integer >= 0"),
    ("reduction", {"reduction": "avg"}, ValueError, "not a valid value for reduction"),
    ("smoothing", {"label_smoothing": 1.5}, ValueError, "label_smoothing must be between"),
    ("softcap", {"softcap": -1.0}, ValueError, "softcap must be"),
    ("vocab_size", {"vocab_size": V + 1}, ValueError, "vocab_size must be in"),
    ("items", {"num_items": 0}, ValueError, "num_items must be > 0"),
    ("weight", {"weight": torch.ones(V - 1)}, RuntimeError, "weight tensor should be defined"),
    ("tokens", {"token_weight": torch.ones(N + 1)}, ValueError, "one number per token"),
    ("accumulator", {"weight_grad_accumulator": torch.zeros(V, 3)}, ValueError, "the weight's"),
    ("accumulator dtype",
     {"weight_grad_accumulator": torch.zeros(V, D).half(), "weight_grad_dtype": torch.float32},
     ValueError, "weight_grad_accumulator must be of torch.float32, got torch.float16"),
    ("accumulator strides", {"weight_grad_accumulator": torch.zeros(D, V).t()}, ValueError,
     f"weight_grad_accumulator must be contiguous, got strides (1, {V})"),
    ("complex bias", {"linear_bias": torch.zeros(V).cfloat()}, RuntimeError,
     "linear_bias must be float32, bfloat16, float16 or float64, got torch.complex64"),
    ("integer bias", {"linear_bias": torch.zeros(V).int()}, RuntimeError, "linear_bias must be"),
    ("half a chunk", {"chunk_tokens": 2.5}, TypeError, "chunk_tokens must be an integer, got 2.5"),
    ("half a byte", {"max_chunk_bytes": 1e6}, TypeError, "max_chunk_bytes must be an integer"),
    ("half an index", {"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    ("half a shift", {"shift": 0.5}, TypeError, "shift must be an integer, got 0.5"),
    ("half a class", {"vocab_size": 9.5}, TypeError, "vocab_size must be an integer, got 9.5"),
    ("bytes as targets", {"target": torch.zeros(N).byte(), "shift": 1}, RuntimeError,
     "expected class indices of int64 or int32, got torch.uint8"),
    ("probabilities ignored", {"target": torch.rand(N, V), "ignore_index": 3}, RuntimeError,
     "ignore_index is not supported for floating point target"),
    ("options", {"options": {"batch_chunk_size": 3}}, TypeError,
     "options must be a torch.nn.LinearCrossEntropyOptions, got dict"),
    ("gradient dtype", {"weight_grad_dtype": torch.int8}, ValueError, "weight_grad_dtype must be"),
    ("device", {"target": torch.zeros(N, device="meta").long()}, RuntimeError, "same device"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "kind", "words"), ERRORS)
def test_bad_input(name, changes, kind, words):
    arguments = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(V, D),
        "target": torch.zeros(N).long(),
        **changes,
    }
    with pytest.raises(kind) as caught:
        linear_cross_entropy(**arguments)
    assert words in str(caught.value)


def test_token_stats_want_class_indices():
    with pytest.raises(RuntimeError, match="must hold class indices"):
        linear_token_stats(torch.randn(3, D), torch.randn(V, D), torch.rand(3, V))


@pytest.mark.parametrize("bad", [V, -1, 2**31 - 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_out_of_range(bad, reduction, weighted):
    """[apex, quack, flash-attention]: its value and position are named, with class weights too."""
    target = torch.zeros(N).long()
    target[5] = bad
    weight = torch.ones(V) if weighted else None
    hidden, projection = torch.randn(N, D), torch.randn(V, D, requires_grad=True)
    with pytest.raises(IndexError, match=f"Target {bad} at position 5 is out of bounds"):
        linear_cross_entropy(hidden, projection, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("options", [{}, {"drop_ignored": False}, {"shift": 1}])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_token_stats, linear_log_probs])
def test_a_target_out_of_range_is_found_beyond_its_chunk(function, options):
    target = torch.zeros(4, 5).long()
    target[0, :3], target[2, 3] = -100, V + 7
    if "shift" in options:
        target[1, 0] = -5  # no token predicts it
    with pytest.raises(IndexError, match=rf"Target {V + 7} at position \(2, 3\) is out of bounds"):
        function(torch.randn(4, 5, D), torch.randn(V, D), target, chunk_tokens=4, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_target_out_of_range_on_cuda(reduction):
    """No device assert, which would end the process: nan instead."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    target = torch.full((N,), V, device="cuda")
    weight = torch.ones(V, device="cuda")
    hidden, projection = torch.randn(N, D, device="cuda"), torch.randn(V, D, device="cuda")
    loss = linear_cross_entropy(hidden, projection, target, weight=weight, reduction=reduction)
    assert loss.isnan().all()
