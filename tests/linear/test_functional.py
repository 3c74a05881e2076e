"""The linear losses: as the projection followed by the dense loss, with every option of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
    linear_token_stats,
    token_stats,
)
from llmloss_ext.linear import operators

from .problem import D, N, Problem, V, linear, reference

OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "sum": {"reduction": "sum"},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "class weights and z-loss": {"weighted": True, "z_loss": 1e-2, "label_smoothing": 0.1},
    "focal": {"focal_gamma": 2.0},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 0.7},
    "temperature": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 0.6},
    "vocab_size": {"vocab_size": 90},
    "num_items": {"num_items": 50},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "softcap": 9.0,
        "num_items": 7,
        "focal_gamma": 0.7,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["reduced", "none"])
@pytest.mark.parametrize("drop", [False, True])
def test_as_the_dense_loss(device, dtype, option, reduction, drop):
    problem = Problem(device, dtype)
    options = dict(OPTIONS[option])
    upstream = None
    if options.pop("weighted", False):
        options["weight"] = (torch.rand(V, device=device) * 2).to(dtype)
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

    def loss(inputs, targets, logits, loss, chunks, wanted):
        seen.append(chunks)
        return torch.zeros((), device=device), None

    monkeypatch.setattr(operators, "loss", loss)
    arguments = (problem.hidden, problem.weight, problem.target)
    linear_cross_entropy(*arguments, options=Options())
    assert (seen[0].limit.tokens, seen[0].weight_grad_dtype) == (8, torch.bfloat16)
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
    extra = ("log_sum_sq_probs",)
    names = ("log_prob", "lse", "entropy", "mean_log_prob", *extra)
    upstreams = {name: torch.randn(N, device=device) for name in names}

    def total(stats):
        return sum((getattr(stats, name) * upstreams[name]).sum() for name in names)

    leaves = problem.leaves()
    stats = linear_token_stats(leaves[0], leaves[1], problem.target, linear_bias=leaves[2],
                               with_rank=with_rank, extra=extra, chunk_tokens=8)  # fmt: skip
    grads = torch.autograd.grad(total(stats), leaves)
    exact = problem.leaves(True)
    expected = token_stats(F.linear(*exact), problem.target, with_rank=with_rank, extra=extra)
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


def test_rows_of_any_stride(device):
    whole = torch.randn(2, 9, 2 * D, device=device)
    weight = torch.randn(V, 2 * D, device=device)[:, ::2]
    target = torch.randint(0, V, (2, 7), device=device)
    hidden = whole[:, 1:8, ::2]
    expected = linear_cross_entropy(hidden.contiguous(), weight.contiguous(), target)
    assert_close(linear_cross_entropy(hidden, weight, target), expected, 1e-6)


def test_int32_targets(device):
    problem = Problem(device)
    a, b = (
        linear_cross_entropy(problem.hidden, problem.weight, target)
        for target in (problem.target, problem.target.int())
    )
    assert torch.equal(a, b)
