"""DTensors whose classes are sharded, against the whole on one process."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

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


def placements_of_gradients(tensor):
    """Of each that backward will hand to a leaf.

    In ``grad``, torch 2.11 replicates one that is sharded unevenly on its last dimension.
    """
    found = []
    tensor.register_hook(lambda gradient: found.append(gradient.placements))
    return found


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
    of_gradients = placements_of_gradients(x)
    loss.sum().backward()
    assert of_gradients == [x.placements]
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
        ((leaf(hidden, mesh, Shard(1)), w), "only the classes and the tokens may be sharded"),
        ((h, leaf(weight, mesh, Shard(1))), "only the classes and the tokens may be sharded"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*arguments, target)
    with pytest.raises(ValueError, match="linear_bias must be sharded"):
        linear_cross_entropy(h, w, target, linear_bias=torch.zeros(CLASSES))


def test_hidden_states(ranks):
    ranks.run(rank_hidden_states)


B, S = 5, 6  # ranks with different numbers of sequences
ON_A_MESH = {
    "tokens": ((2,), [Shard(0)], [Replicate()]),
    "sequences": ((2,), [Shard(1)], [Replicate()]),
    "tensor and sequence parallelism": ((2,), [Shard(1)], [Shard(0)]),
    "data and tensor parallelism": ((2, 2), [Shard(0), Replicate()], [Replicate(), Shard(0)]),
    "all of it": ((2, 2), [Shard(0), Shard(1)], [Replicate(), Shard(0)]),
    "both dimensions of tokens": ((2, 2), [Shard(0), Shard(1)], [Replicate(), Replicate()]),
}


def problem():
    torch.manual_seed(1)
    hidden, weight, bias = torch.randn(B, S, D), torch.randn(CLASSES, D), torch.randn(CLASSES)
    target = torch.randint(0, CLASSES, (B, S))
    target[0] = -100
    target[1:, ::2] = -100
    return hidden, weight, bias, target, torch.rand(B, S)


def placed(tensor, mesh, placements, needs_gradient=True):
    return distribute_tensor(tensor, mesh, placements).detach().requires_grad_(needs_gradient)


def rank_mesh(rank, ranks, name, options):
    shape, of_hidden, of_weight = ON_A_MESH[name]
    mesh = init_device_mesh("cpu", shape)
    hidden, weight, bias, target, token_weight = problem()
    options = dict(options)
    weighs = options.pop("weighs")
    of_tokens = [p if p.is_shard() and not w.is_shard() else Replicate()
                 for p, w in zip(of_hidden, of_weight, strict=True)]  # fmt: skip
    if options.get("shift") and Shard(1) in of_tokens:
        return
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    plain = options | ({"token_weight": token_weight} if weighs else {})
    expected = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **plain)
    h, w, b = (
        placed(x, mesh, p)
        for x, p in zip((hidden, weight, bias), (of_hidden, of_weight, of_weight), strict=True)
    )
    y, c = (placed(x, mesh, of_tokens, False) for x in (target, token_weight))
    given = options | ({"token_weight": c} if weighs else {})
    loss = linear_cross_entropy(h, w, y, linear_bias=b, **given)
    assert_close(loss.full_tensor().detach(), expected.detach(), 1e-5)
    assert loss.shape == expected.shape
    expected.sum().backward()
    loss.sum().backward()
    assert h.grad.placements == h.placements
    for x, leaf_ in zip((h, w, b), leaves, strict=True):  # of the weight partial, as torch's are
        assert_close(x.grad.full_tensor(), leaf_.grad, 1e-5)
    # From logits, with the classes over what the weight's rows were over.
    logits = (leaves[0] @ leaves[1].t()).detach()
    exact = logits.clone().requires_grad_()
    of_logits = [Shard(2) if w.is_shard() else p for p, w in zip(of_hidden, of_weight, strict=True)]
    x = placed(logits, mesh, of_logits)
    if "shift" in options:
        return
    expected = cross_entropy(exact, target, class_dim=-1, **plain)
    loss = cross_entropy(x, y, class_dim=-1, **given)
    assert_close(loss.full_tensor().detach(), expected.detach(), 1e-5)
    expected.sum().backward()
    of_gradients = placements_of_gradients(x)
    loss.sum().backward()
    assert of_gradients == [x.placements]
    assert_close(x.grad.full_tensor(), exact.grad, 1e-5)
    if weighs:
        return
    stats, of_all = token_stats(x, y), token_stats(logits, target)
    assert stats.entropy.placements == tuple(of_tokens)
    assert_close(stats.entropy.full_tensor().detach(), of_all.entropy, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"weighs": False},
        {"weighs": True, "z_loss": 1e-2},
        {"weighs": True, "reduction": "none"},
        {"weighs": False, "reduction": "sum", "label_smoothing": 0.1},
        {"weighs": True, "num_items": 7},
        {"weighs": True, "shift": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ON_A_MESH)
def test_tokens(groups, name, options):
    shape = ON_A_MESH[name][0]
    groups[2 ** len(shape)].run(rank_mesh, name, options)


def rank_refusals(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    hidden, weight, _, target, _ = problem()
    h, w, y = (
        placed(x, mesh, [p], False)
        for x, p in ((hidden, Shard(1)), (weight, Replicate()), (target, Shard(1)))
    )
    for arguments, options, words in (
        ((h, w, target), {}, "target must be a DTensor of the same mesh"),
        ((h, weight, y), {}, "linear_weight must be a DTensor"),
        ((h, w, y), {"shift": 1}, "have to be shifted before"),
        (
            (h, w, y),
            {"weight": placed(torch.ones(CLASSES), mesh, [Replicate()], False)},
            "num_items",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*arguments, **options)
    # A mean over no token is one over none, on any number of ranks.
    none = torch.full_like(target, -100)
    assert linear_cross_entropy(h, w, placed(none, mesh, [Shard(1)], False)).full_tensor().isnan()


def test_refusals(two):
    two.run(rank_refusals)


def rank_outside(rank, ranks):
    """FSDP shards a weight, and averages its gradients: every rank has tokens of its own."""
    mesh = init_device_mesh("cpu", (ranks,))
    _, hidden, weight, _, target = whole()
    w = leaf(weight, mesh, Shard(0))
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    gathered = w.full_tensor(grad_placements=[Partial("avg")])
    linear_cross_entropy(hidden[mine], gathered, target[mine], reduction="sum").backward()
    exact = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, exact, target, reduction="sum").backward()
    assert_close(ranks * w.grad.full_tensor(), exact.grad, 1e-5)


def test_a_weight_outside_its_unit(two):
    two.run(rank_outside)
