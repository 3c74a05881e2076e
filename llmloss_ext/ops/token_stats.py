"""The autograd of the statistics.

Two `torch.autograd.Function` classes share their code: a lean one, which a small call can afford
and torch.compile can trace, and one with ``setup_context``, ``jvp`` and ``vmap``, which torch.func
and forward mode need. Backward runs the gradient kernel; under ``create_graph=True`` and under
transforms it is derived from `llmloss_ext.composite` instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from .. import composite
from ..options import LogitOptions, pack
from ..statistics import FloatStats, RowStats, is_asked
from .derivatives import (
    Composite,
    Dims,
    MaybeTensors,
    Tensors,
    apply,
    batched_state,
    each_sample,
    fold,
    like_parameter,
    merge_rows,
    needs_differentiable_backward,
    one_gradient_at_a_time,
)
from .library import kernels

__all__ = ["StatsInputs", "token_stats"]


class StatsInputs(NamedTuple):
    """The tensors of a call, or one thing for each of them (a gradient, a vmapped dimension)."""

    input: Any = None
    """(N, columns) or (B, S, columns), with adjacent columns."""
    target: Any = None
    """(N) or (B, S): class indices."""
    weight: Any = None
    logit_scale: Any = None


class _Call(NamedTuple):
    logits: LogitOptions
    wanted: int


def _forward(
    input: Tensor, target: Tensor, weight: Tensor | None, logit_scale: Tensor | None, call: _Call
) -> Tensors:
    """Returns `RowStats.results`."""
    packed = pack(call.logits)
    return tuple(kernels.token_stats(input, target, weight, logit_scale, *packed, call.wanted))


def _save(ctx: Any, inputs: StatsInputs, call: _Call, results: Tensors) -> None:
    output = RowStats.of(results)
    ctx.call = call
    ctx.mark_non_differentiable(output.state, output.argmax, output.rank)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output.state, *output.floats.for_backward())


def _saved(ctx: Any) -> tuple[StatsInputs, Tensor, list[Tensor]]:
    """The inputs, the state, and what gradients read again of the statistics."""
    count = len(StatsInputs._fields)
    state, *stats = ctx.saved_tensors[count:]
    return StatsInputs(*ctx.saved_tensors[:count]), state, stats


def _composite(ctx: Any, inputs: StatsInputs, names: tuple[str, ...]) -> Composite:
    def stats(input: Tensor, target: Tensor, weight: Any, logit_scale: Any) -> Tensors:
        every = composite.token_stats(input, target, weight, logit_scale, ctx.call.logits)
        return tuple(getattr(every, name) for name in names)

    return Composite(stats, inputs, ("input", "logit_scale"))


class TokenStats(Function):
    """`token_stats` with its first derivatives by kernels, its second by `composite`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        """The kernels' results."""
        *inputs, call = args
        results = _forward(*args)
        _save(ctx, StatsInputs(*inputs), call, results)
        return results

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, _state: None, *grad_results: Tensor | None) -> MaybeTensors:
        """One visit to the logits, whatever the statistics that were used."""
        # A compiled graph also passes gradients of what was not asked for.
        grads = FloatStats(*grad_results[: len(FloatStats._fields)]).only(ctx.call.wanted)
        if not grads.used:
            return (*StatsInputs(), None)
        inputs, state, stats = _saved(ctx)
        if needs_differentiable_backward():
            upstream = tuple(grad for grad in grads if grad is not None)
            safe = inputs._replace(input=composite.spared(inputs.input, *upstream))
            results = _composite(ctx, safe, grads.used).vjp(upstream)
            return (*StatsInputs(**results), None)
        needs = StatsInputs(*ctx.needs_input_grad[:-1])
        grad_input, grad_scale = kernels.token_stats_backward(
            grads, *inputs, *pack(ctx.call.logits), stats, state, needs.logit_scale
        )
        scale = like_parameter(grad_scale, inputs.logit_scale) if needs.logit_scale else None
        return (*StatsInputs(input=grad_input, logit_scale=scale), None)


class TokenStatsTransforms(Function):
    """`TokenStats` under torch.func transforms and forward mode."""

    forward = staticmethod(_forward)
    backward = staticmethod(TokenStats.backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Saves for both modes."""
        *tensors, call = inputs
        _save(ctx, StatsInputs(*tensors), call, output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> MaybeTensors:
        """The tangents of the statistics that were asked for."""
        inputs = StatsInputs(*ctx.saved_tensors[: len(StatsInputs._fields)])
        names = FloatStats._fields
        every = _composite(ctx, inputs, names).jvp(StatsInputs(*tangents[:-1]))
        wanted = ctx.call.wanted
        floats = (
            tangent if is_asked(wanted, name) else tangent.new_empty(0)
            for name, tangent in zip(names, every, strict=True)
        )
        return (None, *floats, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensors, tuple[int, ...]]:
        """The vmapped dimension becomes one of the rows'."""
        *tensors, call = args
        inputs, dims = StatsInputs(*tensors), StatsInputs(*in_dims[:-1])
        batch = info.batch_size
        if dims.weight is not None or dims.logit_scale is not None:
            return each_sample(batch, TokenStatsTransforms.apply, in_dims, args)
        target = fold(batch, inputs.target, dims.target)
        row_dims = target.dim() - 1
        folded = inputs._replace(
            input=merge_rows(fold(batch, inputs.input, dims.input), row_dims),
            target=merge_rows(target, row_dims),
        )
        state, *stats = apply(_forward, TokenStats, TokenStatsTransforms, (*folded, call))
        stats = [s.reshape(target.shape) if s.numel() else s.new_empty(batch, 0) for s in stats]
        return (batched_state(state, batch), *stats), (0,) * (1 + len(stats))


def token_stats(inputs: StatsInputs, logits: LogitOptions, wanted: int) -> RowStats:
    """The statistics of rows, with every derivative.

    Args:
        inputs: See `StatsInputs`.
        logits: How the logits are read.
        wanted: `llmloss_ext.statistics.asked`.
    """
    args = (*inputs, _Call(logits, wanted))
    return RowStats.of(apply(_forward, TokenStats, TokenStatsTransforms, args))
