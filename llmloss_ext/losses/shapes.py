"""Logits with the classes last, brought into a shape that has one reading only."""

from __future__ import annotations

from torch import Tensor

__all__ = ["classes_last"]


def classes_last(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (..., V) as the functions of `llmloss_ext.functional` want them for targets (...).

    A view: where torch's (N, C, d1, ...) would fit them too, they are brought into that form, which
    those functions try first. So rows of any stride are read in place.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.dim() == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected logits (..., V) and targets (...), got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    is_ambiguous = logits.dim() > 2 and target.shape == logits.shape[:1] + logits.shape[2:]
    return logits.movedim(-1, 1) if is_ambiguous else logits
