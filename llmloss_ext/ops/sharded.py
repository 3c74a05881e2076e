"""The autograd of the statistics where each rank has the logits of some classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..options import LogitOptions
from ..shard import ShardedColumns, ShardedRows, refuse_second_order
from ..statistics import FloatStats, RowStats
from .cross_entropy import check_inplace_backward
from .derivatives import (
    MaybeTensors,
    Tensors,
    like_parameter,
    mark_written,
    needs_differentiable_backward,
)
from .token_stats import StatsInputs

T = TypeVar("T")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., T], *args: Any) -> T:
    """Runs outside of torch.compile's graphs, which do not know which rank has what."""
    return function(*args)


class ShardedTokenStats(Function):
    """The statistics of whole rows; the gradient of this rank's columns."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        """Returns `RowStats.results`."""
        *tensors, logits, wanted, shard, inplace = args
        inputs = StatsInputs(*tensors)
        rows = ShardedRows(shard, inputs.weight, inputs.logit_scale, logits)
        stats = rows.statistics(inputs.input, inputs.target, wanted)
        ctx.mark_non_differentiable(stats.state, stats.argmax, stats.rank)
        ctx.set_materialize_grads(False)
        ctx.logits, ctx.shard, ctx.inplace, ctx.spent = logits, shard, inplace, False
        if inplace:  # the same memory and version counter
            inputs = inputs._replace(input=inputs.input.detach())
        ctx.save_for_backward(*inputs, stats.state, *stats.floats.for_backward())
        return stats.results()

    @staticmethod
    def backward(ctx: Any, _state: None, *grad_results: Tensor | None) -> MaybeTensors:
        """One visit to this rank's logits, and a sum over the ranks for logit_scale."""
        grads = FloatStats(*grad_results[: len(FloatStats._fields)])
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
        rows = ShardedRows(ctx.shard, inputs.weight, inputs.logit_scale, ctx.logits)
        with_scale = StatsInputs(*ctx.needs_input_grad[:count]).logit_scale
        where = (grads, inputs.input, inputs.target, stats, state, with_scale, ctx.inplace)
        gradient, scale = rows.gradient(*where)
        if ctx.inplace:
            mark_written(gradient)
        if with_scale:
            scale = like_parameter(ctx.shard.all_reduce_(scale), inputs.logit_scale)
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
