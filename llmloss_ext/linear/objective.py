"""Any loss that is a sum over tokens, with statistics of the tokens, from one walk.

`run` forms the gradients in the forward pass, as the cross entropy does: three products. What looks
on (a compiler, a tracer) or asks for more than a first derivative gets the same loss over
`operators.stats`: four products, or whole logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops.derivatives import (
    must_be_opaque,
    needs_differentiable_backward,
    one_gradient_at_a_time,
)
from ..shard import refuse_second_order
from ..statistics import FloatStats, RowStats
from . import operators
from .groups import Groups
from .walk import Inputs, Objective, ObjectiveCall, ObjectiveResults, objective_by_chunks

__all__ = ["ObjectiveLoss", "run"]


class ObjectiveLoss(NamedTuple):
    """A loss, 0-d, and what is known beside it, detached."""

    loss: Tensor
    metrics: tuple[Tensor | None, ...]
    stats: RowStats
    """Without the state."""


def _over_statistics(inputs: Inputs, call: ObjectiveCall) -> ObjectiveLoss:
    """With every derivative, and for compilers."""
    stats = operators.stats(
        inputs, call.targets.target, call.targets.weight, call.logits, call.wanted, call.chunks
    )
    groups = None if call.groups is None else call.groups.groups
    return of_statistics(stats, inputs.input.shape[0], call.objective, call.wanted, groups)


def of_statistics(
    stats: RowStats, tokens: int, objective: Objective, wanted: int, groups: Groups | None = None
) -> ObjectiveLoss:
    """The loss of statistics that have an autograd of their own."""
    of_all = stats.floats.only(wanted)
    if groups is None:
        loss, metrics = objective(of_all, slice(0, tokens))
    else:
        loss, metrics = objective(groups.of_all(of_all), slice(0, groups.number))
    floats = FloatStats(*(x.detach() for x in stats.floats))
    return ObjectiveLoss(loss, metrics, stats._replace(floats=floats))


class LinearObjective(Function):
    """`run`: the gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """The loss. Arguments: `Inputs`, the call, and a list that gets the other results."""
        *tensors, call, others = args
        inputs = Inputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.call = call
        found = objective_by_chunks(inputs, call)
        others.append(found)
        ctx.save_for_backward(*inputs)
        ctx.results = found.results._replace(loss=None)
        loss: Tensor = found.results.loss
        return loss

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        """Multiplies what the forward pass has left by the gradient of the loss."""
        others = (None, None)
        if grad_loss is None:
            return (*Inputs(), *others)
        call, inputs = ctx.call, Inputs(*ctx.saved_tensors)
        if needs_differentiable_backward():
            refuse_second_order(call.chunks.shard)
            used = [x for x, need in zip(inputs, call.needs, strict=True) if need]
            loss = _over_statistics(inputs, call).loss
            found = iter(torch.autograd.grad(loss, used, grad_loss, create_graph=True))
            return (*(next(found) if need else None for need in call.needs), *others)
        if ctx.results is None:  # a second backward
            ctx.results = objective_by_chunks(inputs, call).results
        results, ctx.results = ctx.results, None
        return (*operators.scaled(results, inputs, call.needs, grad_loss), *others)


def run(inputs: Inputs, call: ObjectiveCall) -> ObjectiveLoss:
    """The sum over tokens that an objective is of, its metrics, and the statistics of the tokens.

    Args:
        inputs: As in `operators.loss`.
        call: How; which gradients are needed is found here.
    """
    call = call._replace(needs=Inputs(*operators.needs_gradients(inputs)))
    if must_be_opaque(inputs.input):
        return _over_statistics(inputs, call)
    if not any(call.needs):
        found = objective_by_chunks(inputs, call)
        loss = found.results.loss
    else:
        others: list[ObjectiveResults] = []
        loss = LinearObjective.apply(*inputs, call, others)  # type: ignore[no-untyped-call]
        (found,) = others
    state = inputs.input.new_empty(0)
    return ObjectiveLoss(loss, found.metrics, RowStats.of((state, *found.results.stats)))
