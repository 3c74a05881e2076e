"""The walks over the chunks: what becomes of each chunk's logits is the caller's to say.

`operators` says it with the kernels, `sharded` with what several ranks know of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmloss_ext import composite
from llmloss_ext.composite import real_of
from llmloss_ext.linear.loop import Chunk, Gradients, Projection, put, take
from llmloss_ext.shard import Shard

__all__ = [
    "ChunkOptions",
    "Inputs",
    "gradients_by_chunks",
    "loss_by_chunks",
    "stats_by_chunks",
    "total_items",
]


class ChunkOptions(NamedTuple):
    """How the tokens are walked through, and of which classes this process has the weight."""

    chunk_tokens: int
    drop_ignored: bool
    weight_grad_dtype: torch.dtype
    shard: Shard | None = None
    """None: of all."""


class Inputs(NamedTuple):
    """What may have a gradient."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    logit_scale: Tensor | None


def total_items(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """What the sum over the tokens is divided by, 0-d: 1 but for the mean (1)."""
    if reduction != 1:
        return torch.ones((), dtype=real_of(input), device=input.device)
    if num_items is None:
        num_items = composite.denominators(input, target, weight, token_weight, ignore_index).sum()
    return num_items.to(real_of(input)).reshape(())


def gradient_factor(input: Tensor, denominator: Tensor) -> Tensor:
    """What gradients of logits leave out, 0-d, so that float16 holds them.

    A power of two near 1 / denominator: they are then of the size of p and not of p / N, which is
    subnormal for many tokens. 1 for the other types.
    """
    if input.dtype != torch.float16:
        return torch.ones_like(denominator)
    return torch.exp2(-torch.floor(torch.log2(denominator.clamp_min(1.0))))


def gradient_dtype(input: Tensor, parameter: Tensor) -> torch.dtype:
    """In which `linear_loss` returns the gradient of a weight or a bias: the parameter's.

    But float16 cannot hold a sum over tokens from which `gradient_factor` was left out: such sums
    stay in float32 until backward has multiplied it in.
    """
    is_half = input.dtype == torch.float16 and parameter.dtype == torch.float16
    return real_of(input) if is_half else parameter.dtype


LossOfChunk = Callable[[Chunk, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""From a chunk, its targets, its token weights and the divisor to the loss, summed over the chunk
and divided, and the gradient of logit_scale (no elements unless asked for). Where any gradient is
asked for, the logits become theirs."""


def loss_by_chunks(
    loss_of: LossOfChunk,
    inputs: Inputs,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    ignore_index: int,
    reduction: int,
    chunks: ChunkOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators.compute_loss`, whatever the loss of a chunk."""
    input, linear_weight, linear_bias, logit_scale = inputs
    weight_grad_dtype = chunks.weight_grad_dtype
    real = real_of(input)
    projection = Projection(input, linear_weight, linear_bias)
    items = (weight, token_weight, num_items, ignore_index, reduction)
    denominator = total_items(input, target, *items)
    factor = gradient_factor(input, denominator)
    divisor = denominator * factor
    loss = torch.zeros((), dtype=torch.float64, device=input.device)
    grad_scale = torch.zeros_like(loss) if needs[3] else None
    if weight_grad_dtype == torch.float16:
        weight_grad_dtype = real  # see gradient_dtype
    gradients = Gradients(
        projection, (needs[0], needs[1], needs[2]), weight_grad_dtype,
        gradient_dtype(input, linear_weight),
    )  # fmt: skip
    for chunk in _walk(projection, target, ignore_index, chunks):
        tokens = None if token_weight is None else take(token_weight, chunk.rows)
        part, part_scale = loss_of(chunk, take(target, chunk.rows), tokens, divisor)
        loss += part
        if any(needs):
            gradients.add(chunk)
        if grad_scale is not None:
            grad_scale += part_scale
        del chunk  # its buffer, before the gradient of the weight is rounded
    if reduction == 1:
        loss += torch.zeros_like(denominator) / denominator  # nan: no token to divide by
    _sum_over_ranks(chunks.shard, gradients.hidden, grad_scale)
    return (
        (loss * factor).to(real),
        _or_empty(gradients.hidden, input),
        _or_empty(gradients.weight_result(), input),
        _or_empty(_summed_over_tokens(gradients.bias, linear_bias, input), input),
        _or_empty(_cast(grad_scale, logit_scale), input),
        factor,
    )


StatsOfChunk = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""From a chunk's logits and targets to log_prob, lse, entropy, mean_log_prob, argmax, rank, state.
"""


def stats_by_chunks(
    stats_of: StatsOfChunk,
    inputs: Inputs,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    wanted: Sequence[bool],
    chunks: ChunkOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators.compute_stats`, whatever the statistics of a chunk."""
    input, linear_weight, linear_bias, _ = inputs
    real, tokens = real_of(input), input.shape[0]

    def column(asked: bool, dtype: torch.dtype = real, fill: int = 0) -> Tensor:
        return torch.full((tokens if asked else 0,), fill, dtype=dtype, device=input.device)

    stats = [column(True), column(True), column(wanted[0]), column(wanted[1]),
             column(wanted[2], torch.int64, -1),
             column(wanted[2], torch.int64, vocab_size)]  # fmt: skip
    states = torch.zeros(tokens, 3, dtype=real, device=input.device)
    projection = Projection(input, linear_weight, linear_bias)
    for chunk in _walk(projection, target, ignore_index, chunks):
        *parts, state = stats_of(chunk.logits, take(target, chunk.rows))
        put(states, chunk.rows, state.t())
        for whole, part in zip(stats, parts, strict=True):
            if whole.numel():
                put(whole, chunk.rows, part)
    return (*stats, states)  # type: ignore[return-value]


GradientOfChunk = Callable[[tuple[Tensor | None, ...], Tensor, Tensor, Tensor, Tensor], Tensor]
"""From the gradients of a chunk's statistics, its logits, targets, entropy and state to that of
logit_scale (no elements unless asked for). The logits become their gradient."""


def gradients_by_chunks(
    gradient_of: GradientOfChunk,
    grads: tuple[Tensor | None, ...],
    inputs: Inputs,
    target: Tensor,
    ignore_index: int,
    entropy: Tensor,
    states: Tensor,
    chunks: ChunkOptions,
    needs: list[bool],
    accumulator: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`operators.stats_backward`, whatever the gradient of a chunk."""
    input, linear_weight, linear_bias, logit_scale = inputs
    projection = Projection(input, linear_weight, linear_bias)
    which = (needs[0], needs[1], needs[2])
    gradients = Gradients(
        projection, which, chunks.weight_grad_dtype, linear_weight.dtype, accumulator
    )
    grad_scale = torch.zeros((), dtype=torch.float64, device=input.device) if needs[3] else None
    for chunk in _walk(projection, target, ignore_index, chunks):
        rows = chunk.rows
        part_scale = gradient_of(
            tuple(None if grad is None else take(grad, rows) for grad in grads),
            chunk.logits, take(target, rows),
            take(entropy, rows) if entropy.numel() else entropy,
            take(states, rows).t().contiguous(),
        )  # fmt: skip
        gradients.add(chunk)
        if grad_scale is not None:
            grad_scale += part_scale
        del chunk
    _sum_over_ranks(chunks.shard, gradients.hidden, grad_scale)
    grad_weight = None
    if accumulator is None:
        grad_weight = gradients.weight_result()
    return (
        _or_empty(gradients.hidden, input),
        _or_empty(grad_weight, input),
        _or_empty(None if linear_bias is None else _cast(gradients.bias, linear_bias), input),
        _or_empty(_cast(grad_scale, logit_scale), input),
    )


def _sum_over_ranks(
    shard: Shard | None, grad_hidden: Tensor | None, grad_scale: Tensor | None
) -> None:
    """Adds up what each rank knows a part of; its rows of the weight are its own."""
    if shard is None:
        return
    if grad_hidden is not None and shard.sum_input_grad:
        shard.sum_(grad_hidden)
    if grad_scale is not None:
        shard.sum_(grad_scale)


def _walk(
    projection: Projection, target: Tensor, ignore_index: int, chunks: ChunkOptions
) -> Iterator[Chunk]:
    drops = chunks.drop_ignored and composite.is_indices(target)
    return projection.chunks(chunks.chunk_tokens, target != ignore_index if drops else None)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _summed_over_tokens(
    gradient: Tensor | None, parameter: Tensor | None, input: Tensor
) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.to(gradient_dtype(input, parameter))


def _cast(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.reshape(parameter.shape).to(parameter.dtype)
