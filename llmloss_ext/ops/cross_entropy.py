"""The autograd of the cross entropy: as that of the statistics, and in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import composite
from ..options import MEAN, NONE, LogitOptions, LossOptions, pack
from ..statistics import asked
from .derivatives import (
    Composite,
    Dims,
    MaybeTensors,
    Tensors,
    batched_state,
    each_sample,
    fold,
    in_transform,
    like_parameter,
    mark_written,
    merge_rows,
    needs_differentiable_backward,
    one_gradient_at_a_time,
)
from .library import kernels
from .token_stats import StatsInputs, token_stats

__all__ = ["LossInputs", "cross_entropy"]


class LossInputs(NamedTuple):
    """The tensors of a call, or one thing for each of them (a gradient, a vmapped dimension)."""

    input: Any = None
    """(N, columns) or (B, S, columns), with adjacent columns."""
    target: Any = None
    """(N) or (B, S): class indices; or probabilities like the input."""
    weight: Any = None
    token_weight: Any = None
    """One number a row."""
    num_items: Any = None
    logit_scale: Any = None


class _Call(NamedTuple):
    logits: LogitOptions
    loss: LossOptions

    @property
    def packed(self) -> Any:
        return pack(self.logits, self.loss)


class _Saved(NamedTuple):
    """What backward reads again."""

    input: Any
    target: Any
    weight: Any
    token_weight: Any
    logit_scale: Any
    state: Tensor
    denominator: Tensor

    @classmethod
    def of(cls, inputs: LossInputs, state: Tensor, denominator: Tensor) -> _Saved:
        input, target, weight, token_weight, _num_items, logit_scale = inputs
        return cls(input, target, weight, token_weight, logit_scale, state, denominator)

    def spared(self, grad_rows: Tensor) -> _Saved:
        """Without what torch must not multiply by a gradient of 0: `composite.spared`."""
        target = self.target
        if not composite.is_indices(target):
            target = composite.spared(target, grad_rows)
        return self._replace(input=composite.spared(self.input, grad_rows), target=target)

    def gradients(self, grad_loss: Tensor, call: _Call, with_scale: bool, into: Any) -> Any:
        """What the gradient kernel ``into`` returns."""
        *inputs, state, denominator = self
        return into(grad_loss, *inputs, *call.packed, state, denominator, with_scale)


def _forward(*args: Any) -> Tensors:
    """Returns the loss, the state and the denominator; arguments: `LossInputs` and a `_Call`."""
    *inputs, call = args
    return kernels.cross_entropy(*inputs, *call.packed)


def _composite(call: _Call, saved: _Saved) -> Composite:
    def loss(
        input: Tensor, target: Tensor, weight: Any, token_weight: Any, logit_scale: Any, *_: Any
    ) -> Tensors:
        where = (input, target, weight, token_weight, logit_scale, call.logits, call.loss)
        if call.loss.reduction != MEAN:
            rows = composite.row_losses(*where)
            return (rows if call.loss.reduction == NONE else rows.sum(),)
        items, z_factor = saved.denominator
        return (composite.row_losses(*where, z_factor).sum() / items,)

    return Composite(loss, saved, ("input", "target", "logit_scale"))


class CrossEntropy(Function):
    """`cross_entropy` with its first derivatives by kernels, its second by `composite`."""

    # A small call pays for every line of these two.
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        logit_scale: Tensor | None,
        call: _Call,
    ) -> Tensor:
        """The loss."""
        loss: Tensor
        loss, state, denominator = kernels.cross_entropy(
            input, target, weight, token_weight, num_items, logit_scale, *pack(*call)
        )
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *_Saved(input, target, weight, token_weight, logit_scale, state, denominator)
        )
        return loss

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> MaybeTensors:
        """One visit to the logits."""
        if grad_loss is None:
            return (*LossInputs(), None)
        saved, needs = _Saved(*ctx.saved_tensors), LossInputs(*ctx.needs_input_grad[:-1])
        # The gradient of probability targets is not a kernel's work.
        if needs.target or needs_differentiable_backward():
            if ctx.call.loss.reduction == NONE:
                saved = saved.spared(grad_loss)
            return (*LossInputs(**_composite(ctx.call, saved).vjp((grad_loss,))), None)
        input, target, weight, token_weight, logit_scale, state, denominator = saved
        grad_input, grad_scale = kernels.cross_entropy_backward(
            grad_loss, input, target, weight, token_weight, logit_scale, *pack(*ctx.call), state,
            denominator, needs.logit_scale,
        )  # fmt: skip
        scale = like_parameter(grad_scale, logit_scale) if needs.logit_scale else None
        return (*LossInputs(input=grad_input, logit_scale=scale), None)


class CrossEntropyTransforms(Function):
    """`CrossEntropy` under torch.func transforms and forward mode."""

    forward = staticmethod(_forward)
    backward = staticmethod(CrossEntropy.backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Saves for both modes."""
        *tensors, call = inputs
        _, state, denominator = output
        ctx.call = call
        ctx.mark_non_differentiable(state, denominator)
        ctx.set_materialize_grads(False)
        saved = _Saved.of(LossInputs(*tensors), state, denominator)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> MaybeTensors:
        """The loss's tangent."""
        saved = _Saved(*ctx.saved_tensors)
        return *_composite(ctx.call, saved).jvp(LossInputs(*tangents[:-1])), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensors, tuple[int, ...]]:
        """The vmapped dimension becomes one of the rows', and the reduction is by hand."""
        *tensors, call = args
        inputs, dims = LossInputs(*tensors), LossInputs(*in_dims[:-1])
        batch = info.batch_size
        is_special = call.loss.z_loss != 0 and inputs.weight is not None  # a factor for each sample
        differing = (dims.weight, dims.num_items, dims.logit_scale)
        if is_special or any(dim is not None for dim in differing):
            return each_sample(batch, CrossEntropyTransforms.apply, in_dims, args)
        input = fold(batch, inputs.input, dims.input)
        target = fold(batch, inputs.target, dims.target)
        row_dims = input.dim() - 2
        token_weight = None
        if inputs.token_weight is not None:
            token_weight = fold(batch, inputs.token_weight, dims.token_weight)
        folded = inputs._replace(
            input=merge_rows(input, row_dims),
            target=merge_rows(target, row_dims),
            token_weight=None if token_weight is None else merge_rows(token_weight, row_dims),
            num_items=None,
        )
        by_row = call._replace(loss=call.loss._replace(reduction=NONE))
        rows, state = _rows_and_state(folded, by_row)
        losses = rows.reshape(input.shape[:-1])
        denominators = rows.new_empty(batch, 0)
        if call.loss.reduction != NONE:
            losses = losses.flatten(1).sum(1)
        if call.loss.reduction == MEAN:
            if inputs.num_items is None:
                weights = [None] * batch if token_weight is None else token_weight
                counted = [
                    composite.counted(t, inputs.weight, w, call.logits, call.loss, rows.dtype)
                    for t, w in zip(target, weights, strict=True)
                ]
                denominators = torch.stack(counted)
            else:
                items = composite.items_denominator(inputs.num_items, rows.dtype)
                denominators = items.expand(batch, *items.shape)
            losses = losses / denominators[:, 0]
        return (losses, batched_state(state, batch), denominators), (0, 0, 0)


