"""OLMo-core: cross entropy and z-loss, apart, from logits or hidden states.

Both loss implementations of its ``LMHead`` are replaced; ``"fused_linear"`` then needs no
Liger-Kernel, and runs on any device::

    use_cross_entropy()
    model = TransformerConfig(..., lm_head=LMHeadConfig(loss_implementation="fused_linear")).build()
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy, token_stats
from ..linear import linear_cross_entropy, linear_token_stats
from .rebinding import Rebindings
from .versions import check_version

__all__ = [
    "cross_entropy_loss",
    "fused_linear_cross_entropy_loss",
    "stop_cross_entropy",
    "use_cross_entropy",
]

_MODULES = ("olmo_core.nn.lm_head", "olmo_core.nn.cross_entropy_loss")
_rebindings = Rebindings()


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    compute_z_loss: bool = False,
    z_loss_multiplier: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:
    """``olmo_core.nn.functional.cross_entropy_loss``: both losses from one read of the logits.

    Args:
        logits: (N, V).
        labels: (N).
        ignore_index: Labels with this value are ignored. (OLMo-core's z-loss without a reduction
            counts them.)
        reduction: As in `llmloss_ext.cross_entropy`.
        compute_z_loss: Whether there is a z-loss.
        z_loss_multiplier: Factor of lse^2.

    Returns:
        The cross entropy and the z-loss or None: each with its own gradient; 0-d, or (N) for
        ``reduction="none"``; float32 for 16-bit logits.
    """
    if not compute_z_loss:
        loss = cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
        return loss, None
    stats = token_stats(logits, labels, ignore_index=ignore_index)
    rows = -stats.log_prob, z_loss_multiplier * stats.lse.square()
    cross, z = (_reduced(x, labels, ignore_index, reduction) for x in rows)
    return cross, z


def fused_linear_cross_entropy_loss(
    _input: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    compute_z_loss: bool = False,
    z_loss_multiplier: float = 1e-4,
    ce_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    accum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``olmo_core.nn.functional.fused_linear_cross_entropy_loss``, which takes Liger's kernel.

    Args:
        _input: Hidden states (N, D).
        weight: (V, D).
        labels: (N).
        bias: (V).
        ignore_index: As in `llmloss_ext.linear_cross_entropy`, and so the next.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        compute_z_loss: Whether there is a z-loss.
        z_loss_multiplier: Factor of lse^2.
        ce_weight: Class weights (V).
        label_smoothing: In [0, 1].
        softcap: As in `llmloss_ext.linear_cross_entropy`.
        accum_dtype: In which the weight's gradient is accumulated; by default float32.

    Returns:
        The cross entropy with the z-loss in it, to be minimised; and that z-loss or None, without
        a gradient. To know it costs a product of hidden states and weight.
    """
    logits: dict[str, Any] = {
        "linear_bias": bias,
        "ignore_index": ignore_index,
        "softcap": softcap,
    }
    loss = linear_cross_entropy(
        _input,
        weight,
        labels,
        weight=ce_weight,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss_multiplier if compute_z_loss else 0.0,
        weight_grad_dtype=accum_dtype,
        **logits,
    )
    if not compute_z_loss:
        return loss, None
    with torch.no_grad():
        lse = linear_token_stats(_input, weight, labels, **logits).lse
        return loss, _reduced(z_loss_multiplier * lse.square(), labels, ignore_index, reduction)


def use_cross_entropy() -> None:
    """Puts the two in the place of OLMo-core's, for the models that are built or called after it.

    Raises:
        RuntimeError: The installed OLMo-core is not a known version.
    """
    check_version("ai2-olmo-core", "3.0")
    stop_cross_entropy()
    for name in _MODULES:
        module = importlib.import_module(name)
        for ours in (cross_entropy_loss, fused_linear_cross_entropy_loss):
            if hasattr(module, ours.__name__):
                _rebindings.bind(module, ours)


def stop_cross_entropy() -> None:
    """Puts OLMo-core's own back; does nothing where they are in use."""
    _rebindings.undo()


def _reduced(rows: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Of numbers that are 0 where the label is ignored."""
    if reduction == "none":
        return rows
    total = rows.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()
