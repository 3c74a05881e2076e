"""The linear losses as torch sees them: with their derivatives, and opaque to compilers.

`loss` has its gradients from the forward pass: three products in all. `stats` computes the logits
again in backward: four, for any function of the statistics. What asks for more than first-order
gradients gets torch arithmetic over whole logits: slower, never wrong.

The walks themselves are operators of their own, ``linear_*``, which compilers do not look into.
Where nothing looks on, they are called directly, which saves a small call 40 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import composite
from ..checks import is_autocast
from ..composite import real_of
from ..ops.derivatives import (
    Composite,
    must_be_opaque,
    needs_differentiable_backward,
    one_gradient_at_a_time,
)
from ..ops.fake import statistics_like
from ..ops.library import STATE, kernels
from ..ops.namespace import qualified
from ..options import MEAN, LogitOptions, LossOptions, pack, unpack
from ..shard import ShardedColumns, refuse_second_order
from ..statistics import FloatStats, RowStats, asked
from .planning import ChunkLimit, ChunkOptions
from .walk import (
    Inputs,
    LossResults,
    Targets,
    gradient_dtype,
    gradients_by_chunks,
    loss_by_chunks,
    or_empty,
    stats_by_chunks,
    takes_part,
)


class _Options(NamedTuple):
    logits: LogitOptions
    loss: LossOptions
    """Of the statistics: not read."""
    chunks: ChunkOptions
    wanted: int = 0
    """The statistics beside a loss."""


UNSHARDED = len(ChunkLimit._fields) + 2
"""Of the packed integers of `ChunkOptions`; then those of the shard."""


def pack_limit(limit: ChunkLimit) -> list[int]:
    """As operators take it: a symbol has no bool beside it."""
    return [limit.tokens, int(limit.is_even), limit.alone]


def unpack_limit(numbers: Sequence[int]) -> ChunkLimit:
    """What was packed for an operator."""
    tokens, is_even, alone = numbers
    return ChunkLimit(tokens, bool(is_even), alone)


def pack_chunks(chunks: ChunkOptions) -> tuple[list[int], str]:
    """The options but for the dtype: integers, and the name of the shard's process group."""
    switches = (chunks.drop_ignored, chunks.has_float32_logits)
    numbers = [*pack_limit(chunks.limit), *map(int, switches)]
    if chunks.shard is None:
        return numbers, ""
    of_shard, group = chunks.shard.pack()
    return [*numbers, *of_shard], group


def unpack_chunks(
    chunks: Sequence[int], group: str, weight_grad_dtype: torch.dtype
) -> ChunkOptions:
    """What was packed for an operator."""
    *limit, drop_ignored, is_wide = chunks[:UNSHARDED]
    of_shard = chunks[UNSHARDED:]
    shard = ShardedColumns.unpack(of_shard, group) if of_shard else None
    return ChunkOptions(
        unpack_limit(limit), bool(drop_ignored), weight_grad_dtype, shard, bool(is_wide)
    )


def whole_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    used: int,
    *,
    has_float32_logits: bool,
) -> Tensor:
    """(N, used), with every derivative; of zeros where ``counts`` (N) says that a token has none.

    Hidden states are in the dtype of the products.
    """
    if counts is not None:
        hidden = composite.only(counts, hidden)
    if used < weight.shape[0]:
        weight, bias = weight[:used], None if bias is None else bias[:used]
    weight = weight.to(hidden.dtype)
    if has_float32_logits:
        is_on = is_autocast(hidden)
        with torch.autocast(hidden.device.type, enabled=False) if is_on else nullcontext():
            logits = hidden.float() @ weight.float().t()
    else:
        logits = hidden @ weight.t()
    return logits if bias is None else logits + bias.to(logits.dtype)


def logits_of(
    inputs: Inputs,
    target: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    chunks: ChunkOptions,
) -> Tensor:
    """The whole logits, (N, V), with every derivative; 0 where a token or a class has no part."""
    hidden, weight, bias, _ = inputs
    counts = takes_part(Targets(target, token_weight=token_weight), options.ignore_index)
    columns, used = weight.shape[0], options.vocab_size
    logits = whole_logits(
        hidden, weight, bias, counts, used, has_float32_logits=chunks.has_float32_logits
    )
    return F.pad(logits, (0, columns - used)) if used < columns else logits


# ---------------------------------------------------------------------------------- the loss


