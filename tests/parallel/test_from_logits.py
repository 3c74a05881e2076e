"""Vocabulary-parallel losses from logits, against the whole in float64: each rank has some columns.

The functions named ``rank_...`` run on every rank of a group. What they check there fails the test.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FLOATS, GRADIENT, VALUE, assert_close
from ranks import same_on_every_rank

import llmloss_ext
from llmloss_ext import parallel

from .problem import COLUMNS, OPTIONS, ROWS, D, Problem, leaf


def rank_cross_entropy(rank, ranks, dtype, option, reduction, inplace):
    if option == "num_items" and reduction != "mean":
        return
    p = Problem(rank, ranks, dtype, **OPTIONS[option])
    shard, whole, exact = leaf(p.logits[:, p.columns]), leaf(p.logits.double()), p.exact()
    upstream = torch.rand(ROWS) if reduction == "none" else torch.tensor(0.3)
    given = shard * 1 if inplace else shard
    loss = parallel.cross_entropy(given, p.target, reduction=reduction, inplace=inplace, **p.mine())
    expected = llmloss_ext.cross_entropy(whole, p.target, reduction=reduction, **exact)
    loss.backward(upstream.to(loss.dtype))
    expected.backward(upstream.double())
    same_on_every_rank(loss)
    assert_close(loss.detach(), expected.detach(), VALUE[dtype])
    assert_close(shard.grad, whole.grad[:, p.columns], GRADIENT[dtype])
    if p.scale is not None:
        same_on_every_rank(p.scale.grad)
        assert_close(p.scale.grad, exact["logit_scale"].grad, 1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(ranks, option, reduction):
    ranks.run(rank_cross_entropy, torch.float32, option, reduction, False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inplace", [False, True])
def test_dtypes(two, dtype, inplace):
    two.run(rank_cross_entropy, dtype, "all", "mean", inplace)
    two.run(rank_cross_entropy, dtype, "none", "mean", inplace)


def rank_token_stats(rank, ranks, dtype, shape):
    p = Problem(rank, ranks, dtype)
    logits = p.logits.repeat(2, 1).view(*shape, -1)
    target = p.target.repeat(2).view(shape)
    shard, whole = leaf(logits[..., p.columns]), leaf(logits.double())
    options = {"with_rank": True, "extra": ("log_sum_sq_probs",)}
    stats = parallel.token_stats(shard, target, **options)
    expected = llmloss_ext.token_stats(whole, target, **options)
    names = ("log_prob", "lse", "entropy", "mean_log_prob", "log_sum_sq_probs")
    upstream = torch.randn(len(names), *shape)
    for name, got, want in zip(stats._fields, stats, expected, strict=True):
        same_on_every_rank(got)
        if name in ("argmax", "rank"):
            assert torch.equal(got, want), name
        else:
            assert_close(got.detach(), want.detach(), VALUE[dtype])
    for result in (stats, expected):
        of = [getattr(result, name) for name in names]
        sum((u * s).sum() for u, s in zip(upstream, of, strict=True)).backward()
    assert_close(shard.grad, whole.grad[..., p.columns], 4 * GRADIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_token_stats(ranks, dtype):
    ranks.run(rank_token_stats, dtype, (2 * ROWS,))
    ranks.run(rank_token_stats, dtype, (2, ROWS))


def rank_rank_of_scaled(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    for scale in (-0.5, 0.0, torch.tensor(-2.0), torch.tensor(0.1)):
        options = {"logit_scale": scale, "softcap": 9.0, "with_rank": True}
        stats = parallel.token_stats(p.logits[:, p.columns], p.target, **options)
        expected = llmloss_ext.token_stats(p.logits, p.target, **options)
        assert torch.equal(stats.rank, expected.rank)
        assert torch.equal(stats.argmax, expected.argmax)


def test_ranks_and_argmax_follow_the_scale(two):
    two.run(rank_rank_of_scaled)


def rank_padding(rank, ranks, classes):
    """Columns that stand for no class hold anything, and another rank's class is none of them."""
    p = Problem(rank, ranks, torch.float32)
    whole = leaf(p.logits[:, :classes].double())
    target = torch.arange(ROWS) % classes
    target[-1] = classes - 1
    logits = p.logits.clone()
    logits[:, classes:] = torch.tensor([1e6, torch.inf, torch.nan]).repeat(p.classes)[
        : p.classes - classes
    ]
    shard = leaf(logits[:, p.columns])
    options = {"label_smoothing": 0.3, "z_loss": 1e-3}
    loss = parallel.cross_entropy(shard, target, vocab_size=classes, **options)
    expected = llmloss_ext.cross_entropy(whole, target, **options)
    loss.backward()
    expected.backward()
    assert_close(loss.detach(), expected.detach(), 2e-6)
    padded = F.pad(whole.grad, (0, p.classes - classes))
    assert_close(shard.grad, padded[:, p.columns], 2e-6)
    used = max(min(classes - rank * COLUMNS, COLUMNS), 0)
    assert not shard.grad[:, used:].any()
    stats = parallel.token_stats(shard, target, vocab_size=classes, with_rank=True)
    expected = llmloss_ext.token_stats(whole, target, with_rank=True)
    assert torch.equal(stats.rank, expected.rank)
    assert torch.equal(stats.argmax, expected.argmax)
    weight = leaf(p.weight[p.columns])
    linear = parallel.linear_cross_entropy(p.hidden, weight, target, vocab_size=classes)
    linear.backward()
    assert not weight.grad[used:].any()
    assert_close(linear.detach(), F.cross_entropy(p.hidden @ p.weight[:classes].T, target), 1e-5)


