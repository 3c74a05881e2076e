"""The autograd of the C++ operators.

Each differentiable operator has two `torch.autograd.Function` classes that share their code: a
lean one, which a small call can afford and torch.compile can trace, and one with
``setup_context``, ``jvp`` and ``vmap``, which torch.func and forward mode need. Backward runs the
gradient kernel; under ``create_graph=True`` and under transforms it is derived from
`llmloss_ext.composite` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from llmloss_ext import composite, fake
from llmloss_ext.composite import LogitOptions, LossOptions

__all__ = ["LIBRARY", "cross_entropy", "cross_entropy_inplace", "in_transform", "token_stats"]

LIBRARY = fake.LIBRARY
_ops = torch.ops.llmloss

Dims = tuple[int | None, ...]
Tensors = tuple[Tensor, ...]
MaybeTensors = tuple[Tensor | None, ...]


def in_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp ...) or forward mode is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _needs_differentiable_backward() -> bool:
    # Backward runs with gradients enabled exactly under create_graph=True. A compiled graph has no
    # second order.
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _apply(forward: Any, lean: Any, full: Any, args: tuple[Any, ...]) -> Any:
    """The cheapest of an operator's three ways that the situation allows."""
    if in_transform():
        return full.apply(*args)
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return lean.apply(*args)
    return forward(*args)


class _Composite:
    """An operator's composite as a function of those of its inputs that have derivatives."""

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors, at: list[int]) -> None:
        self.function, self.inputs = function, inputs
        self.at = [i for i in at if inputs[i] is not None and inputs[i].is_floating_point()]

    def __call__(self, *primals: Tensor) -> Tensors:
        inputs = list(self.inputs)
        for i, primal in zip(self.at, primals, strict=True):
            inputs[i] = primal
        return self.function(*inputs)

    @property
    def primals(self) -> Tensors:
        return tuple(self.inputs[i] for i in self.at)

    def vjp(self, grads: Tensors) -> dict[int, Tensor]:
        """The gradients of the inputs, differentiable again, by position."""
        pullback: Any = torch.func.vjp(self, *self.primals)[1]
        return dict(zip(self.at, pullback(grads), strict=True))

    def jvp(self, tangents: MaybeTensors) -> Tensors:
        """The outputs' tangents, by reverse mode twice.

        The pullback is linear in its cotangents, and its transpose is the Jacobian. (Levels of
        forward mode do not nest.)
        """
        given = tuple(
            torch.zeros_like(self.inputs[i]) if tangents[i] is None else tangents[i]
            for i in self.at
        )
        outputs: Tensors
        pullback: Any
        outputs, pullback = torch.func.vjp(self, *self.primals)[:2]
        cotangents = tuple(torch.zeros_like(output) for output in outputs)
        transpose: Any = torch.func.vjp(pullback, cotangents)[1]
        tangents_out: Tensors = transpose(given)[0]
        return tangents_out


def _fold(batch: int, tensor: Tensor, dim: int | None) -> Tensor:
    """The vmapped dimension moved to the front, expanded where it is not there."""
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _rows(folded: Tensor, row_dims: int) -> Tensor:
    """Merges the vmapped dimension with the rows: operators take at most two dimensions of them."""
    return folded if row_dims == 1 else folded.flatten(0, 1)


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


def _batched_state(state: Tensor, batch: int) -> Tensor:
    return state.reshape(state.shape[0], batch, -1).movedim(1, 0)


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad.reshape(parameter.shape).to(parameter.dtype)


# --------------------------------------------------------------------------------- token_stats


def _token_stats_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    options: LogitOptions,
    wanted: tuple[bool, bool, bool],
) -> Tensors:
    """Returns log_prob, lse, entropy, mean_log_prob, argmax, rank, state."""
    return _ops.token_stats(input, target, weight, logit_scale, *options, *wanted)


