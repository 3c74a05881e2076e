"""A rank's statistics of its columns, and the merge of all ranks', without processes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

import llmloss_ext
from llmloss_ext.ops.library import fields
from llmloss_ext.options import LogitOptions, pack
from llmloss_ext.shard import ShardedColumns, ShardedRows
from llmloss_ext.statistics import STATISTICS, FloatStats, RowStats, asked

ALL = asked(STATISTICS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_division_merges_to_the_whole(device, dtype):
    """Without processes: parts of any sizes, one of which may have no logit."""
    logits = (5 * torch.randn(8, 60, dtype=torch.float64)).to(dtype).to(device)
    logits[2, 20:50] = -torch.inf
    logits[7, 3] = torch.nan
    target = torch.tensor([0, 59, 55, 20, 40, -100, 19, 30], device=device)
    extra = ("log_sum_sq_probs",)
    whole = llmloss_ext.token_stats(logits, target, with_rank=True, extra=extra)
    for bounds in ([0, 60], [0, 20, 60], [0, 1, 20, 50, 60], [0, 13, 14, 59, 60]):
        of_ranks = []
        for begin, end in itertools.pairwise(bounds):
            shard = ShardedColumns(None, 1, begin, end - begin, 60)
            rows = ShardedRows(shard, None, None, LogitOptions(1.0, 0.0, -100, 60))
            column, owned = shard.localise(target, -100)
            of_ranks.append(rows._shard_stats(logits[:, begin:end], column, owned, ALL))
        *merged, owners = torch.ops.llmloss.merge_shards(torch.stack(of_ranks), target, -100, 60)
        stats = RowStats.of(merged)
        assert owners.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
        assert torch.equal(stats.argmax, whole.argmax)
        for name in FloatStats._fields:
            one, other = getattr(stats.floats, name), getattr(whole, name)
            assert_close(one, other, 1e-13 if dtype == torch.float64 else 1e-6)


def test_the_merge_refuses_what_it_cannot_read(device):
    count = len(fields("shard"))
    of_ranks = torch.zeros(2, count, 3, device=device)
    target = torch.arange(3, device=device)
    merge = torch.ops.llmloss.merge_shards
    short, flat = of_ranks[:, : count - 1], of_ranks[0]
    for wrong in (short, flat, of_ranks.transpose(1, 2), of_ranks.bfloat16()):
        with pytest.raises(RuntimeError, match=rf"ranks, {count}, rows"):
            merge(wrong, target, -100, 9)
    for wrong in (target[:2], target.float(), target.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="expected 3 contiguous"):
            merge(of_ranks, wrong, -100, 9)


def test_a_target_elsewhere_is_nothing_but_missing(device):
    """The kernels' part of it: statistics and gradient of a row whose target is no column."""
    logits = torch.randn(3, 300, device=device)
    target = torch.tensor([-1, 5, -100], device=device)
    options = (None, None, *pack(LogitOptions(1.0, 0.0, -100, 300, classes=900)))
    token_stats = torch.ops.llmloss.token_stats
    stats = RowStats.of(token_stats(logits, target, *options, ALL))
    known = RowStats.of(token_stats(logits, target.where(target != -1, 7), *options, ALL))
    # Not bit by bit: a sum that leaves a target out, which is added later, has another order.
    assert_close(stats.state, known.state, 1e-6)
    assert torch.equal(stats.argmax, known.argmax)
    for name in set(FloatStats._fields) - {"log_prob"}:
        assert_close(getattr(stats.floats, name), getattr(known.floats, name), 1e-6)
    ones = torch.ones(3, device=device)
    grad, _ = torch.ops.llmloss.token_stats_backward(
        FloatStats(log_prob=ones), logits, target, *options, stats.floats, stats.state, False
    )
    p = logits.double().softmax(-1)
    assert_close(grad[0], -p[0], 1e-6)
    assert_close(grad[1], F.one_hot(target[1:2], 300)[0] - p[1], 1e-6)
    assert not grad[2].any()
    if logits.device.type == "cpu":  # -1 is no target unless the columns are said to be a shard's
        whole = (None, None, *pack(LogitOptions(1.0, 0.0, -100, 300)))
        with pytest.raises(IndexError, match="Target -1"):
            token_stats(logits, target, *whole, ALL)