def _rows_and_state(inputs: LossInputs, call: _Call) -> tuple[Tensor, Tensor]:
    """The losses of rows inside of vmap, with the derivatives that outer transforms ask for."""
    if in_transform() or torch.is_grad_enabled():
        rows, state, _ = CrossEntropyTransforms.apply(*inputs, call)  # type: ignore[no-untyped-call]
    else:
        rows, state, _ = _forward(*inputs, call)
    return rows, state


class CrossEntropyInplace(Function):
    """The loss; the gradient is written over the input, in forward where that is exact.

    It is written in backward without a reduction, whose gradient is not known before, and for
    float16, where the loss scale of mixed-precision training must go in before the rounding: a
    gradient of 1 / N alone is subnormal.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """The loss."""
        *tensors, call = args
        inputs, needs = LossInputs(*tensors), LossInputs(*ctx.needs_input_grad[:-1])
        ctx.set_materialize_grads(False)
        ctx.call, ctx.spent, ctx.with_scale = call, False, bool(needs.logit_scale)
        logits = inputs.input.detach()  # the same memory and version counter
        ctx.written = call.loss.reduction != NONE and logits.dtype != torch.float16
        value: Tensor
        if ctx.written:
            _, *others = inputs
            value, grad_scale = kernels.cross_entropy_fused_(
                logits, *others, *call.packed, ctx.with_scale
            )
            mark_written(logits)
            ctx.save_for_backward(logits, inputs.logit_scale, grad_scale)
        else:
            value, state, denominator = _forward(*args)
            ctx.save_for_backward(*_Saved.of(inputs._replace(input=logits), state, denominator))
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> MaybeTensors:
        """Hands out the logits' memory, once."""
        if grad_loss is None:
            return (*LossInputs(), None)
        check_inplace_backward(ctx.spent)
        saved = ctx.saved_tensors  # raises if the logits were written to meanwhile
        ctx.spent = True
        if ctx.written:
            logits, logit_scale, grad_scale = saved
            kernels.scale_(logits, grad_loss)
            if ctx.with_scale:
                grad_scale = composite.without_garbage(grad_scale, grad_loss) * grad_loss
        else:
            inputs = _Saved(*saved)
            logits, logit_scale = inputs.input, inputs.logit_scale
            grad_scale = inputs.gradients(
                grad_loss, ctx.call, ctx.with_scale, kernels.cross_entropy_backward_
            )
        mark_written(logits)
        scale = like_parameter(grad_scale, logit_scale) if ctx.with_scale else None
        return (*LossInputs(input=logits, logit_scale=scale), None)


