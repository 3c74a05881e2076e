"""Language models' shape, said so that it cannot be taken for torch's."""

from __future__ import annotations

from torch import Tensor

__all__ = ["classes_last"]


def classes_last(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (..., V) and targets (...) as the functions of `llmloss_ext.functional` want them.

    They are left as they are (rows of any stride are read in place) unless torch's (N, C, d1, ...)
    would fit them too.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.dim() == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected logits (..., V) and targets (...), got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    is_ambiguous = logits.dim() > 2 and target.shape == logits.shape[:1] + logits.shape[2:]
    if is_ambiguous or logits.dim() > 3:
        return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    return logits, target
