"""`operators` where each rank of a group holds some rows of the weight: see `llmloss_ext.shard`.

The ranks walk through the same chunks side by side, and say a few numbers per token to each other
in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmloss_ext import composite
from llmloss_ext.composite import LogitOptions, LossOptions
from llmloss_ext.linear.chunked import gradients_by_chunks, loss_by_chunks, stats_by_chunks
from llmloss_ext.linear.loop import Chunk
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
    """`operators.compute_loss`; with class weights, a mean needs ``num_items``."""
    options = LogitOptions(scale, softcap, ignore_index, vocab_size)
    loss_options = LossOptions(label_smoothing, z_loss, reduction)
    wanted = Wanted(mean_log_prob=label_smoothing != 0)

    def loss_of(
        chunk: Chunk, targets: Tensor, tokens: Tensor | None, divisor: Tensor
    ) -> tuple[Tensor, Tensor]:
        where = (chunk.logits, targets, weight, logit_scale, options)
        merged = shard.statistics(*where, wanted)
        w_y = shard.target_weights(targets, weight, ignore_index, merged.lse.dtype)
        with torch.set_grad_enabled(any(needs)):
            stats = tuple(s.requires_grad_(any(needs)) for s in merged[:4])
            rows = composite.weighted_losses(stats, w_y, tokens, loss_options)
            part = composite.total(rows) / divisor
        if not any(needs):
            return part, divisor.new_empty(0)
        grads = torch.autograd.grad(part, stats, allow_unused=True)
        entropy, state = merged.entropy.detach(), merged.state
        _, grad_scale = shard.gradient(grads, *where, entropy, state, needs[3], inplace=True)
        return part.detach(), grad_scale

    loss, grad_input, grad_weight, grad_bias, grad_scale, factor = loss_by_chunks(
        loss_of, input, linear_weight, target, linear_bias, weight, token_weight, num_items,
        logit_scale, ignore_index, reduction, chunk_tokens, drop_ignored, needs, weight_grad_dtype,
    )  # fmt: skip
    _sum_over_ranks(shard, needs, grad_input, grad_scale)
    return loss, grad_input, grad_weight, grad_bias, grad_scale, factor


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

    grad_input, grad_weight, grad_bias, grad_scale = gradients_by_chunks(
        gradient_of, grads, input, linear_weight, target, linear_bias, logit_scale,
        logit_options.ignore_index, entropy, states, chunk_tokens, drop_ignored, needs,
        weight_grad_dtype, accumulator,
    )  # fmt: skip
    _sum_over_ranks(shard, needs, grad_input, grad_scale)
    return grad_input, grad_weight, grad_bias, grad_scale


def _sum_over_ranks(
    shard: Shard, needs: list[bool], grad_input: Tensor, grad_scale: Tensor
) -> None:
    """Adds up what each rank knows a part of; a rank's rows of the weight are its own."""
    if needs[0] and shard.sum_input_grad:
        shard.sum_(grad_input)
    if needs[3]:
        shard.sum_(grad_scale)
