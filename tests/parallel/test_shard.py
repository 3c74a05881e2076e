"""What a rank says of its columns, and the merge of all that the ranks say, without processes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

import llmloss_ext
from llmloss_ext.composite import LogitOptions
from llmloss_ext.shard import Shard, Wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_division_merges_to_the_whole(device, dtype):
    """Without processes: parts of any sizes, one of which may have no logit."""
    logits = (5 * torch.randn(8, 60, dtype=torch.float64)).to(dtype).to(device)
    logits[2, 20:50] = -torch.inf
    logits[7, 3] = torch.nan
    target = torch.tensor([0, 59, 55, 20, 40, -100, 19, 30], device=device)
    whole = llmloss_ext.token_stats(logits, target, with_rank=True)
    for bounds in ([0, 60], [0, 20, 60], [0, 1, 20, 50, 60], [0, 13, 14, 59, 60]):
        said = []
        for begin, end in itertools.pairwise(bounds):
            shard = Shard(None, 1, begin, end - begin, 60)
            column, owned = shard.localise(target, -100)
            options = LogitOptions(1.0, 0.0, -100, 60)
            wanted = Wanted(True, True, True)
            said.append(
                shard._say(logits[:, begin:end], column, owned, None, None, options, wanted)
            )
        *stats, argmax, _, owners = torch.ops.llmloss.merge_shards(
            torch.stack(said), target, -100, 60
        )
        assert owners.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
        assert torch.equal(argmax, whole.argmax)
        for one, other in zip(stats, whole[:4], strict=True):
            assert_close(one, other, 1e-13 if dtype == torch.float64 else 1e-6)


def test_the_merge_refuses_what_it_cannot_read(device):
    said = torch.zeros(2, 9, 3, device=device)
    target = torch.arange(3, device=device)
    merge = torch.ops.llmloss.merge_shards
    for wrong in (said[:, :8], said[0], said.transpose(1, 2), said.bfloat16()):
        with pytest.raises(RuntimeError, match=r"ranks, 9, rows"):
            merge(wrong, target, -100, 9)
    for wrong in (target[:2], target.float(), target.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="expected 3 contiguous"):
            merge(said, wrong, -100, 9)


def test_a_target_elsewhere_is_nothing_but_missing(device):
    """The kernels' part of it: statistics and gradient of a row whose target is no column."""
    logits = torch.randn(3, 300, device=device)
    target = torch.tensor([-1, 5, -100], device=device)
    options = (None, None, 1.0, 0.0, -100, 300)
    stats = torch.ops.llmloss.token_stats(logits, target, *options, True, True, True, 900)
    known = torch.ops.llmloss.token_stats(
        logits, target.where(target != -1, 7), *options, True, True, True, 900
    )
    for i in (1, 2, 3, 4, 6):
        assert torch.equal(stats[i], known[i])
    ones = torch.ones(3, device=device)
    _, _, entropy, _, _, _, state = stats
    grad, _ = torch.ops.llmloss.token_stats_backward(
        ones, None, None, None, logits, target, *options, entropy, state, False, 900
    )
    p = logits.double().softmax(-1)
    assert_close(grad[0], -p[0], 1e-6)
    assert_close(grad[1], F.one_hot(target[1:2], 300)[0] - p[1], 1e-6)
    assert not grad[2].any()
    if logits.device.type == "cpu":  # -1 is no target unless the columns are said to be a shard's
        with pytest.raises(IndexError, match="Target -1"):
            torch.ops.llmloss.token_stats(logits, target, *options, True, True, True)