def _token_stats_save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.options, ctx.wanted = inputs
    _, _, entropy, _, argmax, rank, state = output
    ctx.mark_non_differentiable(argmax, rank, state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, entropy, state)


class _TokenStats(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        output = _token_stats_forward(*inputs)
        _token_stats_save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> MaybeTensors:
        *inputs, entropy, state = ctx.saved_tensors
        grads = grads[:4]  # log_prob, lse, entropy, mean_log_prob
        if all(grad is None for grad in grads):
            return (None,) * 6
        if _needs_differentiable_backward():
            used = [i for i, grad in enumerate(grads) if grad is not None]
            stats = _TokenStats.composite(ctx, inputs, used)
            by_input = stats.vjp(tuple(grad for grad in grads if grad is not None))
            return by_input[0], None, None, by_input.get(3), None, None
        logit_scale, with_scale = inputs[3], ctx.needs_input_grad[3]
        grad_input, grad_scale = _ops.token_stats_backward(
            *grads, *inputs, *ctx.options, entropy, state, with_scale
        )
        grad_scale = _like(grad_scale, logit_scale) if with_scale else None
        return grad_input, None, None, grad_scale, None, None

    @staticmethod
    def composite(ctx: Any, inputs: Any, used: list[int]) -> _Composite:
        def stats(*tensors: Any) -> Tensors:
            input, target, weight, logit_scale = tensors
            all_stats = composite.token_stats(input, target, weight, logit_scale, ctx.options)
            return tuple(all_stats[i] for i in used)

        return _Composite(stats, inputs, [0, 3])


class _TokenStatsTransforms(Function):
    forward = staticmethod(_token_stats_forward)
    backward = staticmethod(_TokenStats.backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _token_stats_save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> MaybeTensors:
        inputs = ctx.saved_tensors[:4]
        stats = list(_TokenStats.composite(ctx, inputs, [0, 1, 2, 3]).jvp(tangents))
        for i, asked in zip((2, 3), ctx.wanted, strict=False):
            if not asked:
                stats[i] = stats[i].new_empty(0)
        return (*stats, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensors, tuple[int, ...]]:
        input, target, weight, logit_scale, *options = args
        batch = info.batch_size
        if in_dims[2] is not None or in_dims[3] is not None:
            return _each(batch, _TokenStatsTransforms.apply, in_dims, args)
        targets = _fold(batch, target, in_dims[1])
        row_dims = targets.dim() - 1
        *stats, state = _apply(
            _token_stats_forward,
            _TokenStats,
            _TokenStatsTransforms,
            (
                _rows(_fold(batch, input, in_dims[0]), row_dims),
                _rows(targets, row_dims),
                weight,
                logit_scale,
                *options,
            ),
        )
        stats = [s.reshape(targets.shape) if s.numel() else s.new_empty(batch, 0) for s in stats]
        return (*stats, _batched_state(state, batch)), (0,) * 7


def token_stats(*inputs: Any) -> Tensors:
    """The operator with its derivatives; arguments as `_token_stats_forward`."""
    return _apply(_token_stats_forward, _TokenStats, _TokenStatsTransforms, inputs)


# ------------------------------------------------------------------------------- cross_entropy


def _cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    logit_scale: Tensor | None,
    options: LogitOptions,
    loss: LossOptions,
) -> Tensors:
    """Returns loss, state, denominator."""
    tensors = (input, target, weight, token_weight, num_items, logit_scale)
    return _ops.cross_entropy(*tensors, *options, *loss)


def _cross_entropy_save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    input, target, weight, token_weight, _num_items, logit_scale, ctx.options, ctx.loss = inputs
    _, state, denominator = output
    ctx.mark_non_differentiable(state, denominator)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, token_weight, logit_scale, state, denominator)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        output = _cross_entropy_forward(*inputs)
        _cross_entropy_save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> MaybeTensors:
        if grad_loss is None:
            return (None,) * 8
        *inputs, state, denominator = ctx.saved_tensors
        # The gradient of probability targets is not a kernel's work.
        if ctx.needs_input_grad[1] or _needs_differentiable_backward():
            grads = _CrossEntropy.composite(ctx, inputs, denominator).vjp((grad_loss,))
            return grads[0], grads.get(1), None, None, None, grads.get(4), None, None
        logit_scale, with_scale = inputs[4], ctx.needs_input_grad[5]
        label_smoothing, z_loss, _reduction = ctx.loss
        grad_input, grad_scale = _ops.cross_entropy_backward(
            grad_loss,
            *inputs,
            *ctx.options,
            label_smoothing,
            z_loss,
            state,
            denominator,
            with_scale,
        )
        grad_scale = _like(grad_scale, logit_scale) if with_scale else None
        return grad_input, None, None, None, None, grad_scale, None, None

    @staticmethod
    def composite(ctx: Any, inputs: Any, denominator: Tensor) -> _Composite:
        options: Any = (ctx.options, ctx.loss)

        def loss(*tensors: Any) -> Tensors:
            rows = composite.row_losses(*tensors, *options)
            return (composite.reduce(rows, denominator, ctx.loss.reduction),)

        return _Composite(loss, inputs, [0, 1, 4])


