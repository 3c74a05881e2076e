"""The losses as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmloss_ext import functional
from llmloss_ext.linear import linear_cross_entropy

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


def _register(module: torch.nn.Module, name: str, value: Any, *, persistent: bool = True) -> None:
    """Sets an attribute; a tensor that is no Parameter becomes a buffer, which moves along."""
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value, persistent=persistent)
    else:
        setattr(module, name, value)


class CrossEntropyLoss(torch.nn.Module):
    """`llmloss_ext.functional.cross_entropy` as a module: a drop-in for torch's.

    Args:
        weight: Class weights (V), kept as a buffer.
        ignore_index: Tokens with this target are left out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        softcap: If given, logits become softcap * tanh(logits / softcap).
        logit_scale: Factor of the logits, a number or a 0-d tensor. A Parameter is registered as
            one, another tensor as a buffer.
        vocab_size: Only the first ``vocab_size`` columns take part.
        inplace: Writes the gradient over the logits.

    Shape and errors are those of the function; ``token_weight`` and ``num_items`` are given per
    call.

    Raises:
        ValueError: An option out of range.
    """

    weight: Tensor | None
    logit_scale: float | Tensor

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
        functional.loss_options(label_smoothing, z_loss, reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        _register(self, "logit_scale", logit_scale)
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
        linear_weight: The (V, D) weight of another module, e.g. tied embeddings; by default
            a parameter of its own, initialised like `torch.nn.Linear`'s. A tensor that is no
            Parameter becomes a buffer, which the state dict leaves to its owner.
        linear_bias: The (V) bias of another module, in the same way.
        bias: Whether the projection has a bias of its own.
        weight: Class weights (V), kept as a buffer.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Tokens with this target take no part; None: -100.
        label_smoothing: In [0, 1].
        logit_scale: Factor of the logits, a number or a 0-d tensor. A Parameter is registered as
            one, another tensor as a buffer.
        device: Of its own parameters.
        dtype: Of its own parameters.
        **options: Any other option of the function: ``z_loss``, ``softcap``, ``vocab_size``,
            ``shift``, ``chunk_tokens``, ``options`` (torch's) ...

    Raises:
        ValueError: ``linear_weight`` is not (V, D), ``linear_bias`` or ``weight`` not (V), or an
            option is out of range.
        TypeError: The function has no such option.
    """

    weight: Tensor | None
    linear_weight: Tensor
    linear_bias: Tensor | None
    logit_scale: float | Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        bias: bool = False,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        logit_scale: float | Tensor = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = options.keys() - _LINEAR_OPTIONS
        if unknown:
            raise TypeError(f"linear_cross_entropy has no option {', '.join(sorted(unknown))}")
        functional.loss_options(label_smoothing, options.get("z_loss", 0.0), reduction)
        for name, tensor, shape in (
            ("linear_weight", linear_weight, (num_classes, in_features)),
            ("linear_bias", linear_bias, (num_classes,)),
            ("weight", weight, (num_classes,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if linear_bias is not None and bias:
            raise ValueError("bias=True makes a bias, but linear_bias is one already")
        if linear_weight is None:
            values = torch.empty(num_classes, in_features, device=device, dtype=dtype)
            linear_weight = torch.nn.Parameter(values)
            torch.nn.init.kaiming_uniform_(linear_weight, a=math.sqrt(5))
        if bias:
            bound = 1 / math.sqrt(in_features)
            values = torch.empty_like(linear_weight[:, 0], requires_grad=False)
            linear_bias = torch.nn.Parameter(values.uniform_(-bound, bound))
        _register(self, "linear_weight", linear_weight, persistent=False)
        _register(self, "linear_bias", linear_bias, persistent=False)
        _register(self, "logit_scale", logit_scale)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options = label_smoothing, options

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        weight_grad_accumulator: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``input`` for ``target``."""
        return linear_cross_entropy(
            input,
            self.linear_weight,
            target,
            linear_bias=self.linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            num_items=num_items,
            weight_grad_accumulator=weight_grad_accumulator,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Sizes, and the options that differ from their defaults."""
        classes, features = self.linear_weight.shape
        named = {"reduction": "mean", "ignore_index": None, "label_smoothing": 0.0}
        options = {k: getattr(self, k) for k, v in named.items() if getattr(self, k) != v}
        options |= self.options
        text = "".join(f", {name}={value}" for name, value in options.items())
        return f"in_features={features}, num_classes={classes}{text}"


_LINEAR_OPTIONS = {
    "options", "z_loss", "softcap", "vocab_size", "shift", "chunk_tokens", "max_chunk_bytes",
    "drop_ignored", "weight_grad_dtype",
}  # fmt: skip