@pytest.mark.parametrize("classes", [2 * COLUMNS - 3, COLUMNS, COLUMNS - 5, 1])
def test_padding(two, classes):
    """Also where a rank has nothing but padding [CCE 59, Megatron 737, 7464]."""
    two.run(rank_padding, classes)


def rank_uneven(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    bounds = [0, 5, p.classes - 9, p.classes][: ranks + 1]
    bounds[-1] = p.classes
    mine = slice(bounds[rank], bounds[rank + 1])
    where = {"vocab_start": mine.start, "vocab_size": p.classes}
    shard, whole = leaf(p.logits[:, mine]), leaf(p.logits)
    options = {"label_smoothing": 0.1}
    loss = parallel.cross_entropy(shard, p.target, **where, **options)
    expected = llmloss_ext.cross_entropy(whole, p.target, **options)
    loss.backward()
    expected.backward()
    assert_close(loss.detach(), expected.detach(), 2e-6)
    assert_close(shard.grad, whole.grad[:, mine], 2e-6)
    linear = parallel.linear_cross_entropy(
        p.hidden, p.weight[mine], p.target, max_chunk_bytes=2000, **where
    )
    assert_close(linear, llmloss_ext.linear_cross_entropy(p.hidden, p.weight, p.target), 1e-5)
    # A class that no rank has, or two: nobody computes a wrong loss in silence.
    for shift, owners in ((1, 0), (-1, 2)):
        target = torch.full((ROWS,), bounds[1] - (owners == 2))
        start = mine.start + shift * (rank == 1)
        with pytest.raises(ValueError, match="do not cover the vocabulary once"):
            parallel.cross_entropy(shard, target, vocab_start=start, vocab_size=p.classes)
    # Nor where no target shows it: the columns are counted.
    here = {"vocab_start": max(mine.start - 4, 0), "vocab_size": p.classes - 4}
    zeros = torch.zeros(ROWS, dtype=torch.int64)
    parallel.cross_entropy(shard, zeros, vocab_start=mine.start, vocab_size=p.classes)
    with pytest.raises(ValueError, match=f"columns are not {p.classes - 4} classes"):
        parallel.cross_entropy(shard, zeros, **here)


def test_uneven_shards(ranks):
    ranks.run(rank_uneven)


def rank_hard_numbers(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    mine = p.columns

    def check(logits, target=p.target, tolerance=2e-6):
        got = parallel.token_stats(logits[:, mine], target, with_rank=True)
        want = llmloss_ext.token_stats(logits.double(), target, with_rank=True)
        for name, one, other in zip(got._fields, got, want, strict=True):
            assert_close(one, other, tolerance), name
        shard, whole = leaf(logits[:, mine]), leaf(logits.double())
        parallel.cross_entropy(shard, target, reduction="sum").backward()
        llmloss_ext.cross_entropy(whole, target, reduction="sum").backward()
        assert_close(shard.grad, whole.grad[:, mine], tolerance)

    # A common offset costs no digits: quarters at 2^13 are exact.
    quarters = (p.logits * 4).round() / 4
    check(quarters + 8192)
    check(quarters - 8192)
    # One rank's logits far above the others'.
    far = p.logits.clone()
    far[:, COLUMNS : 2 * COLUMNS] += 300
    check(far)
    # Confident: the target's gradient keeps its digits.
    sure = torch.zeros(ROWS, p.classes)
    sure[torch.arange(ROWS), p.target.clamp_min(0)] = torch.linspace(10, 18, ROWS)
    check(sure)
    # Without -inf nothing is masked; with it, a rank may have no logit at all.
    masked = p.logits.clone()
    masked[:, COLUMNS:] = -torch.inf
    check(masked, p.target.clamp_max(COLUMNS - 1))
    lost = parallel.cross_entropy(masked[:, mine], torch.full((ROWS,), COLUMNS), reduction="none")
    assert lost.isposinf().all()
    # nan and +inf spoil their row and no other.
    spoilt = p.logits.clone()
    spoilt[0, 0], spoilt[1, -1] = torch.nan, torch.inf
    got = parallel.token_stats(spoilt[:, mine], p.target, with_rank=True)
    want = llmloss_ext.token_stats(p.logits, p.target, with_rank=True)
    assert got.log_prob[:2].isnan().all()
    assert got.rank[:2].tolist() == [p.classes] * 2
    assert got.argmax[:2].tolist() == [-1, -1]
    assert torch.equal(got.rank[2:], want.rank[2:])
    assert_close(got.lse[2:], want.lse[2:], 2e-6)
    # No token: nan as in torch, 0 with num_items, and nobody waits.
    nothing = torch.full((ROWS,), -100)
    shard = leaf(p.logits[:, mine])
    assert parallel.cross_entropy(shard, nothing).isnan()
    loss = parallel.cross_entropy(shard, nothing, num_items=3)
    loss.backward()
    assert loss == 0
    assert not shard.grad.any()
    assert parallel.cross_entropy(shard[:0], nothing[:0], reduction="sum") == 0


def test_hard_numbers(ranks):
    ranks.run(rank_hard_numbers)


def rank_bits(rank, ranks):
    """A row's statistics have the same bits alone and in any batch, and in every call."""
    p = Problem(rank, ranks, torch.float32)
    shard = p.logits[:, p.columns]
    target = p.target.clamp_min(0)
    whole = parallel.token_stats(shard, target)
    for row in range(ROWS):
        alone = parallel.token_stats(shard[row : row + 1], target[row : row + 1])
        for one, many in zip(alone[:4], whole[:4], strict=True):
            assert torch.equal(one[0], many[row])
    # Slices of (B, S, V) are read in place.
    sequences = torch.randn(3, 8, COLUMNS)
    labels = torch.randint(0, p.classes, (3, 7))
    sliced = parallel.token_stats(sequences[:, :-1], labels)
    copied = parallel.token_stats(sequences[:, :-1].contiguous(), labels)
    assert torch.equal(sliced.lse, copied.lse)
    # As many positions as columns: classes are last all the same.
    square = torch.randn(2, COLUMNS, COLUMNS)
    labels = torch.randint(0, p.classes, (2, COLUMNS))
    stats = parallel.token_stats(square, labels)
    assert torch.equal(stats.lse[1], parallel.token_stats(square[1], labels[1]).lse)


def test_bits(two):
    two.run(rank_bits)


def rank_inplace(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    shard = leaf(p.logits[:, p.columns])
    given = shard * 1
    memory = given.data_ptr()
    loss = parallel.cross_entropy(given, p.target, inplace=True)
    (grad,) = torch.autograd.grad(loss, given, retain_graph=True)
    assert grad.data_ptr() == memory
    with pytest.raises(RuntimeError, match=r"a second time|modified by an inplace"):
        torch.autograd.grad(loss, given)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        parallel.cross_entropy(shard, p.target, inplace=True)
    # Not in place, a second backward gives the same.
    loss = parallel.cross_entropy(shard, p.target)
    first, second = (torch.autograd.grad(loss, shard, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_close(grad, first, 1e-7)


def test_inplace(two):
    two.run(rank_inplace)


def rank_errors(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    shard = leaf(p.logits[:, p.columns])
    target = p.target.clone()
    target[2] = p.classes
    with pytest.raises(
        IndexError, match=rf"Target {p.classes} at position 2 .* \[0, {p.classes}\)"
    ):
        parallel.cross_entropy(shard, target)
    with pytest.raises(IndexError, match="position 2"):
        parallel.linear_cross_entropy(p.hidden, p.weight[p.columns], target)
    with pytest.raises(IndexError, match=rf"\[0, {COLUMNS + 1}\)"):
        parallel.cross_entropy(shard, p.target * 0 + COLUMNS + 1, vocab_size=COLUMNS + 1)
    with pytest.raises(ValueError, match="vocab_start needs vocab_size"):
        parallel.cross_entropy(shard, p.target, vocab_start=0)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, "):
        parallel.cross_entropy(shard, p.target, vocab_size=p.classes + 1)
    with pytest.raises(ValueError, match="vocab_start >= 0"):
        parallel.cross_entropy(shard, p.target, vocab_start=-1, vocab_size=9)
    with pytest.raises(ValueError, match="at least one column"):
        parallel.cross_entropy(shard[:, :0], p.target)
    with pytest.raises(ValueError, match="classes last"):
        parallel.cross_entropy(shard.view(1, ROWS, -1), p.target)
    with pytest.raises(RuntimeError, match="not probabilities"):
        parallel.cross_entropy(shard, torch.rand_like(shard))
    with pytest.raises(RuntimeError, match="all 37 classes"):
        parallel.cross_entropy(shard, p.target, weight=torch.rand(p.classes))
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda x: parallel.cross_entropy(x, p.target))(shard.detach())
    for loss in (
        parallel.cross_entropy(shard, p.target),
        parallel.linear_cross_entropy(shard[:, :D], p.weight[p.columns], p.target),
        parallel.linear_token_stats(shard[:, :D], p.weight[p.columns], p.target).lse.sum(),
    ):
        with pytest.raises(RuntimeError, match="first-order gradients only"):
            torch.autograd.grad(loss, shard, create_graph=True)
    # A group of one has all columns; who is not in it is told so.
    alone = dist.new_group([0])
    if rank == 0:
        loss = parallel.cross_entropy(p.logits, p.target, group=alone)
        assert_close(loss, F.cross_entropy(p.logits, p.target), 2e-6)
    else:
        with pytest.raises(RuntimeError, match="not in the group"):
            parallel.cross_entropy(p.logits, p.target, group=alone)


def test_errors(two):
    two.run(rank_errors)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallel.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))
