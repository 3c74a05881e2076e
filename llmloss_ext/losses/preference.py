"""Preference losses, over the log-probabilities of sequences.

They take what `llmloss_ext.token_stats` and `llmloss_ext.linear_log_probs` return, so that they
work from logits and from hidden states alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from .bounded import finite, valid_tokens

__all__ = ["PreferenceLoss", "dpo_loss", "sequence_log_probs"]


def sequence_log_probs(
    log_probs: Tensor, mask: Tensor | None = None, *, average: bool = False
) -> Tensor:
    """The log-probability of each sequence: the sum (or mean) over its tokens of log p.

    Args:
        log_probs: (..., S), in nats, 0 where a token takes no part.
        mask: (..., S): which tokens count; None: all (ignored ones are 0 already).
        average: Whether to divide by the number of tokens, which then needs the mask.

    Returns:
        (...), in nats; nan for the mean of no token. What masked tokens hold does not matter.

    Raises:
        ValueError: The shapes do not fit, or ``average`` has no mask.
    """
    if mask is None:
        if average:
            raise ValueError("the mean over a sequence needs the mask of its tokens")
        return _sum(log_probs)
    total = _sum(torch.where(valid_tokens(mask, log_probs), log_probs, 0.0))
    return total / mask.bool().sum(-1) if average else total


def _sum(log_probs: Tensor) -> Tensor:
    """Over the last dimension; of finite numbers it is finite, in float16 too."""
    total = log_probs.sum(-1)
    if log_probs.dtype != torch.float16:
        return total
    overflows = total.isinf() & log_probs.isfinite().all(-1)
    return torch.where(overflows, torch.finfo(total.dtype).min, total)


class PreferenceLoss(NamedTuple):
    """A preference loss and the implicit rewards, one a pair, detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
    num_items: int | Tensor | None = None,
) -> PreferenceLoss:
    """Direct preference optimisation, the mean over pairs.

    With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)):
    ``"sigmoid"``: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h) (Rafailov et al. 2023; eps:
    Mitchell 2023); ``"hinge"``: max(0, 1 - beta h) (Zhao et al. 2023, SLiC);
    ``"ipo"``: (h - 1 / (2 beta))^2 (Azar et al. 2023; its authors average over tokens).

    Args:
        policy_chosen: (B) log-probabilities of sequences, see `sequence_log_probs`.
        policy_rejected: (B).
        reference_chosen: (B), without a gradient.
        reference_rejected: (B), without a gradient.
        beta: > 0.
        label_smoothing: eps in [0, 0.5), of ``"sigmoid"``.
        kind: ``"sigmoid"``, ``"hinge"`` or ``"ipo"``.
        num_items: What the sum over pairs is divided by in place of their number: the pairs of all
            micro-batches of a step.

    Returns:
        A `PreferenceLoss`: the loss, 0-d, and the rewards (B) beta (log pi - log ref) in nats.

    Raises:
        ValueError: The shapes differ, or an option is out of range.
    """
    tensors = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    items = items_tensor(num_items, "mean", policy_chosen)
    if len({t.shape for t in tensors}) != 1:
        raise ValueError(
            f"expected four tensors of one shape, got {[tuple(t.shape) for t in tensors]}"
        )
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta must be a finite number > 0, got {beta}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f'label_smoothing belongs to kind="sigmoid", got {kind!r}')
    chosen = finite(policy_chosen - reference_chosen.detach())
    rejected = finite(policy_rejected - reference_rejected.detach())
    h = finite(chosen - rejected)
    if kind == "sigmoid":
        margin = finite(beta * h)
        losses = -(1 - label_smoothing) * F.logsigmoid(margin)
        if label_smoothing:
            losses = losses - label_smoothing * F.logsigmoid(-margin)
    elif kind == "hinge":
        losses = finite(torch.relu(1 - beta * h))
    elif kind == "ipo":
        margin = h - 1 / (2 * beta)
        losses = finite(margin * margin)  # the derivative of square() would overflow by its 2
    else:
        raise ValueError(f'kind must be "sigmoid", "hinge" or "ipo", got {kind!r}')
    loss = losses.mean() if items is None else composite.mean(losses, losses.numel(), items)
    return PreferenceLoss(finite(loss), beta * chosen.detach(), beta * rejected.detach())
