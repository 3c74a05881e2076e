"""The walks over the chunks: project, run the kernels over the chunk's rows, add up the gradients.

The kernels are `llmloss_ext.ops.rows.LocalRows`, or `llmloss_ext.shard.ShardedRows` where each rank
has the weight of some classes; the ranks then walk through the same chunks side by side. Results
that are not asked for come back without elements. Nothing here has derivatives; `operators` has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..composite import real_of
from ..ops.library import MEAN_DENOMINATOR, STATE
from ..ops.rows import LocalRows, put, take
from ..options import MEAN, ChunkOptions, LogitOptions, LossOptions
from ..shard import ShardedRows
from ..statistics import STATISTICS, FloatStats, RowStats, is_asked
from .projection import Gradients, Projection

_MOST_TOKENS = 2.0**40
"""A denominator of 0 items is infinite."""


class Inputs(NamedTuple):
    """What may have a gradient, or one thing for each of them, such as its gradient."""

    input: Any = None
    """(N, D), in the dtype of the products."""
    linear_weight: Any = None
    linear_bias: Any = None
    logit_scale: Any = None


class Targets(NamedTuple):
    """What has none."""

    target: Any = None
    """(N) class indices, or (N, V) probabilities."""
    weight: Any = None
    token_weight: Any = None
    """(N)."""
    num_items: Any = None


class LossResults(NamedTuple):
    """A loss, its gradients, and the factor (0-d) that is still to be multiplied into them.

    The factor is 1 except for float16, whose gradients are kept away from its subnormal numbers
    (and the weight's and bias's in float32).
    """

    loss: Any
    grad_input: Tensor
    grad_linear_weight: Tensor
    grad_linear_bias: Tensor
    grad_logit_scale: Tensor
    factor: Tensor

    @property
    def gradients(self) -> Inputs:
        """By the name of the input."""
        return Inputs(*(getattr(self, f"grad_{name}") for name in Inputs._fields))


def rows_of(
    inputs: Inputs, targets: Targets, logits: LogitOptions, chunks: ChunkOptions
) -> LocalRows | ShardedRows:
    """The kernels over the rows of a chunk."""
    if chunks.shard is None:
        return LocalRows(targets.weight, inputs.logit_scale, logits)
    return ShardedRows(chunks.shard, targets.weight, inputs.logit_scale, logits)


def gradient_factor(input: Tensor, denominator: Tensor) -> Tensor:
    """What gradients of logits leave out, 0-d, so that float16 holds them.

    A power of two near 1 / denominator: they are then of the size of p and not of p / N, which is
    subnormal for many tokens. 1 for the other types.
    """
    if input.dtype != torch.float16:
        return torch.ones_like(denominator)
    return torch.exp2(-torch.floor(torch.log2(denominator.clamp(1.0, _MOST_TOKENS))))


def gradient_dtype(input: Tensor, parameter: Tensor) -> torch.dtype:
    """In which `loss_by_chunks` returns the gradient of a weight or a bias: the parameter's.

    But float16 cannot hold a sum over tokens from which `gradient_factor` was left out: such sums
    stay in float32 until backward has multiplied it in.
    """
    is_half = input.dtype == torch.float16 and parameter.dtype == torch.float16
    return real_of(input) if is_half else parameter.dtype


def loss_by_chunks(
    inputs: Inputs,
    targets: Targets,
    logits: LogitOptions,
    loss: LossOptions,
    chunks: ChunkOptions,
    needs: Inputs,
) -> LossResults:
    """The mean or sum over the tokens, with the gradients that ``needs`` names."""
    input = inputs.input
    real = real_of(input)
    rows = rows_of(inputs, targets, logits, chunks)
    labels = rows.labels(input, targets.target, targets.token_weight)
    projection = _projection(inputs, logits, chunks)
    denominator = torch.ones(len(MEAN_DENOMINATOR), dtype=real, device=input.device)
    if loss.reduction == MEAN and targets.num_items is not None:
        denominator = composite.items_denominator(targets.num_items, real)
    elif loss.reduction == MEAN:
        denominator = rows.denominator(labels, loss, real)
    items, z_factor = denominator
    factor = gradient_factor(input, items)
    # Each chunk's sum is divided, in the kernels' words a mean over so many items.
    divisor, of_chunk = torch.stack([items * factor, z_factor]), loss._replace(reduction=MEAN)
    value = torch.zeros((), dtype=torch.float64, device=input.device)
    grad_scale = torch.zeros_like(value) if needs.logit_scale else None
    # float16: see gradient_dtype
    sums = real if chunks.weight_grad_dtype == torch.float16 else chunks.weight_grad_dtype
    gradients = Gradients(
        projection, needs.input, needs.linear_weight, needs.linear_bias, sums,
        gradient_dtype(input, inputs.linear_weight),
    )  # fmt: skip
    counts = takes_part(targets, logits.ignore_index)
    for chunk in projection.chunks(chunks.limit, counts, drop=chunks.drop_ignored):
        part = labels.take(chunk.rows)
        if any(needs):
            of_part, scale = rows.losses_and_gradient_(
                chunk.logits, part, divisor, of_chunk, bool(needs.logit_scale)
            )
            gradients.add(chunk)
            if grad_scale is not None:
                grad_scale += scale
        else:
            of_part = rows.losses(chunk.logits, part, divisor, of_chunk)
        value += of_part
        del chunk  # its buffer, before the gradient of the weight is rounded
    if loss.reduction == MEAN:
        value += torch.zeros_like(items) / items  # nan: no token to divide by
    rows.sum_over_ranks(gradients.hidden, grad_scale)
    grad_bias = gradients.bias
    if grad_bias is not None:
        grad_bias = grad_bias.to(gradient_dtype(input, inputs.linear_bias))
    return LossResults(
        loss=(value * factor).to(real),
        grad_input=or_empty(gradients.hidden, input),
        grad_linear_weight=or_empty(gradients.weight_result(), input),
        grad_linear_bias=or_empty(grad_bias, input),
        grad_logit_scale=or_empty(_like(grad_scale, inputs.logit_scale), input),
        factor=factor,
    )


def stats_by_chunks(
    inputs: Inputs, targets: Targets, logits: LogitOptions, wanted: int, chunks: ChunkOptions
) -> RowStats:
    """The statistics of the tokens, and the state that backward needs."""
    input, tokens = inputs.input, inputs.input.shape[0]
    real = real_of(input)
    rows = rows_of(inputs, targets, logits, chunks)
    classes = logits.vocab_size if chunks.shard is None else chunks.shard.vocab_size
    absent = {"argmax": -1, "rank": classes}  # of tokens that are left out

    def column(name: str) -> Tensor:
        dtype = real if name in FloatStats._fields else torch.int64
        shape = (tokens if is_asked(wanted, name) else 0,)
        return torch.full(shape, absent.get(name, 0), dtype=dtype, device=input.device)

    # The state lies token by token, so that a chunk's is one piece.
    state = torch.zeros(tokens, len(STATE), dtype=real, device=input.device)
    wholes = [column(name) for name in STATISTICS]
    projection = _projection(inputs, logits, chunks)
    counts = takes_part(targets, logits.ignore_index)
    for chunk in projection.chunks(chunks.limit, counts, drop=chunks.drop_ignored):
        stats = rows.statistics(chunk.logits, take(targets.target, chunk.rows), wanted)
        state_of_chunk, *parts = stats.results()
        put(state, chunk.rows, state_of_chunk.t())
        for whole, part in zip(wholes, parts, strict=True):
            if whole.numel():
                put(whole, chunk.rows, part)
    return RowStats.of((state, *wholes))


def gradients_by_chunks(
    grads: FloatStats,
    inputs: Inputs,
    targets: Targets,
    logits: LogitOptions,
    stats: list[Tensor],
    state: Tensor,
    chunks: ChunkOptions,
    needs: Inputs,
    accumulator: Tensor | None = None,
) -> Inputs:
    """The gradients from those of the statistics, (N) each or None.

    ``stats`` and ``state`` are what `stats_by_chunks` returned. The weight's gradient is added to
    ``accumulator`` if there is one.
    """
    input = inputs.input
    rows = rows_of(inputs, targets, logits, chunks)
    projection = _projection(inputs, logits, chunks)
    gradients = Gradients(
        projection, needs.input, needs.linear_weight, needs.linear_bias, chunks.weight_grad_dtype,
        inputs.linear_weight.dtype, accumulator,
    )  # fmt: skip
    grad_scale = None
    if needs.logit_scale:
        grad_scale = torch.zeros((), dtype=torch.float64, device=input.device)
    counts = with_gradient(grads, targets, logits.ignore_index)
    for chunk in projection.chunks(chunks.limit, counts, drop=chunks.drop_ignored):
        at = chunk.rows
        _, scale = rows.gradient(
            FloatStats(*(None if grad is None else take(grad, at) for grad in grads)),
            chunk.logits, take(targets.target, at),
            [take(x, at) if x.numel() else x for x in stats],
            take(state, at).t().contiguous(), bool(needs.logit_scale), inplace=True,
        )  # fmt: skip
        gradients.add(chunk)
        if grad_scale is not None:
            grad_scale += scale
        del chunk
    rows.sum_over_ranks(gradients.hidden, grad_scale)
    return Inputs(
        input=or_empty(gradients.hidden, input),
        linear_weight=or_empty(gradients.weight_result() if accumulator is None else None, input),
        linear_bias=or_empty(_like(gradients.bias, inputs.linear_bias), input),
        logit_scale=or_empty(_like(grad_scale, inputs.logit_scale), input),
    )


def takes_part(targets: Targets, ignore_index: int) -> Tensor | None:
    """(N) bool: which tokens take part; None: all."""
    if composite.is_indices(targets.target):
        return targets.target != ignore_index
    weight = targets.token_weight
    return None if weight is None or weight.requires_grad else weight != 0


def with_gradient(grads: Sequence[Tensor | None], targets: Targets, ignore_index: int) -> Tensor:
    """(N) bool: which tokens take part, and have a gradient of a statistic that is not 0."""
    has_gradient = torch.stack([grad != 0 for grad in grads if grad is not None]).any(0)
    counts = takes_part(targets, ignore_index)
    return has_gradient if counts is None else has_gradient & counts


def _projection(inputs: Inputs, logits: LogitOptions, chunks: ChunkOptions) -> Projection:
    used = logits.vocab_size if chunks.shard is None else chunks.shard.used
    return Projection(
        inputs.input, inputs.linear_weight, inputs.linear_bias, used,
        has_float32_logits=chunks.has_float32_logits,
    )  # fmt: skip


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor; one without elements for None."""
    return like.new_empty(0) if tensor is None else tensor


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.reshape(parameter.shape).to(parameter.dtype)
