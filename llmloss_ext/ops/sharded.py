"""The autograd of the statistics where each rank has the logits of some classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..composite import real_of
from ..options import LogitOptions, pack, unpack
from ..shard import ShardedColumns, ShardedRows, refuse_second_order
from ..statistics import FloatStats, RowStats
from .cross_entropy import check_inplace_backward
from .derivatives import (
    MaybeTensors,
    Tensors,
    like_parameter,
    mark_written,
    must_be_opaque,
    needs_differentiable_backward,
)
from .fake import statistics_like
from .library import STATE
from .namespace import qualified
from .token_stats import StatsInputs

T = TypeVar("T")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., T], *args: Any) -> T:
    """Runs outside of torch.compile's graphs."""
    return function(*args)


@torch.library.custom_op(qualified("sharded_stats"), mutates_args=())
def _sharded_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    floats: Sequence[float],
    ints: Sequence[int],
    wanted: int,
    shard: Sequence[int],
    group: str,
) -> list[Tensor]:
    """`_statistics`, which compilers do not look into."""
    inputs, (logits, _) = StatsInputs(input, target, weight, logit_scale), unpack(floats, ints)
    columns = ShardedColumns.unpack(shard, group)
    return list(_statistics(inputs, logits, wanted, columns).results())


@_sharded_stats.register_fake
def _(input, target, weight, logit_scale, floats, ints, wanted, shard, group):  # type: ignore[no-untyped-def]
    rows = target.numel()
    state = input.new_empty((len(STATE), rows), dtype=real_of(input))
    return [state, *statistics_like(input, (rows,), wanted)]


@torch.library.custom_op(qualified("sharded_stats_backward"), mutates_args=())
def _sharded_stats_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    floats: Sequence[float],
    ints: Sequence[int],
    stats: Sequence[Tensor],
    state: Tensor,
    with_scale: bool,
    shard: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    """`_gradient`, which compilers do not look into."""
    inputs, (logits, _) = StatsInputs(input, target, weight, logit_scale), unpack(floats, ints)
    columns = ShardedColumns.unpack(shard, group)
    return _gradient(
        FloatStats(*grads), inputs, logits, columns, list(stats), state, with_scale, inplace=False
    )


@_sharded_stats_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grads, input, target, weight, logit_scale, floats, ints, stats, state, with_scale, shard, group
):
    return input.new_empty(input.shape), state.new_empty(() if with_scale else 0)


def _statistics(
    inputs: StatsInputs, logits: LogitOptions, wanted: int, shard: ShardedColumns
) -> RowStats:
    rows = ShardedRows(shard, inputs.weight, inputs.logit_scale, logits)
    return rows.statistics(inputs.input, inputs.target, wanted)


def _gradient(
    grads: FloatStats,
    inputs: StatsInputs,
    logits: LogitOptions,
    shard: ShardedColumns,
    stats: list[Tensor],
    state: Tensor,
    with_scale: bool,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Of this rank's columns, and of logit_scale over all ranks."""
    rows = ShardedRows(shard, inputs.weight, inputs.logit_scale, logits)
    where = (grads, inputs.input, inputs.target, stats, state, with_scale)
    gradient, scale = rows.gradient(*where, inplace=inplace)
    return gradient, shard.all_reduce_(scale) if with_scale else scale


class ShardedTokenStats(Function):
    """The statistics of whole rows; the gradient of this rank's columns."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        """Returns `RowStats.results`."""
        *tensors, logits, wanted, shard, inplace = args
        inputs = StatsInputs(*tensors)
        if must_be_opaque(inputs.input):
            stats = RowStats.of(_sharded_stats(*inputs, *pack(logits), wanted, *shard.pack()))
        else:
            stats = _statistics(inputs, logits, wanted, shard)
        ctx.mark_non_differentiable(stats.state, stats.argmax, stats.rank)
        ctx.set_materialize_grads(False)
        ctx.logits, ctx.wanted, ctx.shard = logits, wanted, shard
        ctx.inplace, ctx.spent = inplace, False
        if inplace:  # the same memory and version counter
            inputs = inputs._replace(input=inputs.input.detach())
        ctx.save_for_backward(*inputs, stats.state, *stats.floats.for_backward())
        return stats.results()

    @staticmethod
    def backward(ctx: Any, _state: None, *grad_results: Tensor | None) -> MaybeTensors:
        """One visit to this rank's logits, and a sum over the ranks for logit_scale."""
        # A compiled graph also passes gradients of what was not asked for.
        grads = FloatStats(*grad_results[: len(FloatStats._fields)]).only(ctx.wanted)
        nothing = (None,) * 4  # the arguments that are no tensors
        if not grads.used:
            return (*StatsInputs(), *nothing)
        if needs_differentiable_backward():
            refuse_second_order(ctx.shard)
        if ctx.inplace:
            check_inplace_backward(ctx.spent)
        count = len(StatsInputs._fields)
        inputs, (state, *stats) = StatsInputs(*ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        ctx.spent = ctx.inplace
        with_scale = StatsInputs(*ctx.needs_input_grad[:count]).logit_scale
        if must_be_opaque(inputs.input) and not ctx.inplace:
            packed = pack(ctx.logits)
            gradient, scale = _sharded_stats_backward(
                grads, *inputs, *packed, stats, state, with_scale, *ctx.shard.pack()
            )
        else:
            gradient, scale = _gradient(
                grads, inputs, ctx.logits, ctx.shard, stats, state, with_scale, inplace=ctx.inplace
            )
        if ctx.inplace:
            mark_written(gradient)
        if with_scale:
            scale = like_parameter(scale, inputs.logit_scale)
        return (
            *StatsInputs(input=gradient, logit_scale=scale if with_scale else None),
            *nothing,
        )


def token_stats(
    inputs: StatsInputs,
    logits: LogitOptions,
    wanted: int,
    shard: ShardedColumns,
    inplace: bool = False,
) -> RowStats:
    """`llmloss_ext.ops.token_stats` over ranks, (N) each; first-order gradients.

    ``inplace``: backward writes the gradient over the logits, once.
    """
    results: Tensors = ShardedTokenStats.apply(*inputs, logits, wanted, shard, inplace)  # type: ignore[no-untyped-call]
    return RowStats.of(results)
