"""verl: log-probabilities and entropies from hidden states, as its fused kernels give them.

Where ``use_fused_kernels`` is set, both of verl's backends are replaced by this library::

    use_linear_cross_entropy()  # in every worker, before its first step
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..linear import linear_token_stats
from ..shard import Shard
from .rebinding import Rebindings
from .versions import check_version

__all__ = [
    "FusedLinearForPPO",
    "linear_cross_entropy",
    "stop_linear_cross_entropy",
    "use_linear_cross_entropy",
]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda rows: rows,
    "sum": torch.sum,
    "mean": torch.mean,
}
_TORCH = "verl.utils.experimental.torch_functional"
_TRITON = "verl.utils.kernel.linear_cross_entropy"
_IMPORTERS = (
    "verl.models.mcore.model_forward_fused",
    "verl.models.mcore.model_forward_1f1b_overlap",
)
"""Which have their own name for the Triton function, if they are imported already."""
_rebindings = Rebindings()


class FusedLinearForPPO(torch.nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``.

    The entropies are float32, where verl's are rounded to the hidden states' dtype.
    """

    logits_dtype: torch.dtype | None = None
    """As in `llmloss_ext.linear_token_stats`; for all of them, see `use_linear_cross_entropy`."""

    def __init__(self, chunk_size: int | None = None, impl_backend: str = "torch") -> None:
        """Takes what verl does.

        Args:
            chunk_size: Tokens of a chunk at most; by default what `llmloss_ext.plan` says.
            impl_backend: "torch" or "liger": which of verl's this stands in for.
        """
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f'impl_backend must be "torch" or "liger", got {impl_backend!r}')
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The log-probability of each token, and the entropy where it was drawn.

        Args:
            hidden_states: (N, D) or (B, S, D).
            vocab_weights: (V, D).
            input_ids: (N) or (B, S): the tokens that were drawn; 0 at those that are -100.
            temperature: What the logits are divided by.

        Returns:
            Both shaped like input_ids, in nats, float32, differentiable.
        """
        stats = linear_token_stats(
            hidden_states,
            vocab_weights,
            input_ids.long(),
            logit_scale=1.0 / temperature,
            chunk_tokens=self.chunk_size,
            logits_dtype=self.logits_dtype,
        )
        return stats.log_prob, stats.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
    *,
    sum_input_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, on any device.

    Args:
        hidden: (..., D), the same on every rank of the group.
        weight: (V, D), or of a group (V / ranks, D).
        labels: (...): the tokens that were drawn.
        temperature: What the logits are divided by.
        reduction: Of the log-probabilities.
        dist_process_group: The ranks that share the vocabulary.
        sum_input_grad: As in `llmloss_ext.Shard`. verl leaves each rank its part of the hidden
            states' gradient, to be summed by what gathered them (sequence parallelism).
        logits_dtype: As in `llmloss_ext.linear_token_stats`; by default what
            `use_linear_cross_entropy` was given.

    Returns:
        The log-probabilities, (N) or 0-d; the entropies (N), whatever the reduction. In nats.

    Raises:
        ValueError: Another reduction.
    """
    reduce = _REDUCTIONS.get(reduction.lower())
    if reduce is None:
        raise ValueError(f"Invalid reduction: {reduction}")
    is_sharded = dist_process_group is not None and dist.get_world_size(dist_process_group) > 1
    stats = linear_token_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        logit_scale=1.0 / temperature,
        shard=Shard(dist_process_group, sum_input_grad=sum_input_grad) if is_sharded else None,
        logits_dtype=FusedLinearForPPO.logits_dtype if logits_dtype is None else logits_dtype,
    )
    return reduce(stats.log_prob), stats.entropy


def use_linear_cross_entropy(*, logits_dtype: torch.dtype | None = None) -> None:
    """Puts the two in the place of verl's, for every model of this process.

    Args:
        logits_dtype: As in `llmloss_ext.linear_token_stats`: torch.float32 keeps the logits of
            16-bit hidden states in float32, which the ratios of policies need.

    Raises:
        RuntimeError: The installed verl is not a known version.
    """
    check_version("verl", "0.9")
    stop_linear_cross_entropy()
    FusedLinearForPPO.logits_dtype = logits_dtype
    _rebindings.bind(importlib.import_module(_TORCH), FusedLinearForPPO)
    _rebindings.bind(importlib.import_module(_TRITON), linear_cross_entropy)
    for name in _IMPORTERS:
        if name in sys.modules:
            _rebindings.bind(sys.modules[name], linear_cross_entropy)


def stop_linear_cross_entropy() -> None:
    """Puts verl's own back; does nothing where they are in use."""
    FusedLinearForPPO.logits_dtype = None
    _rebindings.undo()
