"""`operators` where each rank of a group holds some rows of the weight: see `llmloss_ext.shard`.

The ranks walk through the same chunks side by side, and say a few numbers per token to each other
in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmloss_ext import composite
from llmloss_ext.composite import LogitOptions, LossOptions, real_of
from llmloss_ext.linear.chunked import (
    ChunkOptions,
    Inputs,
    gradients_by_chunks,
    loss_by_chunks,
    stats_by_chunks,
)
from llmloss_ext.linear.loop import Chunk, take
from llmloss_ext.shard import Shard, Wanted

__all__ = ["compute_loss", "compute_stats", "stats_backward"]


def compute_loss(
    shard: Shard,
    inputs: Inputs,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    options: LogitOptions,
    loss: LossOptions,
    chunks: ChunkOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators.compute_loss`."""
    ignore_index, real = options.ignore_index, real_of(inputs.input)
    wanted = Wanted(mean_log_prob=loss.label_smoothing != 0)
    w_y = shard.target_weights(target, weight, ignore_index, real)
    given = torch.ones_like(w_y) if token_weight is None else token_weight
    token_weight = composite.weight_tokens(given, target, ignore_index, real)
    if loss.reduction == 1 and num_items is None:
        num_items = (w_y * token_weight).sum()

    def loss_of(
        chunk: Chunk, targets: Tensor, tokens: Tensor | None, divisor: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert tokens is not None  # token_weight is none
        weights = take(w_y, chunk.rows)
        where = (chunk.logits, targets, weight, inputs.logit_scale, options)
        merged = shard.statistics(*where, wanted)
        part = composite.total(composite.weighted_losses(merged, weights, tokens, loss)) / divisor
        if not any(needs):
            return part, divisor.new_empty(0)
        grads = composite.loss_gradients(merged, weights, tokens / divisor, loss)
        state = (merged.entropy, merged.state)
        _, grad_scale = shard.gradient(grads, *where, *state, needs[3], inplace=True)
        return part, grad_scale

    return loss_by_chunks(
        loss_of, inputs, target, weight, token_weight, num_items, ignore_index, loss.reduction,
        chunks, needs,
    )  # fmt: skip


def compute_stats(
    shard: Shard,
    inputs: Inputs,
    target: Tensor,
    weight: Tensor | None,
    options: LogitOptions,
    wanted: tuple[bool, bool, bool],
    chunks: ChunkOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators.compute_stats`; the states are the merged ones."""

    def stats_of(logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
        scale = inputs.logit_scale
        return shard.statistics(logits, targets, weight, scale, options, Wanted(*wanted))

    return stats_by_chunks(
        stats_of, inputs, target, options.ignore_index, shard.vocab_size, wanted, chunks
    )


def stats_backward(
    shard: Shard,
    grads: tuple[Tensor | None, ...],
    inputs: Inputs,
    target: Tensor,
    weight: Tensor | None,
    options: LogitOptions,
    entropy: Tensor,
    states: Tensor,
    chunks: ChunkOptions,
    needs: list[bool],
    accumulator: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`operators.stats_backward`."""

    def gradient_of(
        grads: tuple[Tensor | None, ...], logits: Tensor, targets: Tensor, entropy: Tensor,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        where = (logits, targets, weight, inputs.logit_scale, options)
        return shard.gradient(grads, *where, entropy, state, needs[3], inplace=True)[1]

    return gradients_by_chunks(
        gradient_of, grads, inputs, target, options.ignore_index, entropy, states, chunks, needs,
        accumulator,
    )  # fmt: skip
