"""Vocabulary-parallel losses from hidden states, against the whole in float64.

The functions named ``rank_...`` run on every rank of a group. What they check there fails the test.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import FLOATS, VALUE, assert_close
from ranks import same_on_every_rank

import llmloss_ext
from llmloss_ext import parallel
from llmloss_ext.shard import ShardedRows

from .problem import COLUMNS, OPTIONS, ROWS, Problem, leaf


def rank_linear(rank, ranks, dtype, option, reduction, how):
    if option == "num_items" and reduction != "mean":
        return
    p = Problem(rank, ranks, dtype, **OPTIONS[option])
    exact = p.exact()
    mine = [leaf(p.hidden), leaf(p.weight[p.columns]), leaf(p.bias[p.columns])]
    whole = [leaf(t.double()) for t in (p.hidden, p.weight, p.bias)]
    upstream = torch.rand(ROWS) if reduction == "none" else torch.tensor(0.3)
    options = p.mine() | {"chunk_tokens": 4, "drop_ignored": how == "drop"}
    accumulator = torch.ones_like(mine[1]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    if how == "accumulator":
        options["weight_grad_accumulator"] = accumulator
    if how == "stats":
        options["return_stats"] = ("entropy", "lse", "rank")  # rank by itself, without argmax
    loss = parallel.linear_cross_entropy(
        mine[0], mine[1], p.target, linear_bias=mine[2], reduction=reduction,
        sum_input_grad=how != "part", **options,
    )  # fmt: skip
    expected = llmloss_ext.linear_cross_entropy(
        whole[0], whole[1], p.target, linear_bias=whole[2], reduction=reduction, **exact
    )
    if how == "stats":
        loss, stats = loss
        same_on_every_rank(stats.entropy)
        read = ("softcap", "logit_scale", "temperature", "vocab_size", "ignore_index")
        given = {name: exact[name] for name in read if name in exact}
        every = llmloss_ext.linear_token_stats(
            whole[0], whole[1], p.target, linear_bias=whole[2], with_rank=True, **given
        )
        counts = p.target != exact.get("ignore_index", -100)
        if "token_weight" in exact:
            counts &= exact["token_weight"] != 0
        assert_close(stats.entropy, torch.where(counts, every.entropy, 0.0).detach(), 1e-4)
        assert torch.equal(stats.rank[counts], every.rank[counts])
        assert not stats.lse.requires_grad
    with torch.no_grad():  # without gradients, the loss is made another way
        again = parallel.linear_cross_entropy(
            mine[0], mine[1], p.target, linear_bias=mine[2], reduction=reduction, **p.mine()
        )
    assert_close(again, loss.detach(), 2e-2 if loss.dtype != dtype else 4 * VALUE[dtype])
    loss.backward(upstream.to(loss.dtype))
    expected.backward(upstream.double())
    same_on_every_rank(loss)
    rounded = dtype in (torch.bfloat16, torch.float16)
    assert_close(loss.detach(), expected.detach(), 2e-2 if rounded else 4 * VALUE[dtype])
    grads = [t.grad for t in mine]
    if how == "accumulator":
        assert grads[1] is None
        grads[1] = accumulator - 1
    if how == "part":
        dist.all_reduce(grads[0])
    same_on_every_rank(grads[0])
    tolerance = 3e-2 if rounded else 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(grads[0], whole[0].grad, tolerance)
    assert_close(grads[1], whole[1].grad[p.columns], tolerance)
    assert_close(grads[2], whole[2].grad[p.columns], tolerance)
    if p.scale is not None:
        assert_close(p.scale.grad, exact["logit_scale"].grad, 1e-1 if rounded else 1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear(ranks, option, reduction):
    ranks.run(rank_linear, torch.float32, option, reduction, "drop")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_with_statistics(two, option, reduction):
    two.run(rank_linear, torch.float32, option, reduction, "stats")


def rank_float32_logits(rank, ranks, classes):
    p = Problem(rank, ranks, torch.bfloat16)
    target = p.target.clamp_max(classes - 1)
    mine = [leaf(p.hidden), leaf(p.weight[p.columns]), leaf(p.bias[p.columns])]
    whole = [leaf(t.double()) for t in (p.hidden, p.weight, p.bias)]
    used = {"vocab_size": classes}
    how = {"chunk_tokens": 4, "logits_dtype": torch.float32, **used}
    loss = parallel.linear_cross_entropy(
        mine[0], mine[1], target, linear_bias=mine[2], temperature=0.7, softcap=9.0, **how
    )
    expected = llmloss_ext.linear_cross_entropy(
        whole[0], whole[1], target, linear_bias=whole[2], temperature=0.7, softcap=9.0, **used
    )
    same_on_every_rank(loss)
    assert_close(loss, expected, 1e-5)
    log_probs = parallel.linear_log_probs(*mine[:2], target, linear_bias=mine[2], **how)
    exact = llmloss_ext.linear_log_probs(*whole[:2], target, linear_bias=whole[2], **used)
    assert (log_probs - exact).abs().max() < 1e-4
    loss.backward()
    expected.backward()
    for ours, theirs in zip(mine, (whole[0].grad, *(t.grad[p.columns] for t in whole[1:])),
                            strict=True):  # fmt: skip
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad - theirs).norm() <= 2**-8 * theirs.norm()


@pytest.mark.parametrize("classes", [2 * COLUMNS, COLUMNS - 5])
def test_float32_logits(two, classes):
    """Also where a rank has nothing but padding."""
    two.run(rank_float32_logits, classes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", ["keep", "accumulator", "part"])
def test_linear_dtypes(two, dtype, how):
    if dtype == torch.float16 and how == "accumulator":
        pytest.skip("the same as the others'")
    two.run(rank_linear, dtype, "all", "mean", how)


def rank_linear_stats(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    hidden = p.hidden.repeat(2, 1, 1)
    target = p.target.repeat(2, 1)
    mine, weight = leaf(hidden), leaf(p.weight[p.columns])
    whole = [leaf(hidden.double()), leaf(p.weight.double())]
    options = {"shift": 1, "with_rank": True, "chunk_tokens": 5}
    stats = parallel.linear_token_stats(mine, weight, target, **options)
    expected = llmloss_ext.linear_token_stats(*whole, target, **options)
    assert torch.equal(stats.rank, expected.rank)
    assert torch.equal(stats.argmax, expected.argmax)
    upstream = torch.randn(4, *target.shape)
    for got, want in zip(stats[:4], expected[:4], strict=True):
        assert_close(got.detach(), want.detach(), 1e-5)
    sum(((u * s).sum() for u, s in zip(upstream, stats[:4], strict=True))).backward()
    sum(((u * s).sum() for u, s in zip(upstream, expected[:4], strict=True))).backward()
    assert_close(mine.grad, whole[0].grad, 1e-5)
    assert_close(weight.grad, whole[1].grad[p.columns], 1e-5)
    # What is frozen costs nothing and gets nothing; without gradients there is one product.
    loss = parallel.linear_cross_entropy(p.hidden, weight, p.target)
    loss.backward()
    with torch.no_grad():
        assert parallel.linear_cross_entropy(mine[0], weight, p.target) == loss
    with torch.inference_mode():
        assert parallel.linear_cross_entropy(mine[0], weight, p.target) == loss


def test_linear_stats(ranks):
    ranks.run(rank_linear_stats)


def rank_autocast(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    hidden, weight = leaf(p.hidden), leaf(p.weight[p.columns])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = parallel.linear_cross_entropy(hidden, weight, p.target)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = llmloss_ext.linear_cross_entropy(p.hidden, p.weight, p.target)
    assert_close(loss.detach(), expected, 1e-4)
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32

    @torch.compile(backend="eager")
    def step(hidden):
        return parallel.linear_cross_entropy(hidden * 1, weight, p.target) * 2

    compiled = step(hidden)
    compiled.backward()
    assert_close(compiled.detach(), 2 * F.cross_entropy(p.hidden @ p.weight.T, p.target), 1e-5)


def test_autocast_and_compile(two):
    two.run(rank_autocast)


def rank_uneven_and_padded(rank, ranks):
    """All that depends on a rank's share of the classes, and gradients of everything."""
    p = Problem(rank, ranks, torch.float32)
    classes = p.classes - 3  # the last rank has padding
    bounds = [0, 5, p.classes - 9, p.classes][: ranks + 1]
    bounds[-1] = p.classes
    mine = slice(bounds[rank], bounds[rank + 1])
    where = {"vocab_start": mine.start, "vocab_size": classes}
    target = p.target.clamp_max(classes - 1)
    class_weight = torch.rand(p.classes)
    hidden, weight, bias = leaf(p.hidden), leaf(p.weight[mine]), leaf(p.bias[mine])
    whole = [leaf(t.double()) for t in (p.hidden, p.weight[:classes], p.bias[:classes])]
    tokens, exact_tokens = torch.rand(ROWS).requires_grad_(), None
    exact_tokens = leaf(tokens.double())
    options = {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 8.0}
    for reduction in ("mean", "sum", "none"):
        for learned in (False, True):
            given = tokens if learned else tokens.detach()
            exact = exact_tokens if learned else exact_tokens.detach()
            loss = parallel.linear_cross_entropy(
                hidden, weight, target, linear_bias=bias, weight=class_weight[mine],
                token_weight=given, reduction=reduction, max_chunk_bytes=2000, **where, **options,
            ).sum()  # fmt: skip
            expected = llmloss_ext.linear_cross_entropy(
                whole[0], whole[1], target, linear_bias=whole[2], token_weight=exact,
                weight=class_weight[:classes].double(), reduction=reduction, **options,
            ).sum()  # fmt: skip
            assert_close(loss.detach(), expected.detach(), 1e-5)
            asked = (hidden, weight, bias, *((tokens,) if learned else ()))
            wanted = (*whole, *((exact_tokens,) if learned else ()))
            grads = torch.autograd.grad(loss, asked, retain_graph=True)
            again = torch.autograd.grad(loss, asked)  # repeats the exchange on every rank
            others = torch.autograd.grad(expected, wanted)
            used = min(classes, mine.stop) - mine.start
            for i, (one, two_, other) in enumerate(zip(grads, again, others, strict=True)):
                if i in (1, 2):
                    assert not one[used:].any()
                    one, two_, other = one[:used], two_[:used], other[mine.start : mine.stop]
                assert_close(one, other, 1e-5)
                assert torch.equal(one, two_)


