"""Vocabulary-parallel losses: each rank of a process group holds some of the vocabulary's columns.

Functions of `llmloss_ext` with a ``group``: tensor parallelism's output layer leaves each rank the
logits, or the weight, of its own classes, and no rank ever sees the others'. Every rank is given
the same hidden states and targets, and returns the same loss. Per token, the ranks tell each other
nine numbers in the forward pass (once more for class weights, twice for ``with_rank``); where the
gradients of hidden states and of ``logit_scale`` are formed they are summed. At most 2^24 classes.

By default the ranks' columns follow each other, equally many on each: rank r holds the classes from
r * columns on. A vocabulary that is padded to a multiple of the ranks is told by ``vocab_size``;
other divisions also by ``vocab_start``.

All ranks have to make the same calls; one that raises leaves the others waiting for their group's
timeout. First-order gradients only: no ``create_graph``, no `torch.func`. Under `torch.compile` the
calls are left out of the graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from llmloss_ext import composite, ops
from llmloss_ext import functional as dense
from llmloss_ext.composite import LogitOptions, LossOptions
from llmloss_ext.functional import TokenStats
from llmloss_ext.linear import autograd
from llmloss_ext.linear.call import LinearCall
from llmloss_ext.shard import Shard, Wanted, refuse_second_order

__all__ = [
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_token_stats",
    "token_stats",
]

F = TypeVar("F", bound=Callable[..., Any])


def _left_out_of_graphs(function: F) -> F:
    """Run eagerly by torch.compile: which rank has what is not known to its graphs."""
    disabled: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


@_left_out_of_graphs
def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """`llmloss_ext.cross_entropy` of logits whose columns are spread over the ranks of a group.

    Label smoothing is over the whole vocabulary, padding left out.

    Args:
        input: This rank's logits (N, columns) or (..., columns): classes are last.
        target: Classes of the whole vocabulary, (N) or (...), the same on every rank.
        group: The process group; None: the default one.
        vocab_start: The class of this rank's first column; by default rank * columns.
        vocab_size: Classes of all ranks, by default all columns; columns beyond are padding.
        weight: Class weights (columns) of this rank's columns.
        ignore_index: As in `llmloss_ext.cross_entropy`, and so the other options.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        softcap: If given, x = softcap * tanh(logit_scale * input / softcap).
        logit_scale: Factor of the logits; a 0-d tensor, the same on every rank, gets its gradient.
        token_weight: A weight for each token.
        num_items: Replaces the denominator of the mean.
        inplace: Backward writes the gradient over the logits.

    Returns:
        The loss, the same on every rank: 0-d, or of the target's shape for ``reduction="none"``.

    Raises:
        ValueError: Shapes that do not fit, an option out of range, or, on a CPU, columns that do
            not cover the vocabulary once. (On CUDA such tokens' losses are nan.)
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, that
            token's loss is nan instead).
        RuntimeError: A wrong dtype or device; there is no process group; a derivative that there
            is not; or probability targets.

    Example:
        >>> logits = column_parallel_head(hidden)  # (B, S, V / ranks)
        >>> loss = parallel.cross_entropy(logits, labels, group=tensor_parallel_group)
    """
    loss = dense.loss_options(label_smoothing, z_loss, reduction)
    call, shard = _call(
        input, target, group, vocab_start, vocab_size, weight, ignore_index, softcap, logit_scale
    )
    targets = call.targets.reshape(-1)
    if num_items is not None:
        num_items = dense.items_tensor(num_items, reduction, input)
    if token_weight is not None:
        token_weight = dense.check_token_weight(token_weight, call.shape, input).reshape(-1)
    if inplace:
        call.check_inplace(input)
    wanted = Wanted(mean_log_prob=label_smoothing != 0)
    stats = _stats(call, weight, wanted, shard, inplace)
    ignored = call.options.ignore_index
    return _loss_of_rows(
        stats, targets, weight, token_weight, num_items, ignored, loss, shard, call.shape
    )


@_left_out_of_graphs
def token_stats(
    input: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    with_rank: bool = False,
) -> TokenStats:
    """`llmloss_ext.token_stats` of logits whose columns are spread over the ranks of a group.

    ``with_rank`` reads the logits a second time: how many are above the target's is known only when
    the rank that holds the target has said its logit. (A softcap keeps their order, so they are
    compared without it, also where it has made them equal.)

    Args, errors: as in `cross_entropy`.

    Returns:
        A `TokenStats`, each shaped like the target, the same on every rank.
    """
    call, shard = _call(
        input, target, group, vocab_start, vocab_size, weight, ignore_index, softcap, logit_scale
    )
    stats = _stats(call, weight, Wanted(True, True, with_rank), shard, inplace=False)
    return dense.as_token_stats(stats, call.shape, with_rank)


@_left_out_of_graphs
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> Tensor:
    """`llmloss_ext.linear_cross_entropy` with the rows of the weight spread over a group's ranks.

    Each rank projects onto its own classes, a chunk of tokens at a time; the ranks walk through the
    chunks side by side. Three products with a mean or a sum, else four.

    Args:
        input: Hidden states (..., D), the same on every rank.
        linear_weight: This rank's rows (columns, D) of the projection.
        target: Classes of the whole vocabulary (...), the same on every rank.
        group: The process group; None: the default one.
        vocab_start: The class of this rank's first row; by default rank * rows.
        vocab_size: Classes of all ranks; rows beyond are padding, and their gradient is zero.
        sum_input_grad: Whether ``input`` gets its whole gradient, summed over the ranks. With
            False it gets this rank's part, for a layer below that sums or scatters it itself (as
            sequence parallelism does).
        linear_bias: (columns), of this rank's rows.
        weight: Class weights (columns), of this rank's rows.
        reduction: As in `llmloss_ext.linear_cross_entropy`, and so all that follows.
        ignore_index: None: -100.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        softcap: If given, x = softcap * tanh(logit_scale * logits / softcap).
        logit_scale: Factor of the logits; a 0-d tensor gets its gradient.
        token_weight: A weight for each token.
        num_items: Replaces the denominator of the mean.
        shift: The hidden state at position i predicts ``target[..., i + shift]``.
        chunk_tokens: Tokens of a chunk at most, the same on every rank.
        max_chunk_bytes: The most that the logits of a chunk may take, on a rank that has its equal
            part of the vocabulary.
        drop_ignored: Whether ignored tokens are left out of the products.
        weight_grad_dtype: In which the weight's gradient is accumulated.
        weight_grad_accumulator: To which the gradient of this rank's rows is added instead.

    Returns:
        The loss, the same on every rank: 0-d, or of the target's shape for ``reduction="none"``.

    Raises:
        ValueError, IndexError, RuntimeError: As `cross_entropy`.
    """
    loss = dense.loss_options(label_smoothing, z_loss, reduction)
    call, shard = _linear_call(
        input, linear_weight, target, linear_bias, weight, ignore_index, softcap, logit_scale,
        shift, group, vocab_start, vocab_size, sum_input_grad,
    )  # fmt: skip
    if num_items is not None:
        num_items = dense.items_tensor(num_items, reduction, input)
    if token_weight is not None:
        token_weight = call.token_weights(token_weight, input)
    chunks = call.chunk_options(
        chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype, weight_grad_accumulator,
        shard,
    )  # fmt: skip
    if call.is_row_by_row(reduction, weight_grad_accumulator, token_weight):
        wanted = (False, label_smoothing != 0, False)
        stats = call.stats(wanted, chunks, weight_grad_accumulator)
        ignored = call.options.ignore_index
        return _loss_of_rows(
            stats, call.targets, weight, token_weight, num_items, ignored, loss, shard, call.shape
        )
    return autograd.loss(
        call.hidden, linear_weight, linear_bias, call.scale, call.targets, weight, token_weight,
        num_items, call.options, loss, chunks,
    )  # fmt: skip


@_left_out_of_graphs
def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    with_rank: bool = False,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> TokenStats:
    """`llmloss_ext.linear_token_stats` with the weight's rows spread over the ranks of a group.

    Args, errors: as in `linear_cross_entropy`.

    Returns:
        A `TokenStats`, each shaped like the target, the same on every rank.
    """
    call, shard = _linear_call(
        input, linear_weight, target, linear_bias, weight, ignore_index, softcap, logit_scale,
        shift, group, vocab_start, vocab_size, sum_input_grad,
    )  # fmt: skip
    chunks = call.chunk_options(
        chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype, shard=shard
    )
    stats = call.stats((True, True, with_rank), chunks)
    return dense.as_token_stats(stats, call.shape, with_rank)


@_left_out_of_graphs
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """`llmloss_ext.linear_log_probs` with the weight's rows spread over the ranks of a group.

    `linear_token_stats`'s ``log_prob`` without the cost of the other statistics: for preference and
    policy losses. Args, errors: as in `linear_cross_entropy`.
    """
    call, shard = _linear_call(
        input, linear_weight, target, linear_bias, None, ignore_index, softcap, logit_scale,
        shift, group, vocab_start, vocab_size, sum_input_grad,
    )  # fmt: skip
    chunks = call.chunk_options(
        chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype, shard=shard
    )
    return call.stats((False, False, False), chunks)[0].reshape(call.shape)


def _shard(
    columns: int,
    target: Tensor,
    group: Any,
    vocab_start: int | None,
    vocab_size: int | None,
    sum_input_grad: bool = True,
) -> Shard:
    """Where this rank's columns lie; raises what can be raised before shapes are looked at."""
    if target.is_floating_point():
        raise RuntimeError(
            "vocabulary-parallel losses take class indices (int64 or int32), not probabilities"
        )
    if ops.in_transform():
        raise RuntimeError("vocabulary-parallel losses do not work under torch.func transforms")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "vocabulary-parallel losses need torch.distributed: call "
            "torch.distributed.init_process_group first"
        )
    if columns < 1:
        raise ValueError("each rank needs at least one column, if only of padding")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise RuntimeError("this process is not in the group")
    if vocab_start is None:
        start, most = rank * columns, ranks * columns
        size = most if vocab_size is None else dense.as_integer("vocab_size", vocab_size)
        if not 1 <= size <= most:
            raise ValueError(
                f"vocab_size must be in [1, {most}], the columns of {ranks} ranks, got {size}"
            )
    elif vocab_size is None:
        raise ValueError("vocab_start needs vocab_size: the ranks' columns may differ")
    else:
        start = dense.as_integer("vocab_start", vocab_start)
        size = dense.as_integer("vocab_size", vocab_size)
        if start < 0 or size < 1:
            raise ValueError(
                f"expected vocab_start >= 0 and vocab_size >= 1, got {start} and {size}"
            )
    return Shard(group, ranks, start, columns, size, sum_input_grad)


