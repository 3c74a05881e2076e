"""Distillation from logits; from hidden states it is `llmloss_ext.linear_kl_div`."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .. import composite
from ..checks import check_all_dense, items_tensor
from ..composite import real_of
from ..divergence import check_teacher, checked_direction, common_classes, divergence, divergence_of
from ..rowwise import by_rows

__all__ = ["distillation_loss", "top_k_distillation_loss"]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The divergence of a student's from a teacher's distribution, times T^2, in nats.

    ``"forward"``: KL(P || Q) = sum P (log P - log Q), P the teacher; ``"reverse"``: KL(Q || P);
    ``"jsd"``: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q
    (Hinton et al. 2015; Agarwal et al. 2024). Beside the gradient, nothing of the size of the
    logits is kept: float32 copies exist for a chunk of tokens at a time.

    Args:
        student_logits: (..., V). Rows of any stride are read in place.
        teacher_logits: (..., W), without a gradient.
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: Share of the teacher in M. At 0 and 1 the two KLs are taken, as trainers have it:
            "forward" and "reverse".
        temperature: T > 0.
        target: (...): tokens whose label is ``ignore_index`` take no part, whatever their logits
            hold; their gradient is exactly zero.
        ignore_index: See ``target``.
        reduction: ``"mean"`` over the tokens that take part, ``"sum"`` or ``"none"``.
        num_items: Replaces the number of tokens of the mean, e.g. by that of all micro-batches; of
            0 items the loss is 0.
        vocab_size: The distributions are over the first ``vocab_size`` classes, by default over all
            that both have: the heads of one family may be padded differently.

    Returns:
        0-d, or (...) for ``"none"``; float32 for 16-bit logits. The mean of no token is nan.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    direction = checked_direction(direction, beta, temperature)
    check_all_dense(
        {"student_logits": student_logits, "teacher_logits": teacher_logits}, {"target": target}
    )
    items = _checked_items(num_items, reduction, student_logits)
    has_classes = student_logits.dim() and teacher_logits.dim()
    if not has_classes or student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            "student and teacher must have logits (..., V) of the same tokens, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    check_teacher(teacher_logits)
    used = common_classes(student_logits.shape[-1], teacher_logits.shape[-1], vocab_size)
    valid = _valid(target, student_logits, ignore_index)
    rows = partial(divergence, direction=direction, beta=beta, temperature=temperature)
    student, teacher = student_logits[..., :used], teacher_logits[..., :used]
    return _reduced(by_rows(rows, student, (teacher,), valid), valid, reduction, items)


def _checked_items(num_items: int | Tensor | None, reduction: str, logits: Tensor) -> Tensor | None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    return items_tensor(num_items, reduction, logits)


def _valid(target: Tensor | None, logits: Tensor, ignore_index: int) -> Tensor | None:
    if target is None:
        return None
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have one label per token, {tuple(logits.shape[:-1])}, got "
            f"{tuple(target.shape)}"
        )
    return target != ignore_index


def _reduced(
    rows: Tensor, valid: Tensor | None, reduction: str, num_items: Tensor | None
) -> Tensor:
    """Of rows that are 0 where not valid."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return composite.total(rows)
    return composite.mean(rows, rows.numel() if valid is None else valid.sum(), num_items)


def top_k_distillation_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """A divergence from a teacher whose k largest log-probabilities were stored, times T^2.

    What the teacher's k tokens leave of its probability counts as one more outcome, whose student
    probability is what the student leaves: `distillation_loss` of the two coarser distributions,
    a lower bound of the whole one that is exact for k = V.

    Args:
        student_logits: (..., V). Rows of any stride are read in place.
        teacher_ids: (..., k) int64: different tokens.
        teacher_log_probs: (..., k), in nats: of the teacher's distribution at ``temperature``, that
            is of ``log_softmax(teacher_logits / temperature)``.
        direction: As in `distillation_loss`.
        beta: As in `distillation_loss`.
        temperature: T > 0, by which the student's logits are divided.
        target: (...): tokens whose label is ``ignore_index`` take no part, whatever the other
            arguments hold there; their gradient is exactly zero.
        ignore_index: See ``target``.
        reduction: ``"mean"`` over the tokens that take part, ``"sum"`` or ``"none"``.
        num_items: Replaces the number of tokens of the mean, e.g. by that of all micro-batches; of
            0 items the loss is 0.
        vocab_size: The student's distribution is over the first ``vocab_size`` classes, by default
            over all.

    Returns:
        0-d, or (...) for ``"none"``, in nats; float32 for 16-bit logits. The mean of no token is
        nan.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
        RuntimeError: A token outside [0, V).
    """
    direction = checked_direction(direction, beta, temperature)
    check_all_dense(
        {
            "student_logits": student_logits, "teacher_ids": teacher_ids,
            "teacher_log_probs": teacher_log_probs,
        },
        {"target": target},
    )  # fmt: skip
    items = _checked_items(num_items, reduction, student_logits)
    if (
        teacher_ids.shape != teacher_log_probs.shape
        or teacher_ids.shape[:-1] != student_logits.shape[:-1]
        or not student_logits.dim()
    ):
        raise ValueError(
            "expected student_logits (..., V), teacher_ids (..., k) and teacher_log_probs (..., k);"
            f" got {tuple(student_logits.shape)}, {tuple(teacher_ids.shape)} and "
            f"{tuple(teacher_log_probs.shape)}"
        )
    check_teacher(teacher_log_probs)
    valid = _valid(target, student_logits, ignore_index)
    rows = partial(_coarse_divergence, direction=direction, beta=beta, temperature=temperature)
    columns = student_logits.shape[-1]
    used = common_classes(columns, columns, vocab_size)
    student, others = student_logits[..., :used], (teacher_ids, teacher_log_probs)
    return _reduced(by_rows(rows, student, others, valid), valid, reduction, items)


def _coarse_divergence(
    student: Tensor, ids: Tensor, log_p: Tensor, direction: str, beta: float, temperature: float
) -> Tensor:
    """Of the k tokens and the rest, from logits (..., V), ids (..., k) and log-probs (..., k)."""
    real = real_of(student)
    log_q = torch.log_softmax(student.to(real) / temperature, -1)
    kept, log_p = log_q.gather(-1, ids), log_p.to(real)
    if ids.shape[-1] < student.shape[-1]:
        # From the other columns themselves: 1 - sum q would cancel.
        least = torch.finfo(real).min / 4  # -inf alone would have no gradient
        others = log_q.scatter(-1, ids, -math.inf).clamp_min(least)
        rest = torch.logsumexp(others, -1, keepdim=True)
        kept = torch.cat([kept, torch.where(rest < least / 2, -math.inf, rest)], -1)
        log_p = torch.cat([log_p, _log_rest(log_p, direction)], -1)
    return divergence_of(log_p, kept, direction, beta) * temperature**2


def _log_rest(log_p: Tensor, direction: str) -> Tensor:
    """Log(1 - sum p), where that is more than the sum's rounding."""
    eps = torch.finfo(log_p.dtype).eps
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    # "reverse" divides by it: as much as may be lost in rounding, rather than nothing.
    least = math.log(eps) if direction == "reverse" else -math.inf
    is_rounding = rest <= eps * log_p.shape[-1]
    return torch.where(is_rounding, least, torch.log(torch.where(is_rounding, 1.0, rest)))
