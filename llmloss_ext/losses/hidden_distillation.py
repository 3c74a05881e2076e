"""Distillation of hidden states: their direction."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import composite
from ..checks import check_all_dense, items_tensor
from ..composite import real_of

__all__ = ["cosine_distillation_loss"]


def cosine_distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """1 - cos(student, teacher) of each token's hidden states (DistilBERT, Sanh et al. 2019).

    As torch's `cosine_embedding_loss` of matching pairs, which DistilBERT's training takes, and the
    soft loss of Liger's `LigerFusedLinearCosineSimilarityLoss` (which multiplies it by ``beta``).
    It is half the squared distance of the two unit vectors, and computed so: 1 - cos would have
    lost its digits where they agree. A vector of zeros has no direction: its cosine is 0, and its
    gradient 0.

    Args:
        student_hidden: (..., D). A student of another width projects them first.
        teacher_hidden: (..., D), taken as a constant.
        target: (...): tokens whose label is ``ignore_index`` take no part, whatever stands there;
            their gradient is exactly zero.
        ignore_index: See ``target``.
        reduction: ``"mean"`` over the tokens that take part, ``"sum"`` or ``"none"``.
        num_items: Replaces the number of tokens of the mean, e.g. by that of all micro-batches; of
            0 items the loss is 0.

    Returns:
        0-d, or (...) for ``"none"``, in [0, 2]; float32 for 16-bit hidden states. The mean of no
        token is nan.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    check_all_dense(
        {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}, {"target": target}
    )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if not student_hidden.dim() or student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            "student and teacher must have hidden states (..., D) of one shape, got "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    if target is not None and target.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"target must have one label per token, {tuple(student_hidden.shape[:-1])}, got "
            f"{tuple(target.shape)}"
        )
    items = items_tensor(num_items, reduction, student_hidden)
    student, teacher = student_hidden, teacher_hidden.detach()
    valid = None if target is None else target != ignore_index
    if valid is not None:
        student, teacher = composite.only(valid, student), composite.only(valid, teacher)
    rows = _distances(student, teacher)
    if valid is not None:
        rows = torch.where(valid, rows, 0.0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return composite.total(rows)
    return composite.mean(rows, rows.numel() if valid is None else valid.sum(), items)


def _distances(student: Tensor, teacher: Tensor) -> Tensor:
    real = real_of(student)
    (one, has_one), (other, has_other) = (_direction(t.to(real)) for t in (student, teacher))
    distance = (one - other).square().sum(-1) / 2
    return torch.where(has_one & has_other, distance, 1.0)


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector, and whether there is one."""
    # By the largest element first: no square overflows, nor is all of them 0.
    largest = x.detach().abs().amax(-1, keepdim=True)
    there = largest != 0
    x = torch.where(there, x, 1.0) / torch.where(there, largest, 1.0)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), there.squeeze(-1)