def _check_target(target: Tensor, ignore_index: int, shard: Shard, shift: int = 0) -> None:
    if target.dtype == torch.int32:
        target = target.long()  # ignore_index may be no int32
    if target.device.type == "cpu" or os.environ.get("LLMLOSS_CHECK_TARGETS") == "1":
        dense.check_range(target, ignore_index, shard.vocab_size, shift)


def _call(
    input: Tensor,
    target: Tensor,
    group: Any,
    vocab_start: int | None,
    vocab_size: int | None,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float | Tensor,
) -> tuple[dense._Call, Shard]:
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension: the classes")
    shard = _shard(input.shape[-1], target, group, vocab_start, vocab_size)
    call = dense._Call(
        input, target, weight, softcap, logit_scale, None, ignore_index, classes_last=True
    )
    _check_target(target, call.options.ignore_index, shard)
    return call, shard


def _linear_call(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float | Tensor,
    shift: int,
    group: Any,
    vocab_start: int | None,
    vocab_size: int | None,
    sum_input_grad: bool,
) -> tuple[LinearCall, Shard]:
    shard = _shard(linear_weight.shape[0], target, group, vocab_start, vocab_size, sum_input_grad)
    call = LinearCall(
        input, linear_weight, target, linear_bias, weight, ignore_index, softcap, logit_scale,
        None, shift,
    )  # fmt: skip
    _check_target(target, call.options.ignore_index, shard, call.shift)
    return call, shard


