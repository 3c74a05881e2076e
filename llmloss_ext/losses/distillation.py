"""Distillation from logits; from hidden states it is `llmloss_ext.linear_kl_div`."""

from __future__ import annotations

import torch
from torch import Tensor

from llmloss_ext import functional
from llmloss_ext.linear.distillation import check_divergence, row_divergence
from llmloss_ext.losses.shapes import classes_last

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
) -> Tensor:
    """The divergence of a student's from a teacher's distribution, times T^2, in nats.

    ``"forward"``: KL(P || Q) = sum P (log P - log Q), P the teacher; ``"reverse"``: KL(Q || P);
    ``"jsd"``: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q
    (Hinton et al. 2015; Agarwal et al. 2024).

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V), without a gradient.
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: Share of the teacher in M, in (0, 1).
        temperature: T > 0.
        target: (...): tokens whose label is ``ignore_index`` take no part.
        ignore_index: See ``target``.
        reduction: ``"mean"`` over the tokens that take part, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or (...) for ``"none"``.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    check_divergence(direction, beta, temperature)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    vocab_size = student_logits.shape[-1]
    student, teacher = (x.reshape(-1, vocab_size) for x in (student_logits, teacher_logits))
    rows = row_divergence(student, teacher.detach(), (direction, beta, temperature))
    rows = rows.reshape(student_logits.shape[:-1])
    return _reduced(rows, target, ignore_index, reduction)


def _reduced(rows: Tensor, target: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    valid = torch.ones_like(rows, dtype=torch.bool)
    if target is not None:
        if target.shape != rows.shape:
            raise ValueError(
                f"target must have one label per token, {tuple(rows.shape)}, got "
                f"{tuple(target.shape)}"
            )
        valid = target != ignore_index
    rows = torch.where(valid, rows, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / valid.sum() if reduction == "mean" else rows.sum()


def top_k_distillation_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """KL(P || Q) against a teacher whose k largest log-probabilities were stored, in nats.

    What the teacher's k tokens leave of its probability counts as one more outcome, whose student
    probability is what the student leaves: the divergence of the two coarser distributions, a
    lower bound of the whole one that is exact for k = V.

    Args:
        student_logits: (..., V).
        teacher_ids: (..., k) int64: different tokens.
        teacher_log_probs: (..., k), in nats.
        target: (...): tokens whose label is ``ignore_index`` take no part.
        ignore_index: See ``target``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if teacher_ids.shape != teacher_log_probs.shape or (
        teacher_ids.shape[:-1] != student_logits.shape[:-1]
    ):
        raise ValueError(
            "expected student_logits (..., V), teacher_ids (..., k) and teacher_log_probs (..., k);"
            f" got {tuple(student_logits.shape)}, {tuple(teacher_ids.shape)} and "
            f"{tuple(teacher_log_probs.shape)}"
        )
    real = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    # lse from the statistics: one read of the logits, and no second tensor of their size.
    labels = teacher_ids[..., 0]
    rows, flat = classes_last(student_logits, labels)
    lse = functional.token_stats(rows, flat).lse.reshape(labels.shape)
    log_q = student_logits.gather(-1, teacher_ids).to(real) - lse.unsqueeze(-1)
    log_p = teacher_log_probs.to(real)
    p = log_p.exp()
    kept = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    rest_p = (1 - p.sum(-1)).clamp_min(0.0)
    tiny = torch.finfo(real).tiny
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(torch.finfo(real).eps)
    rest = torch.where(
        rest_p > torch.finfo(real).eps * teacher_ids.shape[-1],
        rest_p * (rest_p.clamp_min(tiny).log() - rest_q.log()),
        0.0,
    )
    return _reduced(kept + rest, target, ignore_index, reduction)
