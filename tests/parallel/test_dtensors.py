"""DTensors whose classes are sharded, against the whole on one process."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llmloss_ext import cross_entropy, linear_cross_entropy, token_stats

ROWS, CLASSES, D = 11, 37, 8  # ranks with different numbers of classes


def whole():
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,))
    target[::4] = -100
    logits, hidden = torch.randn(ROWS, CLASSES), torch.randn(ROWS, D)
    return logits, hidden, torch.randn(CLASSES, D), torch.rand(CLASSES) + 0.5, target


def leaf(tensor, mesh, placement):
    return distribute_tensor(tensor, mesh, [placement]).detach().requires_grad_()


def rank_logits(rank, ranks, placement, reduction):
    mesh = init_device_mesh("cpu", (ranks,))
    logits, _, _, weight, target = whole()
    exact = logits.clone().requires_grad_()
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "reduction": reduction}
    expected = cross_entropy(exact, target, weight=weight, **options)
    x = leaf(logits, mesh, placement)
    of_classes = Shard(0) if placement.is_shard() else Replicate()
    loss = cross_entropy(
        x, distribute_tensor(target, mesh, [Replicate()]),
        weight=distribute_tensor(weight, mesh, [of_classes]), **options,
    )  # fmt: skip
    assert isinstance(loss, DTensor)
    assert loss.placements == (Replicate(),)
    assert_close(loss.to_local().detach(), expected.detach(), 1e-5)
    expected.sum().backward()
    loss.sum().backward()
    assert x.grad.placements == x.placements
    assert_close(x.grad.full_tensor(), exact.grad, 1e-5)
    stats = token_stats(x, target, with_rank=True)
    plain = token_stats(logits, target, with_rank=True)
    for one, other in zip(stats, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one.to_local().detach(), other, 1e-5)


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits(ranks, placement, reduction):
    ranks.run(rank_logits, placement, reduction)


def rank_hidden_states(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    _, hidden, weight, _, target = whole()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = linear_cross_entropy(*leaves, target)
    expected.backward()
    h, w = leaf(hidden, mesh, Replicate()), leaf(weight, mesh, Shard(0))
    loss = linear_cross_entropy(h, w, target)
    loss.backward()
    assert_close(loss.to_local().detach(), expected.detach(), 1e-5)
    assert_close(h.grad.full_tensor(), leaves[0].grad, 1e-5)
    assert_close(w.grad.full_tensor(), leaves[1].grad, 1e-5)
    # What is not known to be tensor parallelism is refused, and said how it can be.
    for arguments, words in (
        ((hidden, w), "full_tensor"),
        ((leaf(hidden, mesh, Shard(0)), w), "only the classes may be sharded"),
        ((h, leaf(weight, mesh, Shard(1))), "only the classes may be sharded"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*arguments, target)
    with pytest.raises(ValueError, match="linear_bias must be sharded"):
        linear_cross_entropy(h, w, target, linear_bias=torch.zeros(CLASSES))


def test_hidden_states(ranks):
    ranks.run(rank_hidden_states)