class _Stats(Function):
    """log_prob, lse, entropy, mean_log_prob, argmax and rank of rows of logits, (N) each."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        logit_scale: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        options: LogitOptions,
        wanted: Wanted,
        shard: Shard,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        merged = shard.statistics(logits, target, weight, logit_scale, options, wanted)
        ctx.mark_non_differentiable(merged.argmax, merged.rank)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.shard, ctx.inplace, ctx.spent = options, shard, inplace, False
        kept = logits.detach() if inplace else logits  # the same memory and version counter
        ctx.save_for_backward(kept, logit_scale, target, weight, merged.entropy, merged.state)
        return merged[:6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grads[:4]
        if all(grad is None for grad in grads):
            return (None,) * 8
        if ops._needs_differentiable_backward():
            refuse_second_order(ctx.shard)
        if ctx.spent:
            raise RuntimeError(
                "parallel.cross_entropy(inplace=True): backward a second time, but the gradient "
                "lies over the logits. Use inplace=False with retain_graph=True."
            )
        logits, logit_scale, target, weight, entropy, state = ctx.saved_tensors
        ctx.spent = ctx.inplace
        gradient, grad_scale = ctx.shard.gradient(
            grads, logits, target, weight, logit_scale, ctx.options, entropy, state,
            ctx.needs_input_grad[1], ctx.inplace,
        )  # fmt: skip
        if ctx.inplace:
            ops._mark_written(logits)
        scale = None
        if ctx.needs_input_grad[1]:
            scale = ops._like(ctx.shard.sum_(grad_scale), logit_scale)
        return (gradient, scale, *(None,) * 6)


def _stats(
    call: dense._Call, weight: Tensor | None, wanted: Wanted, shard: Shard, inplace: bool
) -> tuple[Tensor, ...]:
    stats: tuple[Tensor, ...] = _Stats.apply(  # type: ignore[no-untyped-call]
        call.rows, call.scale, call.targets, weight, call.options, wanted, shard, inplace
    )
    return stats


def _loss_of_rows(
    stats: tuple[Tensor, ...],
    targets: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    ignore_index: int,
    loss: LossOptions,
    shard: Shard,
    shape: torch.Size,
) -> Tensor:
    w_y = shard.target_weights(targets, weight, ignore_index, stats[1].dtype)
    items = w_y
    if token_weight is not None:
        token_weight = composite.weight_tokens(token_weight, targets, ignore_index, w_y.dtype)
        items = w_y * token_weight
    rows = composite.weighted_losses(stats, w_y, token_weight, loss)
    if loss.reduction == 0:
        return rows.reshape(shape)
    total = composite.total(rows)
    if loss.reduction == 2:
        return total
    return total / (items.sum() if num_items is None else num_items)
