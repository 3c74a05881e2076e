"""A vocabulary spread over ranks: a loss and the target's gradient as its p goes to 1."""

from __future__ import annotations

from typing import Any

import confident
import pytest
import torch
from helpers import FLOATS

from llmloss_ext import Shard, cross_entropy, linear_cross_entropy

EACH = 611
"""Columns of a rank."""


def rank_loss(
    rank: int, ranks: int, dtype: torch.dtype, option: str, reduction: str, **form: Any
) -> None:
    """The gradient of all columns, whose ranks have a part each."""
    columns = slice(rank * EACH, (rank + 1) * EACH)
    upstream = confident.UPSTREAM.get(dtype, 1.0)
    for probability in confident.PROBABILITIES:
        given = confident.row(probability, dtype, option, ranks * EACH)
        options = dict(given.options) | {"reduction": reduction}
        if "weight" in options:
            options["weight"] = options["weight"][columns]
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        if form.get("linear"):  # of one hidden number, 1
            hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
            leaf = given.logits[:, columns].T.contiguous().requires_grad_()
            loss = linear_cross_entropy(hidden, leaf, given.target, shard=Shard(), **options)
        else:
            leaf = given.logits[:, columns].clone().requires_grad_()
            inplace = form.get("inplace", False)
            logits = leaf * 1 if inplace else leaf
            loss = cross_entropy(logits, given.target, shard=Shard(), inplace=inplace, **options)
            step /= upstream
        loss.backward(torch.full_like(loss, upstream))
        grad = torch.zeros_like(given.logits)
        grad[:, columns] = leaf.grad.reshape(1, -1)
        if columns.start <= given.target < columns.stop:
            confident.check(given, loss, grad, upstream, step)
        else:
            wanted, _ = confident.exact(given)
            tolerance = confident.VALUE[dtype]
            torch.testing.assert_close(
                loss.detach().double().reshape(1), wanted, rtol=tolerance, atol=0
            )


@pytest.mark.parametrize("option", confident.OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy(ranks, dtype, option):
    ranks.run(rank_loss, dtype, option, "none")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", ["none", "all"])
def test_other_forms(two, dtype, option):
    two.run(rank_in_place, dtype, option)
    two.run(rank_from_hidden_states, dtype, option)


def rank_in_place(rank, ranks, dtype, option):
    rank_loss(rank, ranks, dtype, option, "sum", inplace=True)


def rank_from_hidden_states(rank, ranks, dtype, option):
    rank_loss(rank, ranks, dtype, option, "sum", linear=True)
    rank_loss(rank, ranks, dtype, option, "none", linear=True)
