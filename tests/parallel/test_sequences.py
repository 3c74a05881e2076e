"""Losses of sequences over a vocabulary that is divided, against the whole in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from ranks import same_on_every_rank

from llmloss_ext import Shard, losses
from llmloss_ext.linear import planning
from llmloss_ext.linear.groups import Groups
from llmloss_ext.losses.from_hidden import HiddenOptions, PolicyTokens

from .problem import D, leaf

SEQUENCES, LENGTH, COLUMNS = 4, 5, 12
CHUNKS = {"all in one": {}, "whole": {"chunk_tokens": 10}, "cut": {"chunk_tokens": 3}}


def loss_of(name, hidden, weight, target, options):
    if name == "preference":
        return losses.linear_preference_loss(hidden, weight, target, **options).loss
    if name == "unpaired":
        good, kl = torch.tensor([1, 0, 1, 1]), torch.tensor(0.2)
        return losses.linear_unpaired_loss(
            hidden, weight, target, desirable=good, kl=kl, **options
        ).loss
    return losses.linear_policy_loss(
        hidden, weight, target, advantages=torch.tensor([1.0, -1.0, 0.5, 2.0]), beta=0.1,
        importance_sampling_level="sequence", old_log_probs=torch.full(target.shape, -3.0),
        **options,
    ).loss  # fmt: skip


def rank_loss(rank, ranks, name, chunks):
    torch.manual_seed(2)
    classes = ranks * COLUMNS
    hidden, reference = torch.randn(2, SEQUENCES, LENGTH, D)
    weight = torch.randn(classes, D) / 2
    target = torch.randint(0, classes, (SEQUENCES, LENGTH))
    target[1, 3:] = target[2, 0] = -100
    found = []
    for columns, dtype, how in (
        (slice(rank * COLUMNS, (rank + 1) * COLUMNS), torch.float32, {"shard": Shard()}),
        (slice(None), torch.float64, {}),
    ):
        leaves = leaf(hidden.to(dtype)), leaf(weight[columns].to(dtype))
        theirs = {
            "reference_input": reference.to(dtype), "reference_weight": leaves[1].detach(), **how,
        }  # fmt: skip
        loss = loss_of(name, *leaves, target, theirs | CHUNKS[chunks])
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (loss, of_hidden, of_weight), (exact, hidden_wanted, weight_wanted) = found
    same_on_every_rank(loss)
    same_on_every_rank(of_hidden)
    assert_close(loss, exact, 1e-5)
    assert_close(of_hidden, hidden_wanted, 1e-4)
    mine = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    assert_close(of_weight, weight_wanted[mine], 1e-4)
    assert hidden_wanted.any()


def rank_limit(rank, ranks, shares):
    """Whether a pair fits is decided by the same numbers on every rank, however much each has."""
    length = 20
    begin, columns = sum(shares[:rank]), shares[rank]
    hidden = torch.randn(2, length, D, requires_grad=True)
    weight = torch.randn(columns, D, requires_grad=True)
    target = torch.randint(0, sum(shares), (2, length))
    shard = Shard(vocab_start=begin)
    options = HiddenOptions.split({"shard": shard, "vocab_size": sum(shares)})[0]
    found = []
    for room in range(1024, 12_000, 512):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "_BYTES_BESIDE_SUMS", room)
            patch.setattr(planning, "_LEAST_TOKENS", {"cpu": 4, "cuda": 4})
            patch.setattr(planning, "_DEFAULT_BYTES", {"cpu": 64, "cuda": 64})
            policy = PolicyTokens(hidden, weight, target, options)
            pair = Groups(2, 1, length)
            found.append(policy.call.group_limit(pair, policy._walk, policy.chunks).tokens)
    assert len(set(found)) == 2
    same_on_every_rank(torch.tensor(found))


def test_shards_of_several_sizes_cut_alike(two):
    two.run(rank_limit, (40, 9))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", ["preference", "unpaired", "policy"])
def test_losses_of_sequences(two, name, chunks):
    two.run(rank_loss, name, chunks)
