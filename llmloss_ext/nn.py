"""The losses as modules, with the options of the functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import functional
from .linear import linear_cross_entropy
from .options import OPTIONS, LossOptions, option_names, spelled_out
from .sequences import Sequences

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]

_PER_CALL = {"token_weight", "num_items", "weight_grad_accumulator"}
_SEQUENCES = set(Sequences._fields)
_LEGACY = {"size_average", "reduce"}
_OWN = {"weight", "ignore_index", "reduction", "label_smoothing", "linear_bias"}
"""What the modules themselves have in their signatures."""


def _others(function: Any) -> list[str]:
    own = _PER_CALL | _SEQUENCES | _LEGACY | _OWN
    return [name for name in option_names(function) if name not in own]


def _register(module: torch.nn.Module, name: str, value: Any, *, persistent: bool = True) -> None:
    """Sets an attribute; a tensor that is not a Parameter becomes a buffer, which moves along."""
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value, persistent=persistent)
    else:
        setattr(module, name, value)


class _LossModule(torch.nn.Module):
    """Keeps the options of a loss as attributes, its tensors as buffers or parameters."""

    weight: Tensor | None

    def _keep(self, function: Any, others: dict[str, Any], **named: Any) -> None:
        """Options that are not among ``others`` and ``named`` have their defaults.

        Raises:
            ValueError: An option is out of range.
            TypeError: The function has no such option.
        """
        known = _others(function)
        unknown = sorted(others.keys() - set(known))
        if unknown:
            raise TypeError(f"{function.__name__} has no option {', '.join(unknown)}")
        options = named | {name: OPTIONS[name].default for name in known} | others
        of_loss = {name: options[name] for name in LossOptions._fields}
        LossOptions.of(**of_loss)
        for name, value in options.items():
            _register(self, name, value)
        self._names = tuple(options)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _non_defaults(self) -> list[str]:
        """The options that differ from their defaults, for ``repr``."""
        values = self._options().items()
        plain = ((n, v) for n, v in values if not isinstance(v, Tensor) and n in OPTIONS)
        return [f"{name}={value}" for name, value in plain if value != OPTIONS[name].default]


class CrossEntropyLoss(_LossModule):
    """`llmloss_ext.cross_entropy` as a module: a drop-in for torch's.

    Args:
        weight: Class weights (V), kept as a buffer.
        size_average: Deprecated, as in torch.
        ignore_index: As in the function, and so all other options. ``token_weight`` and
            ``num_items`` are given per call.
        reduce: Deprecated, as in torch.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: In [0, 1].
        **options: Any other option of the function; each is an attribute. A ``logit_scale`` that is
            a Parameter is registered as one, another tensor as a buffer.

    Shape and errors are those of the function.

    Raises:
        ValueError: An option is out of range.
        TypeError: The function has no such option.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
        self.register_buffer("weight", weight)
        self._keep(
            functional.cross_entropy,
            options,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Any:
        """The loss of logits ``input`` for ``target``; with ``return_stats`` beside these."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            token_weight=token_weight,
            num_items=num_items,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return ", ".join(self._non_defaults())


class LinearCrossEntropyLoss(_LossModule):
    """`llmloss_ext.linear_cross_entropy` as a module that owns or borrows its projection.

    Args:
        in_features: D.
        num_classes: V.
        linear_weight: The (V, D) weight of another module, e.g. tied embeddings; by default
            a parameter of its own, initialised like `torch.nn.Linear`'s. A tensor that is not a
            Parameter becomes a buffer, which the state dict leaves to its owner.
        linear_bias: The (V) bias of another module, in the same way.
        bias: Whether the projection has a bias of its own.
        weight: Class weights (V), kept as a buffer.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Tokens with this target take no part; None: -100.
        label_smoothing: In [0, 1].
        device: Of its own parameters.
        dtype: Of its own parameters.
        options: A `torch.nn.LinearCrossEntropyOptions`, as the function takes it.
        **others: Any other option of the function; each is an attribute. A ``logit_scale`` that is
            a Parameter is registered as one, another tensor as a buffer.

    Raises:
        ValueError: ``linear_weight`` is not (V, D), ``linear_bias`` or ``weight`` not (V), or an
            option is out of range.
        TypeError: The function has no such option.
    """

    linear_weight: Tensor
    linear_bias: Tensor | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        options: Any = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self._keep(
            linear_cross_entropy,
            others,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
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
        self.register_buffer("weight", weight)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        weight_grad_accumulator: Tensor | None = None,
        **sequences: Any,
    ) -> Any:
        """The loss of hidden states ``input`` for ``target``; options as in the function."""
        return linear_cross_entropy(
            input,
            self.linear_weight,
            target,
            linear_bias=self.linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            num_items=num_items,
            weight_grad_accumulator=weight_grad_accumulator,
            **sequences,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """Sizes, and the options that differ from their defaults."""
        classes, features = self.linear_weight.shape
        return ", ".join(
            [f"in_features={features}", f"num_classes={classes}", *self._non_defaults()]
        )


spelled_out(CrossEntropyLoss.__init__, _others(functional.cross_entropy))
spelled_out(LinearCrossEntropyLoss.forward, Sequences._fields)
spelled_out(LinearCrossEntropyLoss.__init__, _others(linear_cross_entropy))