@torch.library.custom_op(qualified("linear_loss"), mutates_args=())
def _linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    floats: Sequence[float],
    ints: Sequence[int],
    chunks: Sequence[int],
    group: str,
    weight_grad_dtype: torch.dtype,
    needs: Sequence[bool],
    wanted: int,
) -> list[Tensor]:
    """`loss_by_chunks`; ``needs`` says which of the first four arguments get a gradient."""
    *results, stats = loss_by_chunks(
        Inputs(input, linear_weight, linear_bias, logit_scale),
        Targets(target, weight, token_weight, num_items),
        *unpack(floats, ints),
        unpack_chunks(chunks, group, weight_grad_dtype),
        Inputs(*needs),
        wanted,
    )
    return [*results, *stats]


@_linear_loss.register_fake
def _(  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, logit_scale, target, weight, token_weight, num_items,
    floats, ints, chunks, group, weight_grad_dtype, needs, wanted,
):  # fmt: skip
    def gradient(parameter: Any, asked: bool, dtype: Callable[[Tensor], torch.dtype]) -> Tensor:
        if not asked or parameter is None:
            return or_empty(None, input)
        empty: Tensor = parameter.new_empty(parameter.shape, dtype=dtype(parameter))
        return empty

    needs = Inputs(*needs)
    scalar = input.new_empty((), dtype=real_of(input))
    stats = []
    if wanted:
        _, loss = unpack(floats, ints)
        stats = statistics_like(input, (input.shape[0],), wanted | asked(loss.statistics()))
    return [
        scalar,
        gradient(input, needs.input, lambda x: x.dtype),
        gradient(linear_weight, needs.linear_weight, lambda x: gradient_dtype(input, x)),
        gradient(linear_bias, needs.linear_bias, lambda x: gradient_dtype(input, x)),
        gradient(logit_scale, needs.logit_scale, lambda x: x.dtype),
        torch.empty_like(scalar),
        *stats,
    ]


def _loss_and_gradients(
    inputs: Inputs, targets: Targets, options: _Options, needs: Inputs
) -> LossResults:
    logits, loss, chunks, wanted = options
    if not must_be_opaque(inputs.input):
        return loss_by_chunks(inputs, targets, logits, loss, chunks, needs, wanted)
    how = (*pack_chunks(chunks), chunks.weight_grad_dtype)
    results = _linear_loss(*inputs, *targets, *pack(logits, loss), *how, needs, wanted)
    count = len(LossResults._fields) - 1
    return LossResults._make((*results[:count], tuple(results[count:])))


class LinearCrossEntropy(Function):
    """`loss`: the gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """The loss and its statistics; ``needs`` says which inputs get a gradient."""
        *tensors, options, needs = args
        count = len(Inputs._fields)
        inputs, targets = Inputs(*tensors[:count]), Targets(*tensors[count:])
        ctx.set_materialize_grads(False)
        ctx.options, ctx.needs = options, needs
        *results, stats = _loss_and_gradients(inputs, targets, options, needs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*inputs, *targets, *results)
        else:
            # Not saved, but handed out by the first backward: then nothing is copied. Without the
            # loss, whose graph this is: in a cycle, all of it would wait for the collector.
            ctx.save_for_backward(*inputs, *targets)
            ctx.results = LossResults(*results)._replace(loss=None)
        ctx.mark_non_differentiable(*stats)
        return (results[0], *stats)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Multiplies what the forward pass has left by the gradient of the loss."""
        others = (*Targets(), None, None)
        if grad_loss is None:
            return (*Inputs(), *others)
        saved = list(ctx.saved_tensors)
        inputs = Inputs(*(saved.pop(0) for _ in Inputs._fields))
        targets = Targets(*(saved.pop(0) for _ in Targets._fields))
        if torch.compiler.is_compiling():
            results = LossResults(*saved)
            factor = grad_loss * results.factor
            every = zip(results.gradients, inputs, ctx.needs, strict=True)
            return (
                *(_times(g, factor, x.dtype) if need else None for g, x, need in every),
                *others,
            )
        if needs_differentiable_backward():
            refuse_second_order(ctx.options.chunks.shard)
            by_name = _loss_composite(inputs, targets, ctx.options).vjp((grad_loss,))
            return (*Inputs(**by_name), *others)
        if ctx.results is None:  # a second backward
            ctx.results = _loss_and_gradients(inputs, targets, ctx.options, ctx.needs)
        results, ctx.results = ctx.results, None
        return (*scaled(results, inputs, ctx.needs, grad_loss), *others)


