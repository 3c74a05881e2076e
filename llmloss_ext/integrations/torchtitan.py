"""torchtitan: its losses by this library.

They are configs of its trainer::

    config.loss = CrossEntropyLoss.Config(global_vocab_size=vocab_size)
    config.loss = LinearCrossEntropyLoss.Config(global_vocab_size=vocab_size)  # without the logits

The trainer hands the second its output layer, as it does with torchtitan's ``ChunkedLossWrapper``,
whose place it takes: any length of sequences, one pass through the layer, no backward inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtensors import is_dtensor
from ..functional import cross_entropy
from ..linear import linear_cross_entropy
from ..shard import Shard
from .output_layer import replaced_forward
from .versions import check_version

check_version("torchtitan", "0.3")

from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper  # noqa: E402
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size  # noqa: E402
from torchtitan.distributed.utils import get_spmd_backend  # noqa: E402

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


class CrossEntropyLoss(BaseLoss):  # type: ignore[misc]
    """The sum of the tokens' losses over ``global_valid_tokens``, from logits.

    Without tokens (0 in all) it is 0, where torchtitan's is nan.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """What a run says of its loss: options of `llmloss_ext.cross_entropy`."""

        global_vocab_size: int | None = None
        """Classes of all tensor-parallel ranks; needed if there are several."""
        label_smoothing: float = 0.0
        z_loss: float = 0.0

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """compile_config: torchtitan's, not read. The kernels leave nothing to compile."""
        self._global_vocab_size = config.global_vocab_size
        self._options: dict[str, Any] = {
            "label_smoothing": config.label_smoothing,
            "z_loss": config.z_loss,
        }

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no metrics.

        Args:
            pred: Logits (B, S, V), or this rank's classes of them.
            labels: (B, S); -100 is ignored.
            global_valid_tokens: What the sum is divided by; None: by nothing.
        """
        loss = cross_entropy(
            pred,
            labels,
            class_dim=-1,
            **_total(global_valid_tokens),
            **_classes(self._global_vocab_size),
            **self._options,
        )
        return _plain(loss), {}


class LinearCrossEntropyLoss(ChunkedLossWrapper):  # type: ignore[misc]
    """`CrossEntropyLoss` from the decoder's hidden states and its ``lm_head``.

    The layer is called once, so that FSDP2 gathers its weight once and reduces its gradient once.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """What a run says of its loss: options of `llmloss_ext.linear_cross_entropy`."""

        max_chunk_bytes: int | None = None
        float32_logits: bool = False
        """``logits_dtype=torch.float32``."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """compile_config: torchtitan's, not read. The kernels leave nothing to compile."""
        self.lm_head: torch.nn.Module | None = None
        self._global_vocab_size = config.global_vocab_size
        self._options: dict[str, Any] = {
            "label_smoothing": config.label_smoothing,
            "z_loss": config.z_loss,
            "max_chunk_bytes": config.max_chunk_bytes,
            "logits_dtype": torch.float32 if config.float32_logits else None,
        }

    def set_lm_head(self, lm_head: torch.nn.Module) -> None:
        """The output layer, which the trainer sets before the first call.

        Raises:
            ValueError: It computes something else than a linear layer.
        """
        if getattr(type(lm_head), "forward", None) is not torch.nn.Linear.forward:
            raise ValueError(
                "LinearCrossEntropyLoss needs an lm_head that is a plain linear layer, got "
                f"{type(lm_head).__qualname__}; use CrossEntropyLoss"
            )
        self.lm_head = lm_head

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no metrics.

        Args:
            pred: Hidden states (B, S, D), the same on every tensor-parallel rank.
            labels: (B, S); -100 is ignored.
            global_valid_tokens: What the sum is divided by; None: by nothing.
        """
        layer: Any = self.lm_head
        if layer is None:
            raise RuntimeError("LinearCrossEntropyLoss: call set_lm_head first")

        def forward(hidden: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden,
                layer.weight,
                labels,
                linear_bias=layer.bias,
                **_total(global_valid_tokens),
                # The norm below takes each rank's part of the gradient, and sums.
                **_classes(self._global_vocab_size, sum_input_grad=False),
                **self._options,
            )

        with replaced_forward(layer, forward):
            return _plain(layer(pred)), {}


def _total(global_valid_tokens: Tensor | None) -> dict[str, Any]:
    """The reduction."""
    if global_valid_tokens is None:
        return {"reduction": "sum"}
    return {"num_items": global_valid_tokens}


def _classes(global_vocab_size: int | None, sum_input_grad: bool = True) -> dict[str, Any]:
    """Which classes are here, where torchtitan's tensor parallelism leaves plain tensors.

    Where it leaves DTensors, these say so themselves.
    """
    if get_spmd_backend() == "full_dtensor":
        raise ValueError(
            'losses of this library need spmd_backend="spmd_types" or "partial_dtensor"'
        )
    if spmd_mesh_size("tp") == 1:
        return {}
    if global_vocab_size is None:
        raise ValueError("tensor parallelism needs the loss's global_vocab_size")
    group = current_spmd_mesh().get_group("tp")
    start = dist.get_rank(group) * -(-global_vocab_size // dist.get_world_size(group))
    return {"shard": Shard(group, start, sum_input_grad), "vocab_size": global_vocab_size}


def _plain(loss: Any) -> Tensor:
    """The loss as torchtitan takes it: the same number on each tensor-parallel rank."""
    return loss.to_local() if is_dtensor(loss) else loss