class _CrossEntropyTransforms(Function):
    forward = staticmethod(_cross_entropy_forward)
    backward = staticmethod(_CrossEntropy.backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _cross_entropy_save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], inputs[5], *output[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> MaybeTensors:
        *inputs, _state, denominator = ctx.saved_tensors
        by_input = (*tangents[:4], tangents[5])
        return *_CrossEntropy.composite(ctx, inputs, denominator).jvp(by_input), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensors, tuple[int, ...]]:
        input, target, weight, token_weight, num_items, logit_scale, options, loss = args
        batch = info.batch_size
        if any(in_dims[i] is not None for i in (2, 4, 5)):
            return _each(batch, _CrossEntropyTransforms.apply, in_dims, args)
        inputs = _fold(batch, input, in_dims[0])
        targets = _fold(batch, target, in_dims[1])
        row_dims = inputs.dim() - 2
        token_weights = None
        if token_weight is not None:
            token_weights = _fold(batch, token_weight, in_dims[3])
        rows, state, _ = _apply(
            _cross_entropy_forward,
            _CrossEntropy,
            _CrossEntropyTransforms,
            (
                _rows(inputs, row_dims),
                _rows(targets, row_dims),
                weight,
                None if token_weights is None else _rows(token_weights, row_dims),
                None,
                logit_scale,
                options,
                loss._replace(reduction=0),
            ),
        )
        losses = rows.reshape(inputs.shape[:-1])
        denominators = rows.new_empty(batch, 0)
        if loss.reduction != 0:
            losses = losses.flatten(1).sum(1)
        if loss.reduction == 1:
            if num_items is None:
                weights = composite.denominators(
                    inputs, targets, weight, token_weights, options.ignore_index
                )
                denominators = weights.flatten(1).sum(1)
            else:
                denominators = num_items.to(rows.dtype).reshape(()).expand(batch)
            losses = losses / denominators
        return (losses, _batched_state(state, batch), denominators), (0, 0, 0)


def cross_entropy(*inputs: Any) -> Tensor:
    """The operator with its derivatives; arguments as `_cross_entropy_forward`."""
    functions = (_cross_entropy_forward, _CrossEntropy, _CrossEntropyTransforms)
    return _apply(*functions, inputs)[0]


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
            value, grad_scale = _ops.cross_entropy_fused_(logits, *arguments, with_scale)
            _mark_written(logits)
            ctx.save_for_backward(logits, logit_scale, grad_scale)
        else:
            value, state, denominator = _ops.cross_entropy(input, *arguments)
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


def cross_entropy_inplace(*inputs: Any) -> Tensor:
    """`cross_entropy` whose gradient lies over its input; one backward, of first order."""
    return _CrossEntropyInplace.apply(*inputs)  # type: ignore[no-untyped-call]
