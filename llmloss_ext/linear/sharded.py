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
from llmloss_ext.linear.chunked import gradients_by_chunks, loss_by_chunks, stats_by_chunks
from llmloss_ext.linear.loop import Chunk, take
from llmloss_ext.shard import Shard, Wanted

__all__ = ["compute_loss", "compute_stats", "stats_backward"]


def compute_loss(
    shard: Shard,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    chunk_tokens: int,
    drop_ignored: bool,
    needs: list[bool],
    weight_grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators.compute_loss`."""
    options = LogitOptions(scale, softcap, ignore_index, vocab_size)
    loss = LossOptions(label_smoothing, z_loss, reduction)
    wanted = Wanted(mean_log_prob=label_smoothing != 0)
    w_y = shard.target_weights(target, weight, ignore_index, real_of(input))
    # With the targets' weights, the tokens' are all that a row's loss is multiplied by.
    token_weight = torch.ones_like(w_y) if token_weight is None else token_weight.to(w_y.dtype)
    token_weight = torch.where(target != ignore_index, token_weight, 0.0)
    if reduction == 1 and num_items is None:
        num_items = (w_y * token_weight).sum()

    def loss_of(
        chunk: Chunk, targets: Tensor, tokens: Tensor | None, divisor: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert tokens is not None
        weights = take(w_y, chunk.rows)
        where = (chunk.logits, targets, weight, logit_scale, options)
        merged = shard.statistics(*where, wanted)
        rows = composite.weighted_losses(merged, weights, tokens, loss)
        part = composite.total(rows) / divisor
        if not any(needs):
            return part, divisor.new_empty(0)
        # csrc/core/loss.h: loss_upstream
        each = tokens / divisor
        grads = (
            (label_smoothing - 1.0) * weights * each,
            2.0 * z_loss * merged.lse * each if z_loss != 0 else None,
            None,
            -label_smoothing * each if label_smoothing != 0 else None,
        )
        state = (merged.entropy, merged.state)
        _, grad_scale = shard.gradient(grads, *where, *state, needs[3], inplace=True)
        return part, grad_scale

    return loss_by_chunks(
        loss_of, input, linear_weight, target, linear_bias, weight, token_weight, num_items,
        logit_scale, ignore_index, reduction, chunk_tokens, drop_ignored, needs, weight_grad_dtype,
        shard,
    )  # fmt: skip


def compute_stats(
    shard: Shard,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    wanted: list[bool],
    chunk_tokens: int,
    drop_ignored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators.compute_stats`; the states are the merged ones."""
    options = LogitOptions(scale, softcap, ignore_index, vocab_size)

    def stats_of(logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
        return shard.statistics(logits, targets, weight, logit_scale, options, Wanted(*wanted))

    return stats_by_chunks(
        stats_of, input, linear_weight, target, linear_bias, ignore_index, shard.vocab_size,
        wanted, chunk_tokens, drop_ignored,
    )  # fmt: skip


def stats_backward(
    shard: Shard,
    grads: tuple[Tensor | None, ...],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    logit_options: LogitOptions,
    entropy: Tensor,
    states: Tensor,
    chunk_tokens: int,
    drop_ignored: bool,
    needs: list[bool],
    weight_grad_dtype: torch.dtype,
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`operators.stats_backward`."""

    def gradient_of(
        grads: tuple[Tensor | None, ...], logits: Tensor, targets: Tensor, entropy: Tensor,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        where = (logits, targets, weight, logit_scale, logit_options)
        return shard.gradient(grads, *where, entropy, state, needs[3], inplace=True)[1]

    return gradients_by_chunks(
        gradient_of, grads, input, linear_weight, target, linear_bias, logit_scale,
        logit_options.ignore_index, entropy, states, chunk_tokens, drop_ignored, needs,
        weight_grad_dtype, accumulator, shard,
    )  # fmt: skip
