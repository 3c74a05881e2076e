"""Over ranks, too, what takes no part cannot spoil what does: nan against zeros, by bits."""

from __future__ import annotations

import math

import pytest
import torch

from llmloss_ext import parallel

from .problem import COLUMNS, ROWS, Problem, leaf

ABSENT = torch.arange(ROWS) % 3 == 0
PADDED = 5  # classes at the end: the last rank has them
GARBAGE = (math.nan, math.inf, -math.inf)


def found(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(clean, dirty, columns):
    for one, other in zip(clean, dirty, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    assert (dirty[1][ABSENT] == 0).all()
    assert (dirty[-1][columns] == 0).all()


def rank_no_part(rank, ranks, way, reduction, drop):
    p = Problem(rank, ranks, torch.float32)
    classes = p.classes - PADDED
    target = p.target.clamp(0, classes - 1)
    weights = torch.where(ABSENT, 0.0, torch.rand(ROWS) + 0.5)
    options = {"vocab_size": classes, "reduction": reduction}
    if way == "ignored":
        target = torch.where(ABSENT, -100, target)
    else:
        target, options["token_weight"] = torch.where(ABSENT, 10**6, target), weights
    padding = torch.arange(rank * COLUMNS, (rank + 1) * COLUMNS) >= classes
    results = {"dense": [], "in place": [], "linear": []}
    for value in (0.0, *GARBAGE):
        logits, hidden = p.logits[:, p.columns].clone(), p.hidden.clone()
        weight = p.weight[p.columns].clone()
        logits[ABSENT] = hidden[ABSENT] = value
        logits[:, padding] = value
        weight[padding] = value
        for name in ("dense", "in place"):
            x = leaf(logits)
            given = x * 1 if name == "in place" else x
            loss = parallel.cross_entropy(given, target, inplace=name == "in place", **options)
            results[name].append(found(loss.sum(), given))
        h, w = leaf(hidden), leaf(weight)
        loss = parallel.linear_cross_entropy(
            h, w, target, drop_ignored=drop, chunk_tokens=4, **options
        )
        results["linear"].append(found(loss.sum(), h, w))
    for name, (clean, *dirty) in results.items():
        for other in dirty:
            columns = padding if name == "linear" else (slice(None), padding)
            check(clean, other, columns)


@pytest.mark.parametrize("way", ["ignored", "weight 0"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("drop", [False, True])
def test_no_part(ranks, way, reduction, drop):
    ranks.run(rank_no_part, way, reduction, drop)


def rank_0_items(_rank, _ranks, as_tensor):
    p = Problem(_rank, _ranks, torch.float32)
    ignored = torch.full_like(p.target, -100)
    items = torch.tensor(0) if as_tensor else 0
    x, h, w = leaf(p.logits[:, p.columns]), leaf(p.hidden), leaf(p.weight[p.columns])
    for loss, leaves in (
        (parallel.cross_entropy(x, ignored, num_items=items), (x,)),
        (parallel.linear_cross_entropy(h, w, ignored, num_items=items), (h, w)),
    ):
        value, *grads = found(loss, *leaves)
        assert value == 0
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_0_items(two, as_tensor):
    two.run(rank_0_items, as_tensor)


def rank_packed(rank, ranks):
    """Documents and padding are those of the labels, whatever the ranks."""
    p = Problem(rank, ranks, torch.float32)
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5])
    mask = torch.arange(ROWS) > 0
    h, w = p.hidden.unsqueeze(0), p.weight[p.columns]
    options = {"position_ids": positions, "attention_mask": mask.unsqueeze(0), "shift": 1}
    loss = parallel.linear_cross_entropy(h, w, p.target.clamp_min(0).unsqueeze(0), **options)
    targets = torch.where(
        torch.tensor([False, False, True] + [True] * 8), p.target.clamp_min(0), -100
    )
    targets[[3, 5]] = -100
    exact = torch.nn.functional.cross_entropy(
        p.hidden[:-1].double() @ p.weight.double().t(), targets[1:]
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_packed_documents(two):
    two.run(rank_packed)
