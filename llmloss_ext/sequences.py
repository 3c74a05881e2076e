"""Which position predicts which label: the shift of the labels, padding, and packed documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import as_integer

__all__ = ["Sequences", "moved"]


def moved(per_label: Tensor, shift: int, fill: float) -> Tensor:
    """What stands ``shift`` positions later in (..., S), and ``fill`` where the row ends."""
    if not shift:
        return per_label
    return F.pad(per_label[..., shift:], (0, min(shift, per_label.shape[-1])), value=fill)


class Sequences(NamedTuple):
    """What is known of the tokens of a batch; None: a row is one document without padding.

    A position predicts the label ``shift`` positions later if both, and all tokens between them,
    are real tokens of one document. Nothing here reads a tensor's values.
    """

    attention_mask: Tensor | None = None
    """(..., S): 0 at padding, whichever side it is on."""
    position_ids: Tensor | None = None
    """(..., S), or (S) for all rows: where they do not increase, a document begins."""
    document_ids: Tensor | None = None
    """(..., S), or (S) for all rows: one integer for all tokens of a document."""
    cu_seqlens: Tensor | None = None
    """(documents + 1): where each begins among the tokens of all rows, and where the last ends."""

    @property
    def given(self) -> list[str]:
        """The names of those that are there."""
        return [name for name, tensor in self._asdict().items() if tensor is not None]

    def fitting(self, labels: Tensor) -> Sequences:
        """Those that describe these labels: models also have masks of other shapes."""
        shapes = self._shapes(labels)
        return Sequences(
            *(
                x if x is not None and (name == "cu_seqlens" or x.shape in shapes[name]) else None
                for name, x in self._asdict().items()
            )
        )

    def targets(self, labels: Tensor, shift: int, ignore_index: int) -> Tensor:
        """(..., S): the label that each position predicts; ``ignore_index`` where there is none.

        Raises:
            ValueError: ``shift`` is negative, or a tensor does not fit the labels.
            TypeError: ``shift`` is not an integer.
        """
        shift = as_integer("shift", shift)
        self._check(labels, shift)
        targets = moved(labels, shift, ignore_index)
        if not self.given:
            return targets
        predicts = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
        if self.attention_mask is not None:
            real = self.attention_mask.to(labels.device).bool()
            predicts = real & moved(real, shift, False)
        for document in self.documents(labels, between=shift > 1):
            predicts = predicts & (document == moved(document, shift, 0))
        return torch.where(predicts, targets, ignore_index)

    def documents(self, labels: Tensor, *, between: bool = True) -> Iterator[Tensor]:
        """A number for the document of each token, (..., S) or (S), by everything that is given.

        Args:
            labels: (..., S).
            between: Whether tokens that are not neighbours are compared: if another document, or
                padding, stands between two tokens, they then have different numbers.
        """
        if between and self.attention_mask is not None:
            padding = ~self.attention_mask.to(labels.device).bool()
            yield padding.long().cumsum(-1)
        if self.document_ids is not None:
            ids = self.document_ids.to(labels.device)
            yield (
                F.pad((ids[..., 1:] != ids[..., :-1]).long(), (1, 0)).cumsum(-1) if between else ids
            )
        if self.position_ids is not None:
            positions = self.position_ids.to(labels.device)
            begins = positions[..., 1:] <= positions[..., :-1]
            yield F.pad(begins.long(), (1, 0)).cumsum(-1)
        if self.cu_seqlens is not None:
            ends = self.cu_seqlens.to(labels.device, torch.int64)
            tokens = torch.arange(labels.numel(), device=labels.device)
            yield torch.searchsorted(ends, tokens, right=True).reshape(labels.shape)

    def _check(self, labels: Tensor, shift: int) -> None:
        is_shifted = bool(shift or self.given)
        if shift < 0 or (is_shifted and (labels.is_floating_point() or not labels.dim())):
            raise ValueError(
                "shift must be an integer >= 0, with class indices (..., S) as targets; got "
                f"shift={shift} and targets of shape {tuple(labels.shape)}, {labels.dtype}"
            )
        if self.given and not shift:
            raise ValueError(
                f"{', '.join(self.given)}: needs shift >= 1, since it tells which label a position "
                "predicts. Labels that are shifted already have ignore_index where there is none."
            )
        shapes = self._shapes(labels)
        for name in self.given:
            tensor: Tensor = getattr(self, name)
            if name == "cu_seqlens":
                if tensor.dim() != 1 or tensor.is_floating_point():
                    raise ValueError(
                        "cu_seqlens must hold where the documents begin, and the end: integers "
                        f"(documents + 1), got shape {tuple(tensor.shape)} of {tensor.dtype}"
                    )
            elif tensor.shape not in shapes[name]:
                raise ValueError(
                    f"{name} must have the shape of the labels, {tuple(labels.shape)}, got "
                    f"{tuple(tensor.shape)}"
                )

    @staticmethod
    def _shapes(labels: Tensor) -> dict[str, list[Any]]:
        """The shapes that may be given for the labels."""
        every_row = [labels.shape[-1:], (1,) * (labels.dim() - 1) + labels.shape[-1:]]
        any_shape = [labels.shape, *every_row]
        return {
            "attention_mask": [labels.shape],
            "position_ids": any_shape,
            "document_ids": any_shape,
        }
