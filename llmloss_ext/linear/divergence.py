"""Distillation from hidden states: the divergence between two chunked projections."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_all_dense, items_tensor
from ..composite import items_denominator, real_of
from ..divergence import (
    COPIES,
    check_teacher,
    checked_direction,
    common_classes,
    divergence,
    divergence_with_gradient,
)
from ..entry import entry_point
from ..ops import in_transform
from ..ops.namespace import qualified
from ..ops.rows import take
from ..options import documented
from .operators import needs_gradients, pack_limit, unpack_limit
from .planning import chunk_limit, dtype_of_logits
from .projection import (
    Gradients,
    Projection,
    as_rows,
    check_projection,
    to_dtype_of_products,
)
from .walk import gradient_dtype, gradient_factor, or_empty

__all__ = ["linear_kl_div"]


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
            rows, gradient = divergence_with_gradient(x, y, *options)
            gradient *= scale if keep is None else torch.where(keep, scale, 0.0)[:, None]
            q.copy_(gradient)
        else:
            rows = divergence(x, y, *options)
        total += (rows if keep is None else torch.where(keep, rows, 0.0)).double().sum()
    return total


class _Student(NamedTuple):
    """What may have a gradient, or one thing for each of them."""

    hidden: Any = None
    """(N, D), in the dtype of the products."""
    weight: Any = None
    bias: Any = None


class _Others(NamedTuple):
    """What has none, in the order of the operator."""

    teacher: Any = None
    teacher_weight: Any = None
    teacher_bias: Any = None
    valid: Any = None
    """(N) bool; None: all tokens take part."""
    direction: Any = None
    beta: Any = None
    temperature: Any = None
    mean: Any = None
    num_items: Any = None
    """Replaces the number of tokens of the mean, 0-d."""
    vocab_size: Any = None
    """The classes that are compared."""
    limit: Any = None
    """Of the chunks, packed."""
    drop_ignored: Any = None
    has_float32_logits: Any = None
    """Also those of 16-bit products."""
    needs: Any = None


@torch.library.custom_op(qualified("linear_divergence"), mutates_args=())
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
    num_items: Tensor | None,
    vocab_size: int,
    limit: Sequence[int],
    drop_ignored: bool,
    has_float32_logits: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of student, student_weight and student_bias, and their factor.

    ``needs`` says which gradients; those not asked for come back without elements.
    """
    student_of, teacher_of = (
        (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias),
    )  # fmt: skip
    projection, other = (
        Projection(*operands, vocab_size, has_float32_logits=has_float32_logits)
        for operands in (student_of, teacher_of)
    )
    real = real_of(student)
    asked = _Student(*needs)
    gradients = Gradients(
        projection, asked.hidden, asked.weight, asked.bias, real,
        gradient_dtype(student, student_weight),
    )  # fmt: skip
    count = student.shape[0] if valid is None else valid.sum()
    divisor = torch.as_tensor(count if mean else 1, device=student.device).to(real)
    if num_items is not None:
        divisor, _ = items_denominator(num_items, real)
    factor = gradient_factor(student, divisor)
    options = (direction, beta, temperature)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for chunk in projection.chunks(unpack_limit(limit), valid, drop=drop_ignored):
        hidden = take(teacher, chunk.rows)
        teacher_logits = hidden.new_empty(hidden.shape[0], vocab_size, dtype=other.logits_dtype)
        other.project(hidden, teacher_logits)
        student_logits = chunk.logits[:, :vocab_size]
        scale = 1 / (divisor * factor)
        total += _loss_of_chunk(
            student_logits, teacher_logits, chunk.counts, scale, options, any(needs)
        )
        if any(needs):
            gradients.add(chunk)
        del chunk, student_logits, teacher_logits
    return (
        (total / divisor).to(real),
        or_empty(gradients.hidden, student),
        or_empty(gradients.weight_result(), student),
        or_empty(gradients.bias, student),
        factor,
    )


@linear_divergence.register_fake
def _(  # type: ignore[no-untyped-def]
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, valid, direction,
    beta, temperature, mean, num_items, vocab_size, limit, drop_ignored, has_float32_logits, needs,
):  # fmt: skip
    real, asked = real_of(student), _Student(*needs)
    scalar = student.new_empty((), dtype=real)
    empty = student.new_empty
    has_bias = asked.bias and student_bias is not None
    of_weight = gradient_dtype(student, student_weight)
    return (
        scalar,
        empty(student.shape if asked.hidden else 0),
        empty(student_weight.shape, dtype=of_weight) if asked.weight else empty(0),
        empty(student_bias.shape, dtype=real) if has_bias else empty(0),
        torch.empty_like(scalar),
    )