def scaled(
    results: LossResults, inputs: Inputs, needs: Inputs, grad_loss: Tensor
) -> list[Tensor | None]:
    """What a forward pass has left of its gradients, times that of the loss; in place."""
    factor = grad_loss * results.factor
    every = zip(results.gradients, inputs, needs, strict=True)
    return [_scaled(g, factor, x.dtype) if need else None for g, x, need in every]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies in place, by 1 without touching it, and by 0 to 0; rounds after, if it has to."""
    if gradient.dim() == 2 and gradient.numel():
        kernels.scale_(gradient, factor)
        return gradient.to(dtype)
    return _times(gradient, factor, dtype)


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (composite.without_garbage(gradient, factor) * factor).to(dtype)


def _loss_composite(inputs: Inputs, targets: Targets, options: _Options) -> Composite:
    target, weight, token_weight, num_items = targets
    logits, loss, chunks, *_ = options
    items, z_factor = None, None
    if loss.reduction == MEAN:
        real = real_of(inputs.input)
        if num_items is None:
            items, z_factor = composite.counted(target, weight, token_weight, logits, loss, real)
        else:
            items, z_factor = composite.items_denominator(num_items, real)

    def whole(*primals: Any) -> tuple[Tensor, ...]:
        inputs = Inputs(*primals)
        rows = composite.row_losses(
            logits_of(inputs, target, token_weight, logits, chunks), target, weight, token_weight,
            inputs.logit_scale, logits, loss, z_factor,
        ).sum()  # fmt: skip
        return (rows if items is None else rows / items,)

    return Composite(whole, inputs, Inputs._fields)


def needs_gradients(inputs: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Which of the inputs get a gradient.

    Asked before a Function is entered: inside, ``needs_input_grad`` knows nothing of no_grad.
    """
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in inputs)


def loss(
    inputs: Inputs,
    targets: Targets,
    logits: LogitOptions,
    loss: LossOptions,
    chunks: ChunkOptions,
    wanted: int = 0,
) -> tuple[Tensor, RowStats | None]:
    """The mean or sum over tokens, 0-d, of class indices or probabilities without a gradient.

    With the statistics that are ``wanted`` (class indices), of which none has a gradient.
    """
    needs = Inputs(*needs_gradients(inputs))
    options = _Options(logits, loss, chunks, wanted)
    if any(needs):
        value, *stats = LinearCrossEntropy.apply(*inputs, *targets, options, needs)  # type: ignore[no-untyped-call]
    else:
        results = _loss_and_gradients(inputs, targets, options, needs)
        value, stats = results.loss, list(results.stats)
    return value, RowStats.of((value.new_empty(0), *stats)) if wanted else None


# ---------------------------------------------------------------------------- the statistics


@torch.library.custom_op(qualified("linear_stats"), mutates_args=())
def _linear_stats(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    floats: Sequence[float],
    ints: Sequence[int],
    wanted: int,
    chunks: Sequence[int],
    group: str,
) -> list[Tensor]:
    """`stats_by_chunks`."""
    inputs = Inputs(input, linear_weight, linear_bias, logit_scale)
    logits, _ = unpack(floats, ints)
    how = unpack_chunks(chunks, group, real_of(input))
    return list(stats_by_chunks(inputs, Targets(target, weight), logits, wanted, how).results())


@_linear_stats.register_fake
def _(  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, logit_scale, target, weight, floats, ints, wanted,
    chunks, group,
):  # fmt: skip
    tokens = input.shape[0]
    state = input.new_empty((tokens, len(STATE)), dtype=real_of(input))
    return [state, *statistics_like(input, (tokens,), wanted)]


