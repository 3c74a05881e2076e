"""The losses as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmloss_ext import functional
from llmloss_ext.linear import linear_cross_entropy

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


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


class LinearCrossEntropyLoss(torch.nn.Module):
    """`llmloss_ext.linear_cross_entropy` as a module that owns or borrows its projection.

    Args:
        in_features: D.
        num_classes: V.
        linear_weight: The (V, D) parameter of another module, e.g. tied embeddings; by default
            a parameter of its own, initialised like `torch.nn.Linear`'s.
        bias: Whether the projection has a bias.
        weight: Class weights (V), kept as a buffer.
        device: Of its own parameters.
        dtype: Of its own parameters.
        **options: Any other option of the function: ``ignore_index``, ``reduction``,
            ``label_smoothing``, ``z_loss``, ``softcap``, ``logit_scale``, ``vocab_size``,
            ``shift``, ``chunk_tokens`` ...

    Raises:
        ValueError: ``linear_weight`` is not (V, D).
        TypeError: The function has no such option.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        linear_weight: torch.nn.Parameter | None = None,
        bias: bool = False,
        weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = options.keys() - _LINEAR_OPTIONS
        if unknown:
            raise TypeError(f"linear_cross_entropy has no option {', '.join(sorted(unknown))}")
        shape = (num_classes, in_features)
        if linear_weight is None:
            linear_weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            torch.nn.init.kaiming_uniform_(linear_weight, a=math.sqrt(5))
        elif linear_weight.shape != shape:
            raise ValueError(f"linear_weight must be {shape}, got {tuple(linear_weight.shape)}")
        self.linear_weight = linear_weight
        self.linear_bias: torch.nn.Parameter | None = None
        if bias:
            bound = 1 / math.sqrt(in_features)
            values = torch.empty(
                num_classes, device=linear_weight.device, dtype=linear_weight.dtype
            )
            self.linear_bias = torch.nn.Parameter(values.uniform_(-bound, bound))
        self.register_buffer("weight", weight)
        logit_scale = options.pop("logit_scale", 1.0)
        self.logit_scale = logit_scale  # a Parameter is registered
        self.options = options

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``input`` for ``target``."""
        return linear_cross_entropy(
            input,
            self.linear_weight,
            target,
            linear_bias=self.linear_bias,
            weight=self.weight,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        classes, features = self.linear_weight.shape
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"in_features={features}, num_classes={classes}{options}"


_LINEAR_OPTIONS = {
    "ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "logit_scale",
    "vocab_size", "shift", "chunk_tokens", "max_chunk_bytes", "drop_ignored", "weight_grad_dtype",
}  # fmt: skip
