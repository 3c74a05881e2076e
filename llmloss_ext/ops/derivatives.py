"""What the operators' autograd has in common: when which derivative is asked for, and vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Dims = tuple[int | None, ...]
Tensors = tuple[Tensor, ...]
MaybeTensors = tuple[Tensor | None, ...]


def in_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp ...) or forward mode is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def can_read(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at without waiting, and without breaking a graph."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not in_transform()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def must_be_opaque(tensor: Tensor) -> bool:
    """Whether a tracer, a fake tensor or a FLOP counter looks on: then only operators will do."""
    return (
        torch.compiler.is_compiling()
        or tensor.device.type not in ("cpu", "cuda")
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def needs_differentiable_backward() -> bool:
    """Whether a backward that runs now is to be differentiable itself.

    Backward runs with gradients enabled exactly under create_graph=True. A compiled graph has no
    second order.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _is_batched(grad: Any) -> bool:
    return isinstance(grad, Tensor) and bool(torch._C._functorch.is_legacy_batchedtensor(grad))


def _level(batched: Tensor) -> int:
    """The innermost vmap that a gradient is of.

    Asked of the gradient, not of this thread: the one that runs backward on a CUDA device is in no
    vmap. At a level that it is not of, a tensor gets a dimension of any size: here 0.
    """
    of_it = (
        level
        for level in reversed(range(1, 65))  # torch has no more
        if len(torch._remove_batch_dim(batched, level, 0, 0))
    )
    return next(of_it)


def one_gradient_at_a_time(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward, also for a gradient that stands for several.

    ``is_grads_batched`` and vectorised Jacobians pass such, which no kernel understands.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling() or not any(map(_is_batched, grads)):
            return backward(ctx, *grads)
        level = max(_level(grad) for grad in grads if _is_batched(grad))
        # One dimension of several gradients in front of each tensor, and none of others.
        several: list[Any] = [
            torch._remove_batch_dim(grad, level, 1, 0) if _is_batched(grad) else grad
            for grad in grads
        ]
        count = next(len(x) for x, grad in zip(several, grads, strict=True) if _is_batched(grad))
        results = [
            backward(
                ctx,
                *(x[k] if _is_batched(grad) else x for x, grad in zip(several, grads, strict=True)),
            )
            for k in range(count)
        ]
        return tuple(
            None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
            for parts in zip(*results, strict=True)
        )

    return run


def apply(forward: Any, lean: Any, full: Any, args: tuple[Any, ...]) -> Any:
    """The cheapest of an operator's three ways that the situation allows."""
    if in_transform():
        return full.apply(*args)
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return lean.apply(*args)
    return forward(*args)


class Composite:
    """An operator's composite as a function of those of its inputs that have derivatives.

    Args:
        function: Of the inputs, in their order.
        inputs: A NamedTuple of tensors.
        names: The fields of ``inputs`` that may have a derivative.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: Any, names: Sequence[str]) -> None:
        self.function, self.inputs = function, inputs
        given = {name: getattr(inputs, name) for name in names}
        self.given = {
            name: x for name, x in given.items() if x is not None and x.is_floating_point()
        }

    def __call__(self, *primals: Tensor) -> Tensors:
        """The outputs, from the inputs that may have a derivative."""
        named = dict(zip(self.given, primals, strict=True))
        return self.function(*self.inputs._replace(**named))

    def vjp(self, grads: Tensors) -> dict[str, Tensor]:
        """The gradients of the inputs, differentiable again, by name."""
        pullback: Any = torch.func.vjp(self, *self.given.values())[1]
        return dict(zip(self.given, pullback(grads), strict=True))

    def jvp(self, tangents: Any) -> Tensors:
        """The outputs' tangents, by reverse mode twice; ``tangents`` is like the inputs.

        The pullback is linear in its cotangents, and its transpose is the Jacobian. (Levels of
        forward mode do not nest.)
        """
        given = []
        for name, primal in self.given.items():
            tangent = getattr(tangents, name)
            given.append(torch.zeros_like(primal) if tangent is None else tangent)
        outputs: Tensors
        pullback: Any
        outputs, pullback = torch.func.vjp(self, *self.given.values())[:2]
        cotangents = tuple(torch.zeros_like(output) for output in outputs)
        transpose: Any = torch.func.vjp(pullback, cotangents)[1]
        tangents_out: Tensors = transpose(tuple(given))[0]
        return tangents_out


def fold(batch: int, tensor: Tensor, dim: int | None) -> Tensor:
    """The vmapped dimension moved to the front, expanded where it is not there."""
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def merge_rows(folded: Tensor, row_dims: int) -> Tensor:
    """Merges the vmapped dimension with the rows: operators take at most two dimensions of them."""
    return folded if row_dims == 1 else folded.flatten(0, 1)


def each_sample(
    batch: int, function: Callable[..., Any], in_dims: Dims, args: tuple[Any, ...]
) -> Any:
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


def batched_state(state: Tensor, batch: int) -> Tensor:
    """The state of vmapped rows, with the vmapped dimension in front."""
    return state.reshape(state.shape[0], batch, -1).movedim(1, 0)


def like_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the shape and dtype of its parameter."""
    return grad.reshape(parameter.shape).to(parameter.dtype)


def mark_written(tensor: Tensor) -> None:
    """Lets autograd notice that what it saved is overwritten."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensor)