def check_inplace_backward(is_spent: bool) -> None:
    """Raises a RuntimeError if a backward asks for what in place cannot give."""
    if needs_differentiable_backward():
        raise RuntimeError(
            "cross_entropy(inplace=True) has no second-order gradient: its logits are gone. "
            "Use inplace=False with create_graph=True."
        )
    if is_spent:
        raise RuntimeError(
            "cross_entropy(inplace=True): backward a second time, but the gradient that lay "
            "over the logits was handed out the first time. Use inplace=False with "
            "retain_graph=True."
        )


def cross_entropy(
    inputs: LossInputs, logits: LogitOptions, loss: LossOptions, *, inplace: bool = False
) -> Tensor:
    """The loss of rows, (N), (B, S) or 0-d, with every derivative.

    Args:
        inputs: See `LossInputs`.
        logits: How the logits are read.
        loss: The options of the loss.
        inplace: Whether the gradient, if there will be one, is written over the logits: one
            backward, of first order.
    """
    token_weight = inputs.token_weight
    if token_weight is not None and token_weight.requires_grad:
        return _with_learned_weight(inputs, logits, loss, inplace)
    value: Tensor
    if in_transform():
        value, _, _ = CrossEntropyTransforms.apply(*inputs, _Call(logits, loss))  # type: ignore[no-untyped-call]
        return value
    # Written out, since a small call pays for every line here.
    input, target, logit_scale = inputs.input, inputs.target, inputs.logit_scale
    if torch.is_grad_enabled():
        with_scale = logit_scale is not None and logit_scale.requires_grad
        if inplace and (input.requires_grad or with_scale):
            return CrossEntropyInplace.apply(*inputs, _Call(logits, loss))  # type: ignore[no-untyped-call]
        if input.requires_grad or with_scale or target.requires_grad:
            return CrossEntropy.apply(*inputs, _Call(logits, loss))  # type: ignore[no-untyped-call]
    value, _, _ = kernels.cross_entropy(*inputs, *pack(logits, loss))
    return value


def _with_learned_weight(
    inputs: LossInputs, logits: LogitOptions, loss: LossOptions, inplace: bool
) -> Tensor:
    """Torch multiplies the rows' losses by a learned token weight, and so differentiates it."""
    real = composite.real_of(inputs.input)
    weights = composite.row_weights(inputs.token_weight, inputs.target, logits.ignore_index, real)
    plain = inputs._replace(token_weight=None, num_items=None)
    by_row = loss._replace(reduction=NONE)
    items, z_factor = torch.ones_like(weights.sum()), None
    if loss.reduction == MEAN and inputs.num_items is not None:
        items, _ = composite.items_denominator(inputs.num_items, real)
    elif loss.reduction == MEAN:
        counted = (inputs.target, inputs.weight, weights, logits, loss, real)
        items, z_factor = composite.counted(*counted)
    has_two_means = z_factor is not None and loss.z_loss != 0 and inputs.weight is not None
    if not has_two_means:
        rows = cross_entropy(plain, logits, by_row, inplace=inplace)
    elif inplace:
        raise RuntimeError(
            "cross_entropy(inplace=True) cannot average a z_loss beside class weights by a learned "
            "token_weight; use inplace=False"
        )
    else:
        rows = cross_entropy(plain, logits, by_row._replace(z_loss=0.0))
        of_stats = StatsInputs(inputs.input, inputs.target, None, inputs.logit_scale)
        lse = token_stats(of_stats, logits, asked(("lse",))).floats.lse
        assert z_factor is not None
        lse = composite.without_garbage(lse, weights)
        rows = rows + loss.z_loss * z_factor * lse.square()
    rows = composite.without_garbage(rows, weights) * weights
    return rows if loss.reduction == NONE else composite.total(rows) / items