@torch.library.custom_op(qualified("linear_stats_backward"), mutates_args=())
def _linear_stats_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    floats: Sequence[float],
    ints: Sequence[int],
    stats: Sequence[Tensor],
    state: Tensor,
    chunks: Sequence[int],
    group: str,
    weight_grad_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gradients_by_chunks` without an accumulator."""
    inputs = Inputs(input, linear_weight, linear_bias, logit_scale)
    logits, _ = unpack(floats, ints)
    return gradients_by_chunks(
        FloatStats(*grads), inputs, Targets(target, weight), logits, list(stats), state,
        unpack_chunks(chunks, group, weight_grad_dtype), Inputs(*needs),
    )  # fmt: skip


@_linear_stats_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grads, input, linear_weight, linear_bias, logit_scale, target, weight, floats, ints, stats,
    state, chunks, group, weight_grad_dtype, needs,
):  # fmt: skip
    parameters = (input, linear_weight, linear_bias, logit_scale)
    return tuple(
        p.new_empty(p.shape) if asked and p is not None else input.new_empty(0)
        for p, asked in zip(parameters, needs, strict=True)
    )


class _StatsCall(NamedTuple):
    """What the statistics take besides tensors with an autograd of their own."""

    logits: LogitOptions
    wanted: int
    chunks: ChunkOptions
    accumulator: Tensor | None


class LinearTokenStats(Function):
    """`stats`: backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """Returns `RowStats.results`."""
        *tensors, call = args
        count = len(Inputs._fields)
        inputs, targets = Inputs(*tensors[:count]), Targets(*tensors[count:])
        chunks = call.chunks
        if not must_be_opaque(inputs.input):
            output = stats_by_chunks(inputs, targets, call.logits, call.wanted, chunks)
        else:
            packed, how = pack(call.logits), pack_chunks(chunks)
            where = (*inputs, targets.target, targets.weight)
            output = RowStats.of(_linear_stats(*where, *packed, call.wanted, *how))
        ctx.mark_non_differentiable(output.state, output.argmax, output.rank)
        ctx.set_materialize_grads(False)
        ctx.call = call
        kept = output.floats.for_backward()
        ctx.save_for_backward(*inputs, targets.target, targets.weight, output.state, *kept)
        return output.results()

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, _state: None, *grad_results: Tensor | None) -> tuple[Any, ...]:
        """One walk, whatever the statistics that were used."""
        call = ctx.call
        # A compiled graph also passes gradients of what was not asked for.
        grads = FloatStats(*grad_results[: len(FloatStats._fields)]).only(call.wanted)
        others = (*Targets(), None)
        if not grads.used:
            return (*Inputs(), *others)
        saved = list(ctx.saved_tensors)
        inputs = Inputs(*(saved.pop(0) for _ in Inputs._fields))
        target, weight, state, *stats = saved
        if needs_differentiable_backward():
            refuse_second_order(call.chunks.shard)
            if call.accumulator is not None:
                raise RuntimeError("weight_grad_accumulator has no second-order gradient")
            upstream = tuple(grad for grad in grads if grad is not None)
            safe = inputs._replace(input=composite.spared(inputs.input, *upstream))
            function = _stats_composite(safe, target, weight, call, grads.used)
            by_name = function.vjp(upstream)
            return (*Inputs(**by_name), *others)
        needs = Inputs(*ctx.needs_input_grad[: len(Inputs._fields)])
        chunks, results = call.chunks, Inputs()
        if call.accumulator is not None or not must_be_opaque(inputs.input):
            results = gradients_by_chunks(
                grads, inputs, Targets(target, weight), call.logits, stats, state, chunks, needs,
                call.accumulator,
            )  # fmt: skip
        else:
            how = (*pack_chunks(chunks), chunks.weight_grad_dtype)
            where = (*inputs, target, weight, *pack(call.logits), stats, state)
            results = Inputs(*_linear_stats_backward(grads, *where, *how, needs))
        if call.accumulator is not None:
            needs = needs._replace(linear_weight=False)
        every = zip(results, needs, strict=True)
        return (*(result if need else None for result, need in every), *others)


def _stats_composite(
    inputs: Inputs, target: Tensor, weight: Any, call: _StatsCall, names: tuple[str, ...]
) -> Composite:
    def whole(*primals: Any) -> tuple[Tensor, ...]:
        inputs = Inputs(*primals)
        logits = logits_of(inputs, target, None, call.logits, call.chunks)
        every = composite.token_stats(logits, target, weight, inputs.logit_scale, call.logits)
        return tuple(getattr(every, name) for name in names)

    return Composite(whole, inputs, Inputs._fields)


def stats(
    inputs: Inputs,
    target: Tensor,
    weight: Tensor | None,
    logits: LogitOptions,
    wanted: int,
    chunks: ChunkOptions,
    accumulator: Tensor | None = None,
) -> RowStats:
    """The statistics of the tokens; backward adds the weight's gradient to ``accumulator``."""
    call = _StatsCall(logits, wanted, chunks, accumulator)
    results: tuple[Tensor, ...] = LinearTokenStats.apply(  # type: ignore[no-untyped-call]
        *inputs, *Targets(target, weight), call
    )
    return RowStats.of(results)
