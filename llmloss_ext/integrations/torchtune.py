"""torchtune: a loss that takes over the model's output layer.

In a recipe's config (after version 0.6.1, whose recipes have losses of logits only)::

    loss:
      _component_: llmloss_ext.integrations.torchtune.LinearCrossEntropyLoss

Recipes of any version take `llmloss_ext.nn.CrossEntropyLoss` as a loss of logits.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..linear import linear_cross_entropy
from .output_layer import replaced_forward

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(torch.nn.Module):
    """``torchtune.modules.loss.LinearCrossEntropyLoss``: a mean, 0 if there are no tokens."""

    def __init__(
        self, num_output_chunks: int | None = None, ignore_index: int = -100, **options: Any
    ) -> None:
        """Takes what torchtune does, and more.

        Args:
            num_output_chunks: In how many parts at least the tokens are walked through; by
                default what `llmloss_ext.plan` says.
            ignore_index: Targets with this value are ignored.
            options: Of `llmloss_ext.linear_cross_entropy`: ``z_loss``, ``softcap`` and more.
        """
        super().__init__()
        _make_it_known()
        self.linear_projection: Any = None
        self.num_output_chunks, self.ignore_index = num_output_chunks, ignore_index
        self._options = options

    def apply_compile_strategy(self, *_args: Any, **_kwargs: Any) -> LinearCrossEntropyLoss:
        """The loss itself: its kernels leave nothing to compile."""
        return self

    def set_model_output(self, model: torch.nn.Module) -> None:
        """Makes a model return its hidden states, and takes its output layer.

        Raises:
            ValueError: The layer is neither linear nor tied to an embedding.
        """
        layer: Any = model.output
        is_linear = getattr(type(layer), "forward", None) is torch.nn.Linear.forward
        if not is_linear and not hasattr(layer, "tied_module"):
            raise ValueError(
                "LinearCrossEntropyLoss needs an output that is a torch.nn.Linear or a TiedLinear, "
                f"got {type(layer).__qualname__}"
            )
        model.skip_output_layer = True  # type: ignore[assignment]
        self.linear_projection = layer

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the targets that count.

        Args:
            outputs: Hidden states (B, S, D).
            targets: (B, S), shifted already.

        Returns:
            0-d; float32 for 16-bit hidden states.

        Raises:
            RuntimeError: `set_model_output` was not called.
        """
        layer = self.linear_projection
        if layer is None:
            raise RuntimeError("LinearCrossEntropyLoss: call set_model_output first")
        options = dict(self._options)
        if self.num_output_chunks is not None:
            options["chunk_tokens"] = max(-(-targets.numel() // self.num_output_chunks), 1)

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(
                hidden,
                weight,
                targets,
                linear_bias=bias,
                ignore_index=self.ignore_index,
                num_items=(targets != self.ignore_index).sum(),
                **options,
            )

        if hasattr(layer, "tied_module"):
            return loss(outputs, layer.tied_module.weight, None)
        with replaced_forward(layer, lambda hidden: loss(hidden, layer.weight, layer.bias)):
            value: Tensor = layer(outputs)
        return value


def _make_it_known() -> None:
    """To recipes, which have imported the abstract class by which they know such a loss."""
    known = getattr(sys.modules.get("torchtune.modules.loss"), "SFTLoss", None)
    if known is not None:
        known.register(LinearCrossEntropyLoss)
