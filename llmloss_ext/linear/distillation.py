"""Divergence between two chunked projections: the loop of the linear losses with two logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmloss_ext.composite import real_of
from llmloss_ext.linear.loop import Gradients, Projection, take
from llmloss_ext.linear.operators import gradient_factor
from llmloss_ext.linear.planning import plan
from llmloss_ext.ops import in_transform

__all__ = ["check_divergence", "divergence", "kl_div", "row_divergence"]


def check_divergence(direction: str, beta: float, temperature: float) -> None:
    """Raises a ValueError if an option of `divergence` is out of range."""
    if direction not in ("forward", "reverse", "jsd"):
        raise ValueError(f'direction must be "forward", "reverse" or "jsd", got {direction!r}')
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")


def divergence(
    student: Tensor, teacher: Tensor, direction: str, beta: float, temperature: float
) -> Tensor:
    """Each row's divergence times T^2, from logits (rows, V), in float32 or float64.

    A probability of zero in the distribution that is averaged over counts as nothing.
    """
    real = real_of(student)
    log_q = torch.log_softmax(student.to(real) / temperature, -1)
    log_p = torch.log_softmax(teacher.to(real) / temperature, -1)
    if direction == "forward":
        rows = _kl(log_p, log_q)
    elif direction == "reverse":
        rows = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return rows * temperature**2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


class _Rows(Function):
    """`divergence` of whole logits, whose float32 copies exist for a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        options: tuple[str, float, float],
        chunk_rows: int,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.options, ctx.chunk_rows = options, chunk_rows
        pairs = zip(*(torch.split(t, chunk_rows) for t in (student, teacher)), strict=True)
        return torch.cat([divergence(q, p, *options) for q, p in pairs])

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            rows = divergence(student, teacher, *ctx.options)
            (gradient,) = torch.autograd.grad(rows, student, grad_rows, create_graph=True)
            return gradient, None, None, None
        gradient = torch.empty_like(student)
        parts = (torch.split(t, ctx.chunk_rows) for t in (student, teacher, grad_rows, gradient))
        for q, p, upstream, out in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = q.detach().requires_grad_()
                rows = divergence(leaf, p, *ctx.options)
            out.copy_(torch.autograd.grad(rows, leaf, upstream)[0])
        return gradient, None, None, None


def row_divergence(student: Tensor, teacher: Tensor, options: tuple[str, float, float]) -> Tensor:
    """`divergence` of logits (N, V), with the memory of one gradient and little more."""
    if in_transform() or torch.compiler.is_compiling() or not student.numel():
        return divergence(student, teacher, *options)
    rows, columns = student.shape
    chunk_rows = plan(rows, 1, columns, student.dtype, student.device).chunk_tokens
    result: Tensor = _Rows.apply(student, teacher, options, chunk_rows)  # type: ignore[no-untyped-call]
    return result


class _Divergence(Function):
    """The gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        valid: Tensor | None,
        options: tuple[str, float, float],
        mean: bool,
        chunk_tokens: int,
    ) -> Tensor:
        projection = Projection(student, student_weight, student_bias)
        other = Projection(teacher, teacher_weight, teacher_bias)
        needs = ctx.needs_input_grad[:3]
        real = real_of(student)
        gradients = Gradients(projection, needs, real)
        count = student.shape[0] if valid is None else valid.sum()
        divisor = torch.as_tensor(count if mean else 1, dtype=real, device=student.device)
        factor = gradient_factor(student, divisor)
        loss = torch.zeros((), dtype=torch.float64, device=student.device) / divisor
        for chunk in projection.chunks(chunk_tokens, valid):
            hidden = take(teacher, chunk.rows)
            teacher_logits = hidden.new_empty(hidden.shape[0], other.weight.shape[0])
            other.project(hidden, teacher_logits)
            with torch.enable_grad():
                leaf = chunk.logits.detach().requires_grad_(any(needs))
                part = divergence(leaf, teacher_logits, *options).sum() / (divisor * factor)
            if any(needs):
                (gradient,) = torch.autograd.grad(part, leaf)
                chunk.logits.copy_(gradient)
                gradients.add(chunk)
            loss += part.detach() * factor
            del chunk, leaf, part, teacher_logits
        ctx.set_materialize_grads(False)
        results = (gradients.hidden, gradients.weight_result(student_weight.dtype), gradients.bias)
        ctx.save_for_backward(*results, factor)
        ctx.dtypes = (student.dtype, student_weight.dtype,
                      None if student_bias is None else student_bias.dtype)  # fmt: skip
        return loss.to(real)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 10
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_kl_div has no second-order gradient")
        *gradients, factor = ctx.saved_tensors
        factor = factor * grad_loss
        results = (
            None if g is None else (g * factor).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*results, *(None,) * 7)


def kl_div(*inputs: Any) -> Tensor:
    """The loss over the rows; arguments as `_Divergence.forward`."""
    return _Divergence.apply(*inputs)  # type: ignore[no-untyped-call]
