"""The losses as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from llmloss_ext import functional

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.Module):
    """`llmloss_ext.functional.cross_entropy` as a module: a drop-in for torch's.

    Args:
        weight: Class weights (V), kept as a buffer.
        ignore_index: Tokens with this target are left out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        softcap: If given, logits become softcap * tanh(logits / softcap).
        logit_scale: Factor of the logits, a number or a 0-d tensor; a Parameter is registered.
        vocab_size: Only the first ``vocab_size`` columns take part.
        inplace: Writes the gradient over the logits.

    Shape and errors are those of the function; ``token_weight`` and ``num_items`` are given per
    call.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | Tensor = 1.0,
        vocab_size: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size
        self.inplace = inplace

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits ``input`` for ``target``."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            num_items=num_items,
            vocab_size=self.vocab_size,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "z_loss": 0.0,
            "softcap": None,
            "vocab_size": None,
            "inplace": False,
        }
        return ", ".join(
            f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v
        )
