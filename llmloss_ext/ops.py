"""The autograd of the C++ operators.

Each differentiable operator is a `torch.autograd.Function` over ``torch.ops.llmloss.*``. Backward
runs the gradient kernel; under ``create_graph=True`` and under torch.func transforms it runs the
differentiable arithmetic of `llmloss_ext.composite` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmloss_ext import composite, fake
from llmloss_ext.composite import LogitOptions, LossOptions

__all__ = ["LIBRARY", "cross_entropy", "cross_entropy_inplace", "token_stats"]

LIBRARY = fake.LIBRARY
_ops = torch.ops.llmloss

Dims = tuple[int | None, ...]


def _call(operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator; a target out of range becomes the IndexError that torch users know."""
    if torch.compiler.is_compiling():
        return operator(*args)
    try:
        return operator(*args)
    except RuntimeError as error:
        message = str(error)
        if message.startswith("Target "):
            raise IndexError(message) from None
        raise


def in_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp ...) is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active()


def _needs_differentiable_backward() -> bool:
    # Backward runs with gradients enabled exactly under create_graph=True. While compiling, torch
    # traces it with gradients enabled or not at will, and a compiled graph has no second order.
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or in_transform()


def _vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    input: Tensor,
    logit_scale: Tensor | None,
    grads: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None]:
    """Differentiable gradients of input and logit_scale by torch."""
    if logit_scale is None:
        _, pullback = torch.func.vjp(lambda z: function(z, None), input)
        return pullback(grads)[0], None
    _, pullback = torch.func.vjp(function, input, logit_scale)
    return pullback(grads)


def _jvp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    input: tuple[Tensor, Tensor | None],
    logit_scale: tuple[Tensor | None, Tensor | None],
) -> Tensor | tuple[Tensor, ...]:
    """Forward-mode derivative of ``function`` of (primal, tangent) pairs, by torch."""

    def tangent_of(primal: Tensor, tangent: Tensor | None) -> Tensor:
        return torch.zeros_like(primal) if tangent is None else tangent

    primals: tuple[Tensor, ...] = (input[0],)
    tangents: tuple[Tensor, ...] = (tangent_of(*input),)
    if logit_scale[0] is None:
        return torch.func.jvp(lambda z: function(z, None), primals, tangents)[1]
    primals += (logit_scale[0],)
    tangents += (tangent_of(logit_scale[0], logit_scale[1]),)
    return torch.func.jvp(function, primals, tangents)[1]