def test_uneven_and_padded(ranks):
    ranks.run(rank_uneven_and_padded)


def rank_other_inputs(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    weight = leaf(p.weight[p.columns])
    loss = parallel.linear_cross_entropy(p.hidden, weight, p.target)
    # int32 targets, and an ignore_index that is none.
    narrow = torch.where(p.target < 0, 0, p.target).int()
    wide = torch.where(p.target < 0, 0, p.target)
    for ignored in (0, 2**40):
        one = parallel.linear_cross_entropy(p.hidden, weight, narrow, ignore_index=ignored)
        two_ = parallel.linear_cross_entropy(p.hidden, weight, wide, ignore_index=ignored)
        assert torch.equal(one, two_)
        shard = p.logits[:, p.columns]
        one = parallel.cross_entropy(shard, narrow, ignore_index=ignored)
        assert torch.equal(one, parallel.cross_entropy(shard, wide, ignore_index=ignored))
    # No token at all.
    none = parallel.linear_cross_entropy(p.hidden[:0], weight, p.target[:0], reduction="sum")
    none.backward()
    assert none == 0
    assert not weight.grad.any()
    # Whatever weight an ignored token has.
    tokens = torch.where(p.target < 0, torch.nan, 1.0)
    assert torch.equal(
        parallel.linear_cross_entropy(p.hidden, weight, p.target, token_weight=tokens), loss
    )
    shard = p.logits[:, p.columns]
    assert torch.equal(
        parallel.cross_entropy(shard, p.target, token_weight=tokens),
        parallel.cross_entropy(shard, p.target),
    )
    # What statistics say in one number.
    log_probs = parallel.linear_log_probs(p.hidden, weight, p.target, chunk_tokens=3)
    assert_close(
        log_probs, llmloss_ext.linear_log_probs(p.hidden, p.weight, p.target).double(), 1e-5
    )
    # A checkpointed loss is computed again in backward, by all ranks.
    hidden = leaf(p.hidden)
    again = torch.utils.checkpoint.checkpoint(
        lambda x: parallel.linear_cross_entropy(x, weight, p.target, chunk_tokens=4),
        hidden, use_reentrant=False,
    )  # fmt: skip
    again.backward()
    whole = leaf(p.hidden)
    llmloss_ext.linear_cross_entropy(whole, p.weight, p.target).backward()
    assert_close(hidden.grad, whole.grad, 1e-5)
    # A group whose ranks are not the world's first.
    last_two = dist.new_group([ranks - 2, ranks - 1])
    if rank >= ranks - 2:
        here = slice((rank - ranks + 2) * COLUMNS, (rank - ranks + 3) * COLUMNS)
        target = p.target % (2 * COLUMNS)
        found = parallel.cross_entropy(p.logits[:, here], target, group=last_two)
        assert_close(found, F.cross_entropy(p.logits[:, : 2 * COLUMNS], target), 2e-6)


def test_other_inputs(ranks):
    ranks.run(rank_other_inputs)


def rank_every_option_of_statistics(rank, ranks):
    """Each alone, so that none can be ignored unnoticed."""
    p = Problem(rank, ranks, torch.float32)
    class_weight, scale = torch.rand(p.classes), torch.tensor(0.6)
    target = p.target.clone()
    target[0] = 2
    options = {
        "weight": ({"weight": class_weight[p.columns]}, {"weight": class_weight}),
        "ignore_index": ({"ignore_index": 2}, {"ignore_index": 2}),
        "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
        "logit_scale": ({"logit_scale": scale}, {"logit_scale": scale}),
        "vocab_size": ({"vocab_size": p.classes - 5}, {"vocab_size": p.classes - 5}),
        "with_rank": ({"with_rank": True}, {"with_rank": True}),
    }
    linear = {
        "linear_bias": ({"linear_bias": p.bias[p.columns]}, {"linear_bias": p.bias}),
        "shift": ({"shift": 2}, {"shift": 2}),
    }
    for name, (mine, whole) in (options | linear).items():
        labels = target.clamp_max(p.classes - 6) if name == "vocab_size" else target
        labels = torch.where(labels < 0, 0, labels) if name == "ignore_index" else labels
        found, wanted, plain = [], [], []
        if name in options:
            found += parallel.token_stats(p.logits[:, p.columns], labels, **mine)
            wanted += llmloss_ext.token_stats(p.logits, labels, **whole)
            plain += llmloss_ext.token_stats(p.logits, labels)
        found += parallel.linear_token_stats(p.hidden, p.weight[p.columns], labels, **mine)
        wanted += llmloss_ext.linear_token_stats(p.hidden, p.weight, labels, **whole)
        plain += llmloss_ext.linear_token_stats(p.hidden, p.weight, labels)
        if name not in ("weight", "with_rank"):
            where = (p.hidden, p.weight[p.columns], labels)
            found.append(parallel.linear_log_probs(*where, **mine))
            wanted.append(llmloss_ext.linear_log_probs(p.hidden, p.weight, labels, **whole))
            plain.append(llmloss_ext.linear_log_probs(p.hidden, p.weight, labels))
        if name not in ("weight", "with_rank"):
            found.append(parallel.linear_cross_entropy(*where, **mine))
            wanted.append(llmloss_ext.linear_cross_entropy(p.hidden, p.weight, labels, **whole))
            plain.append(llmloss_ext.linear_cross_entropy(p.hidden, p.weight, labels))
        differs = 0
        for one, other, without in zip(found, wanted, plain, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                assert_close(one, other, 1e-5)
                differs += without is None or not torch.equal(without, other)
        assert differs, name


def test_every_option_of_statistics(ranks):
    ranks.run(rank_every_option_of_statistics)


def rank_how_the_tokens_are_walked_through(rank, ranks):
    p = Problem(rank, ranks, torch.bfloat16)
    seen = []
    statistics = ShardedRows.statistics

    def watched(self, logits, *others):
        seen.append(len(logits))
        return statistics(self, logits, *others)

    ShardedRows.statistics = watched
    try:
        for run in (
            parallel.linear_cross_entropy,
            parallel.linear_token_stats,
            parallel.linear_log_probs,
        ):
            valid = int((p.target >= 0).sum())
            for options, rows in (
                ({"chunk_tokens": 4, "drop_ignored": False}, ROWS),
                ({"max_chunk_bytes": 4 * 128, "drop_ignored": False}, ROWS),
                ({"chunk_tokens": 4, "drop_ignored": True}, valid),
                ({"chunk_tokens": 4}, valid),
            ):
                seen.clear()
                run(p.hidden, p.weight[p.columns], p.target, **options)
                assert sum(seen) == rows
                assert len(seen) == 3
                assert max(seen) <= 4
            # The sums over chunks in 16 bits, or not; and the hidden states' gradient in parts.
            grads = []
            for options in ({}, {"weight_grad_dtype": torch.bfloat16}, {"sum_input_grad": False}):
                hidden, weight = leaf(p.hidden), leaf(p.weight[p.columns])
                out = run(hidden, weight, p.target, chunk_tokens=2, **options)
                (out.lse if isinstance(out, tuple) else out).sum().backward()
                grads.append((hidden.grad, weight.grad))
            assert not torch.equal(grads[0][1], grads[1][1])
            assert_close(grads[0][1], grads[1][1], 5e-2)
            assert not torch.equal(grads[0][0], grads[2][0])
            dist.all_reduce(grads[2][0])
            assert torch.equal(grads[0][0], grads[2][0])
    finally:
        ShardedRows.statistics = statistics


def test_how_the_tokens_are_walked_through(two):
    two.run(rank_how_the_tokens_are_walked_through)
