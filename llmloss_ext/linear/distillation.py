"""Divergence between two chunked projections: the loop of the linear losses with two logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmloss_ext import fake
from llmloss_ext.composite import real_of
from llmloss_ext.linear.autograd import needs_gradients
from llmloss_ext.linear.chunked import _or_empty, gradient_dtype, gradient_factor
from llmloss_ext.linear.loop import Gradients, Projection, take
from llmloss_ext.linear.rowwise import COPIES

__all__ = ["check_divergence", "divergence", "divergence_of", "kl_div"]

LIBRARY = fake.LIBRARY


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
    """Each row's divergence times T^2, from logits (..., V), in float32 or float64."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return divergence_of(log_p, log_q, direction, beta) * temperature**2


def divergence_of(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> Tensor:
    """Each row's divergence, P the teacher and Q the student, from log-probabilities (..., V).

    A probability of zero in the distribution that is averaged over counts as nothing.
    """
    if direction == "forward":
        return _kl(log_p, log_q)
    if direction == "reverse":
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    real = real_of(student)
    log_q, log_p = (torch.log_softmax(t.to(real) / temperature, -1) for t in (student, teacher))
    return log_q, log_p


def _log_ratio(log_p: Tensor, p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), and 0 where p = 0: what is not averaged over has no gradient either."""
    return torch.where(p == 0, 0.0, log_p - log_q)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * _log_ratio(log_p, p, log_q)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Log(beta p + (1 - beta) q); log 0 is the lowest number, since -inf has no gradient here."""
    least = torch.finfo(log_p.dtype).min / 4
    one, other = log_p.clamp_min(least), log_q.clamp_min(least)
    return torch.logaddexp(one + math.log(beta), other + math.log1p(-beta))


def _with_gradient(
    student: Tensor, teacher: Tensor, direction: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """`divergence` and its gradient with respect to the student's logits.

    With d = log q - log p ("reverse") or log q - log m ("jsd"): T (q - p) for "forward", else
    T q (d - sum q d), for "jsd" times 1 - beta.
    """
    log_q, log_p = _log_probs(student, teacher, temperature)
    q = log_q.exp()
    if direction == "forward":
        rows, gradient = _kl(log_p, log_q), q - log_p.exp()
    else:
        other = log_p if direction == "reverse" else _log_mixture(log_p, log_q, beta)
        ratio = _log_ratio(log_q, q, other)
        rows = (q * ratio).sum(-1)
        gradient = q * (ratio - rows.unsqueeze(-1))
        if direction == "jsd":
            rows = beta * _kl(log_p, other) + (1 - beta) * rows
            gradient *= 1 - beta
    return rows * temperature**2, gradient * temperature


def _loss_of_chunk(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    scale: Tensor,
    options: tuple[str, float, float],
    needs_grad: bool,
) -> Tensor:
    """The sum over rows, in float64; their gradient times ``scale`` overwrites the logits.

    Only some rows at a time have float32 copies. Rows that are not valid count as 0.
    """
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    step = -(-len(student) // COPIES)
    for begin in range(0, len(student), step):
        q, p = student[begin : begin + step], teacher[begin : begin + step]
        keep = None if valid is None else valid[begin : begin + step]
        x, y = (q, p) if keep is None else (torch.where(keep[:, None], t, 0) for t in (q, p))
        if needs_grad:
            rows, gradient = _with_gradient(x, y, *options)
            gradient *= scale if keep is None else torch.where(keep, scale, 0.0)[:, None]
            q.copy_(gradient)
        else:
            rows = divergence(x, y, *options)
        total += (rows if keep is None else torch.where(keep, rows, 0.0)).double().sum()
    return total


@torch.library.custom_op("llmloss::linear_divergence", mutates_args=())
def linear_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    valid: Tensor | None,
    direction: str,
    beta: float,
    temperature: float,
    mean: bool,
    chunk_tokens: int,
    drop_ignored: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of student, student_weight and student_bias, and their factor.

    ``needs`` says which gradients; those not asked for come back without elements.
    """
    projection = Projection(student, student_weight, student_bias)
    other = Projection(teacher, teacher_weight, teacher_bias)
    real = real_of(student)
    of_weight = gradient_dtype(student, student_weight)
    gradients = Gradients(projection, (needs[0], needs[1], needs[2]), real, of_weight)
    count = student.shape[0] if valid is None else valid.sum()
    divisor = torch.as_tensor(count if mean else 1, device=student.device).to(real)
    factor = gradient_factor(student, divisor)
    options = (direction, beta, temperature)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for chunk in projection.chunks(chunk_tokens, valid if drop_ignored else None):
        hidden = take(teacher, chunk.rows)
        teacher_logits = hidden.new_empty(hidden.shape[0], other.weight.shape[0])
        other.project(hidden, teacher_logits)
        keep = None if valid is None or drop_ignored else take(valid, chunk.rows)
        scale = 1 / (divisor * factor)
        total += _loss_of_chunk(chunk.logits, teacher_logits, keep, scale, options, any(needs))
        if any(needs):
            gradients.add(chunk)
        del chunk, teacher_logits
    return (
        (total / divisor).to(real),
        _or_empty(gradients.hidden, student),
        _or_empty(gradients.weight_result(), student),
        _or_empty(gradients.bias, student),
        factor,
    )


@linear_divergence.register_fake
def _linear_divergence_fake(  # type: ignore[no-untyped-def]
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, valid, direction,
    beta, temperature, mean, chunk_tokens, drop_ignored, needs,
):  # fmt: skip
    real = real_of(student)
    scalar = student.new_empty((), dtype=real)
    empty = student.new_empty
    has_bias = needs[2] and student_bias is not None
    of_weight = gradient_dtype(student, student_weight)
    return (
        scalar,
        empty(student.shape if needs[0] else 0),
        empty(student_weight.shape, dtype=of_weight) if needs[1] else empty(0),
        empty(student_bias.shape, dtype=real) if has_bias else empty(0),
        torch.empty_like(scalar),
    )


class _Divergence(Function):
    """The gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        *others: Any,
    ) -> Tensor:
        inputs = (student, student_weight, student_bias)
        loss, *results = linear_divergence(*inputs, *others)
        ctx.needs = others[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*results)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 14
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_kl_div has no second-order gradient")
        *gradients, factor = ctx.saved_tensors
        factor = factor * grad_loss
        results = [
            (g * factor).to(dtype) if asked else None
            for g, dtype, asked in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        ]
        return (*results, *(None,) * 11)


def kl_div(*inputs: Any) -> Tensor:
    """The loss over the rows; arguments as `linear_divergence` but for ``needs``."""
    needs = list(needs_gradients(inputs[:3]))
    return _Divergence.apply(*inputs, needs)  # type: ignore[no-untyped-call]
