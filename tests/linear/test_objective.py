"""A loss and its statistics in one walk: `return_stats`, and objectives in general."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

import llmloss_ext
from linear.problem import N, Problem, V, error
from linear.test_functional import OPTIONS
from llmloss_ext import cross_entropy, linear_cross_entropy, linear_token_stats, token_stats

FIELDS = llmloss_ext.TokenStats._fields


def functions(p, dense):
    """The loss and the statistics of (hidden, weight, bias), from logits or from hidden states."""
    if dense:
        logits = torch.nn.functional.linear
        return (
            lambda h, w, b=None, **o: cross_entropy(logits(h, w, b), p.target, **o),
            lambda h, w, b=None, **o: token_stats(logits(h, w, b), p.target, **o),
        )
    return (
        lambda h, w, b=None, **o: linear_cross_entropy(h, w, p.target, linear_bias=b, **o),
        lambda h, w, b=None, **o: linear_token_stats(h, w, p.target, linear_bias=b, **o),
    )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 7])
def test_the_loss_is_the_same_and_the_statistics_are_those_of_token_stats(
    device, dense, dtype, chunk
):
    p = Problem(device, dtype)
    loss, stats = functions(p, dense)
    how = {} if dense else {"chunk_tokens": chunk}
    found = {}

    def with_stats(*leaves):
        value, found["stats"] = loss(*leaves, return_stats=True, z_loss=1e-3, **how)
        return value

    value, gradients = p.run(with_stats)
    plain, wanted = p.run(lambda *leaves: loss(*leaves, z_loss=1e-3, **how))
    assert_close(value, plain, 1e-6)
    _, exact = p.run(lambda *x: functions(p, True)[0](*x, z_loss=1e-3), double=True)
    for one, other, right in zip(gradients, wanted, exact, strict=True):
        assert one.dtype == other.dtype
        assert error(one, right) <= 1.05 * error(other, right) + 1e-6
    every = stats(*p.leaves(), with_rank=True, **how)
    for name in ("log_prob", "lse", "entropy", "argmax", "rank"):
        assert torch.equal(getattr(found["stats"], name), getattr(every, name)), name
        assert not getattr(found["stats"], name).requires_grad
    assert found["stats"].mean_log_prob is None
    assert found["stats"].log_sum_sq_probs is None


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_with_every_option(device, dense, option, reduction):
    p, options = Problem(device, torch.float64), dict(OPTIONS[option])
    if reduction != "mean":
        options.pop("num_items", None)
    if options.pop("weighted", False):
        options["weight"] = torch.rand(V, dtype=torch.float64, device=device)
    p.target[p.target >= options.get("vocab_size", V)] = -100
    loss, token_stats_of = functions(p, dense)
    read = {n: options[n] for n in ("softcap", "logit_scale", "vocab_size") if n in options}

    def with_stats(*leaves):
        value, stats = loss(*leaves, reduction=reduction, return_stats=("rank",), **options)
        every = token_stats_of(*leaves, with_rank=True, **read)
        assert torch.equal(stats.rank, every.rank)
        assert {n for n in FIELDS if getattr(stats, n) is not None} == {"rank"}
        return value

    upstream = torch.rand(N, dtype=torch.float64) if reduction == "none" else None
    value, gradients = p.run(with_stats, upstream=upstream)
    plain, wanted = p.run(
        lambda *leaves: loss(*leaves, reduction=reduction, **options), upstream=upstream
    )
    assert_close(value, plain, 1e-12)
    for one, other in zip(gradients, wanted, strict=True):
        assert_close(one, other, 1e-9)


def test_what_trainers_log(device):
    """Correct tokens, the mean entropy, and the cross entropy beside its z-loss."""
    p = Problem(device, torch.float64)
    loss, stats = linear_cross_entropy(
        p.hidden, p.weight, p.target, linear_bias=p.bias, z_loss=0.1, return_stats=True
    )
    logits = torch.nn.functional.linear(p.hidden, p.weight, p.bias)[p.target != -100]
    labels = p.target[p.target != -100]
    log_p = logits.log_softmax(-1)
    items = len(labels)
    assert int((stats.rank == 0).sum()) == int((logits.argmax(-1) == labels).sum())
    assert_close(stats.entropy.sum() / items, -(log_p.exp() * log_p).sum() / items, 1e-12)
    ce = -stats.log_prob.sum() / items
    assert_close(ce, torch.nn.functional.cross_entropy(logits, labels), 1e-12)
    assert_close(loss - ce, 0.1 * logits.logsumexp(-1).square().mean(), 1e-12)


def test_no_statistic(device):
    """Names that happen to be none change neither the way nor what comes back."""
    p = Problem(device)
    for call in (
        lambda **how: linear_cross_entropy(p.hidden, p.weight, p.target, **how),
        lambda **how: cross_entropy(p.hidden, p.target % 8, **how),
    ):
        loss, stats = call(return_stats=())
        assert torch.equal(loss, call())
        assert not any(x is not None for x in stats)


def test_no_token(device):
    p = Problem(device)
    p.target.fill_(-100)
    for options, wanted in (({}, "nan"), ({"num_items": 0}, "0.0"), ({"num_items": 3}, "0.0")):
        h, w, b = p.leaves()
        loss, stats = linear_cross_entropy(
            h, w, p.target, linear_bias=b, return_stats=True, **options
        )
        assert str(float(loss.detach())) == wanted
        assert (stats.rank == V).all()
        loss.backward()
        assert not h.grad.any()


def test_backward_twice_of_second_order_and_without_a_gradient(device):
    p = Problem(device, torch.float64)
    h, w, b = p.leaves()

    def both(**how):
        return linear_cross_entropy(h, w, p.target, linear_bias=b, z_loss=0.1, **how)

    loss, _ = both(return_stats=True)
    first = torch.autograd.grad(loss, h, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, h, retain_graph=True)[0], first)
    second = []
    for value in (loss, both()):
        (gradient,) = torch.autograd.grad(value, h, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), w)[0])
    assert_close(second[0], second[1], 1e-9)
    with torch.no_grad():
        value, stats = both(return_stats=True)
    assert torch.equal(value, loss.detach())
    assert stats.entropy.shape == p.target.shape


def test_ignored_tokens_may_hold_anything(device):
    p = Problem(device)
    p.hidden[p.target == -100] = torch.nan
    for drop in (True, False):
        h, w, b = p.leaves()
        loss, stats = linear_cross_entropy(
            h, w, p.target, linear_bias=b, return_stats=True, drop_ignored=drop
        )
        loss.backward()
        assert loss.isfinite()
        assert all(x.isfinite().all() for x in (stats.entropy, w.grad, b.grad))
        assert not h.grad[p.target == -100].any()


def test_bad_input(device):
    p = Problem(device)
    logits = torch.randn(N, V, device=device)
    with pytest.raises(ValueError, match="return_stats must be a bool or names"):
        cross_entropy(logits, p.target, return_stats=("nothing",))
    with pytest.raises(ValueError, match="return_stats must be a bool or names"):
        linear_cross_entropy(p.hidden, p.weight, p.target, return_stats="rank")
    with pytest.raises(RuntimeError, match="logits that stay"):
        cross_entropy(logits, p.target, return_stats=True, inplace=True)
    for call in (
        lambda: cross_entropy(logits, logits.softmax(-1), return_stats=True),
        lambda: linear_cross_entropy(p.hidden, p.weight, logits.softmax(-1), return_stats=True),
    ):
        with pytest.raises(RuntimeError, match="class indices"):
            call()


def test_under_transforms_and_compilers(device):
    p = Problem(device, torch.float64)

    def value(h):
        loss, stats = linear_cross_entropy(h, p.weight, p.target, return_stats=("entropy", "rank"))
        return loss, (stats.entropy, stats.rank)

    loss, stats = value(p.hidden)
    gradient, (one, other) = torch.func.grad(value, has_aux=True)(p.hidden)
    assert_close(one, stats[0], 1e-12)
    assert torch.equal(other, stats[1])
    h = p.hidden.clone().requires_grad_()
    found, _ = torch.compile(value, fullgraph=True)(h)
    found.backward()
    assert_close(found.detach(), loss, 1e-12)
    assert_close(h.grad, gradient, 1e-9)


def test_jagged_batches(device):
    p = Problem(device)
    nested = [
        torch.nested.nested_tensor_from_jagged(t, torch.tensor([0, 5, N], device=device))
        for t in (p.hidden, p.target)
    ]
    loss, stats = linear_cross_entropy(nested[0], p.weight, nested[1], return_stats=True)
    plain, wanted = linear_cross_entropy(p.hidden, p.weight, p.target, return_stats=True)
    assert torch.equal(loss, plain)
    assert torch.equal(stats.entropy.values(), wanted.entropy)