class LinearDivergence(Function):
    """The gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """The loss; arguments: a `_Student` and its `_Others`."""
        count = len(_Student._fields)
        student, others = _Student(*args[:count]), _Others(*args[count:])
        loss, *results = linear_divergence(*student, *others)
        ctx.needs = others.needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*results)
        ctx.dtypes = [None if t is None else t.dtype for t in student]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        """Multiplies what the forward pass has left by the gradient of the loss."""
        if grad_loss is None:
            return (*_Student(), *_Others())
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_kl_div has no second-order gradient")
        *gradients, factor = ctx.saved_tensors
        factor = factor * grad_loss
        results = (
            (g * factor).to(dtype) if asked else None
            for g, dtype, asked in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        )
        return (*results, *_Others())


@entry_point("student_hidden", "teacher_hidden", "target")
@partial(
    documented,
    names=("num_items", "chunk_tokens", "max_chunk_bytes", "drop_ignored", "logits_dtype"),
)
def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Distillation: the divergence of two projections' distributions, neither in memory whole.

    With P the teacher's and Q the student's distribution at ``temperature`` T, per token:
    ``"forward"``: KL(P || Q) = sum P (log P - log Q); ``"reverse"``: KL(Q || P);
    ``"jsd"``: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.
    Each times T^2, which keeps the gradient's size (Hinton et al. 2015).

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., E), without a gradient.
        teacher_weight: (W, E), without a gradient.
        student_bias: (V).
        teacher_bias: (W).
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: Share of the teacher in M. At 0 and 1 the two KLs are taken, as trainers have it:
            "forward" and "reverse".
        temperature: > 0.
        target: Labels (...), where given, tell which tokens are ignored; nothing else.
        ignore_index: Tokens with this label take no part.
        reduction: ``"mean"`` over the tokens that take part, or ``"sum"``.
        vocab_size: The distributions are over the first ``vocab_size`` classes, by default over all
            that both weights have: the heads of one family may be padded differently.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        The loss, 0-d, in nats; the mean of no token is nan.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        RuntimeError: A wrong dtype.
    """
    direction = checked_direction(direction, beta, temperature)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'linear_kl_div: reduction must be "mean" or "sum", got {reduction!r}')
    check_all_dense(
        {
            "student_hidden": student_hidden, "student_weight": student_weight,
            "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight,
        },
        {"student_bias": student_bias, "teacher_bias": teacher_bias, "target": target},
    )  # fmt: skip
    is_wide = [
        check_projection(student_hidden, student_weight, student_bias, logits_dtype),
        check_projection(teacher_hidden, teacher_weight, teacher_bias, logits_dtype),
    ]
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same tokens, got {tuple(student_hidden.shape)} "
            f"and {tuple(teacher_hidden.shape)}"
        )
    vocab_size = common_classes(student_weight.shape[0], teacher_weight.shape[0], vocab_size)
    if target is not None and target.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"target must have one label per token, shape {tuple(student_hidden.shape[:-1])}, got "
            f"{tuple(target.shape)}"
        )
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    check_teacher(*teacher)
    if in_transform():
        raise RuntimeError("linear_kl_div does not work under torch.func transforms")
    hidden = as_rows(to_dtype_of_products(student_hidden, student_weight))
    dtype = dtype_of_logits(hidden.dtype, has_float32_logits=is_wide[0])
    limit = chunk_limit(
        student_weight.shape[0], dtype, hidden.device.type, chunk_tokens, max_chunk_bytes
    )
    valid = None if target is None else (target != ignore_index).reshape(-1)
    if drop_ignored is None:
        drop_ignored = hidden.device.type == "cpu"
    student = _Student(hidden, student_weight, student_bias)
    others = _Others(
        teacher=as_rows(to_dtype_of_products(teacher_hidden, teacher_weight)),
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        valid=valid,
        direction=direction,
        beta=beta,
        temperature=temperature,
        mean=reduction == "mean",
        num_items=items_tensor(num_items, reduction, student_hidden),
        vocab_size=vocab_size,
        limit=pack_limit(limit),
        drop_ignored=drop_ignored and valid is not None,
        has_float32_logits=any(is_wide),
        needs=needs_gradients(student),
    )
    return LinearDivergence.apply(*student, *others)  # type: ignore[no-untyped-call]