def _fold(batch: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """The vmapped dimension moved to the front, expanded where it is not there."""
    if tensor is None:
        return None
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _each(batch: int, function: Callable[..., Any], in_dims: Dims, args: tuple[Any, ...]) -> Any:
    """A loop instead of vmap, for class weights or scales that differ between the samples."""
    samples = [
        function(
            *(
                a if d is None or not isinstance(a, Tensor) else a.select(d, i)
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for i in range(batch)
    ]
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])


def _rows(folded: Tensor, row_dims: int) -> Tensor:
    """Merges the vmapped dimension with the rows: (batch, rows..., columns) -> 2 or 3 dims."""
    return folded if row_dims == 1 else folded.flatten(0, 1)


# --------------------------------------------------------------------------------- token_stats


class _TokenStats(Function):
    """The operator ``token_stats``: log_prob, lse, entropy, mean_log_prob, argmax, rank, state."""

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        return _call(_ops.token_stats, input, target, weight, logit_scale, *options, *wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, logit_scale, ctx.options, ctx.wanted = inputs
        _, _, entropy, _, argmax, rank, state = output
        ctx.mark_non_differentiable(argmax, rank, state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, logit_scale, entropy, state)
        ctx.save_for_forward(input, target, weight, logit_scale)

    @staticmethod
    def backward(
        ctx: Any,
        grad_log_prob: Tensor | None,
        grad_lse: Tensor | None,
        grad_entropy: Tensor | None,
        grad_mean: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor | None, ...]:
        input, target, weight, logit_scale, entropy, state = ctx.saved_tensors
        grads = (grad_log_prob, grad_lse, grad_entropy, grad_mean)
        if all(g is None for g in grads):
            return (None,) * 6
        if _needs_differentiable_backward():

            def used(z: Tensor, scale: Tensor | None) -> tuple[Tensor, ...]:
                stats = composite.token_stats(z, target, weight, scale, ctx.options)
                return tuple(s for s, g in zip(stats, grads, strict=True) if g is not None)

            given = tuple(g for g in grads if g is not None)
            grad_input, grad_scale = _vjp(used, input, logit_scale, given)
            return grad_input, None, None, grad_scale, None, None
        with_scale = ctx.needs_input_grad[3]
        grad_input, grad_scale = _ops.token_stats_backward(
            *grads, input, target, weight, logit_scale, *ctx.options, entropy, state, with_scale
        )
        scale = _like(grad_scale, logit_scale) if with_scale else None
        return grad_input, None, None, scale, None, None

    @staticmethod
    def jvp(
        ctx: Any, tangent: Tensor | None, _t: None, _w: None, scale_tangent: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        input, target, weight, logit_scale = ctx.saved_tensors

        def stats(z: Tensor, scale: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(composite.token_stats(z, target, weight, scale, ctx.options))

        log_prob, lse, entropy, mean = _jvp(stats, (input, tangent), (logit_scale, scale_tangent))
        with_entropy, with_mean, _rank = ctx.wanted
        return (
            log_prob,
            lse,
            entropy if with_entropy else entropy.new_empty(0),
            mean if with_mean else mean.new_empty(0),
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        input, target, weight, logit_scale, options, wanted = args
        batch = info.batch_size
        if in_dims[2] is not None or in_dims[3] is not None:
            return _each(batch, _TokenStats.apply, in_dims, args)
        row_dims = target.dim() - (in_dims[1] is not None)
        rows = _rows(_fold(batch, input, in_dims[0]), row_dims)
        targets = _rows(_fold(batch, target, in_dims[1]), row_dims)
        *stats, state = _TokenStats.apply(rows, targets, weight, logit_scale, options, wanted)
        shape = (batch, *(target.shape if in_dims[1] is None else targets.shape[1:]))
        if row_dims == 2:
            shape = (batch, -1, targets.shape[1])
        unfolded = [s.reshape(shape) if s.numel() else s.new_empty(batch, 0) for s in stats]
        state = state.reshape(len(state), batch, -1).movedim(1, 0)
        return (*unfolded, state), (0,) * 7


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad.reshape(parameter.shape).to(parameter.dtype)


# ------------------------------------------------------------------------------- cross_entropy


class _CrossEntropy(Function):
    """The operator ``cross_entropy``: loss, state, denominator."""

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
        loss: LossOptions,
    ) -> tuple[Tensor, ...]:
        return _call(
            _ops.cross_entropy,
            input,
            target,
            weight,
            token_weight,
            num_items,
            logit_scale,
            *options,
            *loss,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, token_weight, _num_items, logit_scale, ctx.options, ctx.loss = inputs
        _, state, denominator = output
        ctx.mark_non_differentiable(state, denominator)
        ctx.set_materialize_grads(False)
        saved = (input, target, weight, token_weight, logit_scale, state, denominator)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        input, target, weight, token_weight, logit_scale, state, denominator = ctx.saved_tensors
        with_target, with_scale = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
        grad_target = None
        if with_target or _needs_differentiable_backward():
            grad_input, grad_scale, grad_target = _CrossEntropy.differentiable_backward(
                ctx, grad_loss
            )
        else:
            grad_input, grad_scale = _ops.cross_entropy_backward(
                grad_loss,
                input,
                target,
                weight,
                token_weight,
                logit_scale,
                *ctx.options,
                ctx.loss.label_smoothing,
                ctx.loss.z_loss,
                state,
                denominator,
                with_scale,
            )
            grad_scale = _like(grad_scale, logit_scale) if with_scale else None
        return grad_input, grad_target, None, None, None, grad_scale, None, None

    @staticmethod
    def differentiable_backward(
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        input, target, weight, token_weight, logit_scale, _, denominator = ctx.saved_tensors

        def loss(z: Tensor, scale: Tensor | None, q: Tensor) -> Tensor:
            rows = composite.row_losses(z, q, weight, token_weight, scale, ctx.options, ctx.loss)
            return composite.reduce(rows, denominator, ctx.loss.reduction)

        if not ctx.needs_input_grad[1]:
            return *_vjp(lambda z, s: loss(z, s, target), input, logit_scale, grad_loss), None
        _, pullback = torch.func.vjp(lambda q: loss(input, logit_scale, q), target)
        grad_target = pullback(grad_loss)[0]
        return *_vjp(lambda z, s: loss(z, s, target), input, logit_scale, grad_loss), grad_target

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        input, target, weight, token_weight, logit_scale, _, denominator = ctx.saved_tensors
        tangent, target_tangent, scale_tangent = tangents[0], tangents[1], tangents[5]

        def loss(z: Tensor, scale: Tensor | None, q: Tensor = target) -> Tensor:
            rows = composite.row_losses(z, q, weight, token_weight, scale, ctx.options, ctx.loss)
            return composite.reduce(rows, denominator, ctx.loss.reduction)

        total = _jvp(loss, (input, tangent), (logit_scale, scale_tangent))
        if target_tangent is not None:
            by_target = torch.func.jvp(
                lambda q: loss(input, logit_scale, q), (target,), (target_tangent,)
            )[1]
            total = total + by_target
        return total, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        input, target, weight, token_weight, num_items, logit_scale, options, loss = args
        batch = info.batch_size
        if any(in_dims[i] is not None for i in (2, 4, 5)):
            return _each(batch, _CrossEntropy.apply, in_dims, args)
        probabilities = not composite.is_indices(target)
        row_dims = target.dim() - (in_dims[1] is not None) - probabilities
        inputs = _fold(batch, input, in_dims[0])
        targets = _fold(batch, target, in_dims[1])
        token_weights = _fold(batch, token_weight, in_dims[3])
        rows, state, _ = _CrossEntropy.apply(
            _rows(inputs, row_dims),
            _rows(targets, row_dims),
            weight,
            None if token_weights is None else _rows(token_weights, row_dims),
            None,
            logit_scale,
            options,
            loss._replace(reduction=0),
        )
        rows = rows.reshape(inputs.shape[:-1])
        state = state.reshape(len(state), batch, -1).movedim(1, 0)
        denominators = rows.new_empty(batch, 0)
        if loss.reduction == 1:
            denominators = (
                torch.stack(
                    [
                        composite.denominator(
                            inputs[i],
                            targets[i],
                            weight,
                            None if token_weights is None else token_weights[i],
                            options.ignore_index,
                        )
                        for i in range(batch)
                    ]
                )
                if num_items is None
                else num_items.to(rows.dtype).reshape(()).expand(batch)
            )
        if loss.reduction != 0:
            rows = rows.flatten(1).sum(1)
        if loss.reduction == 1:
            rows = rows / denominators
        return (rows, state, denominators), (0, 0, 0)


class _CrossEntropyEager(Function):
    """`_CrossEntropy` without what torch.func needs: a small call costs half as much."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _CrossEntropy.forward(*inputs)
        _CrossEntropy.setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_CrossEntropy.backward)


class _CrossEntropyInplace(Function):
    """The loss; the gradient is written over the input, in forward where that is exact.

    It is written in backward without a reduction, whose gradient is not known before, and for
    float16, where the loss scale of mixed-precision training must go in before the rounding: a
    gradient of 1 / N alone is subnormal.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
        loss: LossOptions,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.loss, ctx.spent = options, loss, False
        ctx.written = loss.reduction != 0 and input.dtype != torch.float16
        arguments = (target, weight, token_weight, num_items, logit_scale, *options, *loss)
        if ctx.written:
            logits = input.detach()  # the same memory and version counter
            with_scale = ctx.needs_input_grad[5]
            value, grad_scale = _call(_ops.cross_entropy_fused_, logits, *arguments, with_scale)
            _mark_written(logits)
            ctx.save_for_backward(logits, logit_scale, grad_scale)
        else:
            value, state, denominator = _call(_ops.cross_entropy, input, *arguments)
            logits = input.detach()
            ctx.save_for_backward(
                logits, target, weight, token_weight, logit_scale, state, denominator
            )
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        if _needs_differentiable_backward():
            raise RuntimeError(
                "cross_entropy(inplace=True) has no second-order gradient: its logits are gone. "
                "Use inplace=False with create_graph=True."
            )
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy(inplace=True): backward a second time, but the gradient that lay "
                "over the logits was handed out the first time. Use inplace=False with "
                "retain_graph=True."
            )
        saved = ctx.saved_tensors  # raises if the logits were written to meanwhile
        ctx.spent = True
        if ctx.written:
            logits, logit_scale, grad_scale = saved
            _ops.scale_(logits, grad_loss)
            grad_scale = grad_scale * grad_loss if ctx.needs_input_grad[5] else None
        else:
            logits, target, weight, token_weight, logit_scale, state, denominator = saved
            grad_scale = _ops.cross_entropy_backward_(
                grad_loss,
                logits,
                target,
                weight,
                token_weight,
                logit_scale,
                *ctx.options,
                ctx.loss.label_smoothing,
                ctx.loss.z_loss,
                state,
                denominator,
                ctx.needs_input_grad[5],
            )
        _mark_written(logits)
        grad_scale = _like(grad_scale, logit_scale) if ctx.needs_input_grad[5] else None
        return logits, None, None, None, None, grad_scale, None, None


def _mark_written(tensor: Tensor) -> None:
    """Lets autograd notice that what it saved is gone."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensor)


# ------------------------------------------------------------------------- for functional.py


def token_stats(*args: Any) -> tuple[Tensor, ...]:
    """`_TokenStats`."""
    return _TokenStats.apply(*args)  # type: ignore[no-untyped-call]


def cross_entropy(*args: Any) -> Tensor:
    """`_CrossEntropy`, by the cheapest way that the situation allows."""
    if torch.compiler.is_compiling() or in_transform():
        return _CrossEntropy.apply(*args)[0]  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        return _CrossEntropyEager.apply(*args)[0]  # type: ignore[no-untyped-call]
    return _CrossEntropy.forward(*args)[0]


def cross_entropy_inplace(*args: Any) -> Tensor:
    """`_CrossEntropyInplace`."""
    return _CrossEntropyInplace.apply(*args)  # type: ignore[no-untyped-call]
