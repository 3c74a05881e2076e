"""Distillation from logits; from hidden states it is in `llmloss_ext.linear`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import composite, functional
from ..checks import check_all_dense, items_tensor
from ..divergence import (
    DIVERGENCE_OPTIONS,
    Distillation,
    DistillationLoss,
    DivergenceOptions,
    coarse_divergence,
    common_classes,
    divergence,
)
from ..options import documented, spelled_out
from ..rowwise import by_rows

__all__ = [
    "DistillationLoss",
    "distillation_loss",
    "hard_soft_distillation_loss",
    "top_k_distillation_loss",
]

_OF_DIVERGENCE = ("direction", "beta", "skew_alpha", "temperature")
_OF_REDUCTION = ("ignore_index", "reduction", "num_items")


@partial(
    documented,
    names=(*_OF_DIVERGENCE, *_OF_REDUCTION, "vocab_size"),
    table=DIVERGENCE_OPTIONS,
)
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_log_probs: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The divergence of a student's from a teacher's distribution, times T^2, in nats.

    Beside the gradient, nothing of the size of the logits is kept: float32 copies exist for a chunk
    of tokens at a time.

    Args:
        student_logits: (..., V). Rows of any stride are read in place.
        teacher_logits: (..., W), taken as a constant.
        teacher_log_probs: (..., W) in their place: log_softmax(teacher_logits / T). They are
            normalised once more, so that 16 bits and a smaller ``vocab_size`` are right.
        Options: each is described in `llmloss_ext.options`.
        target: (...): their labels, of which ``ignore_index`` alone is looked at.

    Returns:
        0-d, or (...) for ``"none"``; float32 for 16-bit logits. The mean of no token is nan.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    options = DivergenceOptions.of(
        direction, beta, skew_alpha, temperature, is_log_probs=teacher_logits is None
    )
    check_all_dense(
        {"student_logits": student_logits},
        {
            "teacher_logits": teacher_logits, "teacher_log_probs": teacher_log_probs,
            "target": target,
        },
    )  # fmt: skip
    teacher = _teacher(teacher_logits, teacher_log_probs)
    items = _checked_items(num_items, reduction, student_logits)
    has_classes = student_logits.dim() and teacher.dim()
    if not has_classes or student_logits.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must have logits (..., V) of the same tokens, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher.shape)}"
        )
    used = common_classes(student_logits.shape[-1], teacher.shape[-1], vocab_size)
    valid = _valid(target, student_logits, ignore_index)
    rows = by_rows(
        partial(divergence, options=options), student_logits[..., :used], (teacher[..., :used],),
        valid,
    )  # fmt: skip
    return _reduced(rows, valid, reduction, items)


def _teacher(logits: Tensor | None, log_probs: Tensor | None) -> Tensor:
    if (logits is None) == (log_probs is None):
        raise ValueError("a teacher is given as teacher_logits or as teacher_log_probs")
    teacher = log_probs if logits is None else logits
    assert teacher is not None
    return teacher


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


@partial(
    documented,
    names=("add_tail", *_OF_DIVERGENCE, *_OF_REDUCTION),
    table=DIVERGENCE_OPTIONS,
)
def top_k_distillation_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    add_tail: bool = True,
    direction: str = "forward",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """A divergence from a teacher whose k largest log-probabilities were stored, times T^2.

    With a tail, what the teacher's k tokens leave of its probability counts as one more outcome,
    whose student probability is what the student leaves: `distillation_loss` of the two coarser
    distributions, a lower bound of the whole one that is exact for k = V. Without, the two
    distributions given that the token is one of the k: no bound, and k tokens alone get a gradient.

    From hidden states: `llmloss_ext.linear_distillation_loss`.

    Args:
        student_logits: (..., V). Rows of any stride are read in place.
        teacher_ids: (..., k) int64: different tokens.
        teacher_log_probs: (..., k), in nats, taken as a constant: of the teacher's distribution at
            ``temperature``, that is of ``log_softmax(teacher_logits / temperature)``.
        Options: each is described in `llmloss_ext.options`.
        target: (...): their labels, of which ``ignore_index`` alone is looked at.
        vocab_size: The student's distribution is over the first ``vocab_size`` classes, by default
            over all.

    Returns:
        0-d, or (...) for ``"none"``, in nats; float32 for 16-bit logits. The mean of no token is
        nan.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
        RuntimeError: A token outside [0, V).
    """
    options = DivergenceOptions.of(direction, beta, skew_alpha, temperature)
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
    valid = _valid(target, student_logits, ignore_index)
    columns = student_logits.shape[-1]
    used = common_classes(columns, columns, vocab_size)
    rows = by_rows(
        partial(coarse_divergence, options=options, add_tail=add_tail),
        student_logits[..., :used], (teacher_ids, teacher_log_probs), valid,
    )  # fmt: skip
    return _reduced(rows, valid, reduction, items)


def hard_soft_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    teacher_log_probs: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    **options: Any,
) -> DistillationLoss:
    """A cross entropy with labels and a divergence from a teacher, weighted.

    As Liger's `LigerFusedLinearDistillationBase` weights them, but that tokens without a label are
    left out of both terms, and of what the mean divides by. From hidden states, with three products
    for the student: `llmloss_ext.linear_distillation_loss`.

    Args:
        student_logits: (..., V).
        teacher_logits: (..., W), taken as a constant; None: ``teacher_log_probs``.
        target: (...) int64 or int32: the labels.
        teacher_log_probs: (..., W) of the whole distribution at T, or with ``teacher_ids`` (..., k)
            of these tokens.
        teacher_ids: (..., k), as in `top_k_distillation_loss`.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `DistillationLoss`, 0-d, or (...) for ``"none"``; float32 for 16-bit logits.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
        IndexError: A label outside [0, vocab_size) that is not ``ignore_index``.
    """
    given = Distillation.of(options)
    check_all_dense({"student_logits": student_logits, "target": target}, {})
    shared = {name: getattr(given, name) for name in _OF_REDUCTION}
    of_divergence = {name: getattr(given, name) for name in _OF_DIVERGENCE}
    vocab_size = given.vocab_size
    if teacher_ids is None:
        teacher = _teacher(teacher_logits, teacher_log_probs)
        if student_logits.dim() and teacher.dim():
            vocab_size = common_classes(student_logits.shape[-1], teacher.shape[-1], vocab_size)
        soft = partial(
            distillation_loss, student_logits, teacher_logits, teacher_log_probs=teacher_log_probs
        )
    else:
        if teacher_log_probs is None or teacher_logits is not None:
            raise ValueError("teacher_ids belong to teacher_log_probs")
        soft = partial(
            top_k_distillation_loss, student_logits, teacher_ids, teacher_log_probs,
            add_tail=given.add_tail,
        )  # fmt: skip
    soft_loss: Tensor | None = None
    hard_loss: Tensor | None = None
    if given.weight_soft_loss:
        soft_loss = soft(target=target, vocab_size=vocab_size, **of_divergence, **shared)
    if given.weight_hard_loss:
        hard_loss = functional.cross_entropy(
            student_logits, target, class_dim=-1, vocab_size=vocab_size, **shared
        )
    return weighted_sum(hard_loss, soft_loss, given.weight_hard_loss, given.weight_soft_loss)


spelled_out(hard_soft_distillation_loss, Distillation._fields, DIVERGENCE_OPTIONS)
documented(hard_soft_distillation_loss, Distillation._fields, DIVERGENCE_OPTIONS)


def weighted_sum(
    hard: Tensor | None, soft: Tensor | None, weight_hard: float, weight_soft: float
) -> DistillationLoss:
    """Of the terms that there are; the other is 0."""
    if hard is None or soft is None:
        only, weight = (soft, weight_soft) if hard is None else (hard, weight_hard)
        assert only is not None
        nothing = torch.zeros_like(only.detach())
        parts = [nothing if t is None else t.detach() for t in (hard, soft)]
        return DistillationLoss(only * weight, *parts)
    return DistillationLoss(weight_hard * hard + weight_soft * soft, hard.detach(), soft.detach())
