"""Preference and policy losses, over the log-probabilities of tokens.

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

__all__ = ["PreferenceLoss", "dpo_loss", "grpo_loss", "ppo_clip_loss", "sequence_log_probs"]


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
    total = _sum(torch.where(_mask(mask, log_probs), log_probs, 0.0))
    return total / mask.bool().sum(-1) if average else total


def _sum(log_probs: Tensor) -> Tensor:
    """Over the last dimension; of finite numbers it is finite, in float16 too."""
    total = log_probs.sum(-1)
    if log_probs.dtype != torch.float16:
        return total
    overflows = total.isinf() & log_probs.isfinite().all(-1)
    return torch.where(overflows, torch.finfo(total.dtype).min, total)


def _mask(mask: Tensor, like: Tensor) -> Tensor:
    _same_shape(like, mask=mask)
    return mask.bool()


def _same_shape(log_probs: Tensor, **others: Tensor | None) -> None:
    """No broadcasting: a tensor of another shape is a mistake."""
    for name, other in others.items():
        if other is not None and other.shape != log_probs.shape:
            raise ValueError(
                f"{name} must have the shape of the log-probabilities, {tuple(log_probs.shape)}, "
                f"got {tuple(other.shape)}"
            )


def _where(valid: Tensor, x: Tensor) -> Tensor:
    """0 at tokens that do not count: a padding's -inf or nan gets into no exp, and no gradient."""
    return torch.where(valid, x, 0.0)


_LARGEST_EXPONENT = {
    torch.float64: 709.782712893384,
    torch.float32: 88.72283172607422,
    torch.bfloat16: 88.5,
    torch.float16: 11.0859375,
}
"""The largest number of each type whose exponential is finite."""


def _exponent(log_ratio: Tensor) -> Tensor:
    """The logarithm of a ratio, as far as the ratio is finite; beyond, it is constant."""
    return log_ratio.clamp_max(_LARGEST_EXPONENT[log_ratio.dtype])


def _finite(x: Tensor) -> Tensor:
    """The nearest finite number, constant where that is another: no inf gets into a gradient."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


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
    chosen = _finite(policy_chosen - reference_chosen.detach())
    rejected = _finite(policy_rejected - reference_rejected.detach())
    h = _finite(chosen - rejected)
    if kind == "sigmoid":
        margin = _finite(beta * h)
        losses = -(1 - label_smoothing) * F.logsigmoid(margin)
        if label_smoothing:
            losses = losses - label_smoothing * F.logsigmoid(-margin)
    elif kind == "hinge":
        losses = _finite(torch.relu(1 - beta * h))
    elif kind == "ipo":
        margin = h - 1 / (2 * beta)
        losses = _finite(margin * margin)  # the derivative of square() would overflow by its 2
    else:
        raise ValueError(f'kind must be "sigmoid", "hinge" or "ipo", got {kind!r}')
    loss = losses.mean() if items is None else composite.mean(losses, losses.numel(), items)
    return PreferenceLoss(_finite(loss), beta * chosen.detach(), beta * rejected.detach())


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    entropy: Tensor | None = None,
    entropy_bonus: float = 0.0,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate, the mean over tokens (Schulman et al. 2017).

    -min(r A, clamp(r, 1 - clip, 1 + clip_high) A), r = exp(log pi - log pi_old), minus
    entropy_bonus times the mean entropy.

    Args:
        log_probs: (..., S) of the policy, in nats.
        old_log_probs: (..., S) of the policy that acted, without a gradient.
        advantages: (..., S), or (..., 1) for one a sequence.
        mask: (..., S): which tokens count; others may hold anything.
        clip: > 0.
        clip_high: Another limit above (DAPO, Yu et al. 2025); None: ``clip``.
        entropy: (..., S) in nats, of `llmloss_ext.token_stats`; with ``entropy_bonus``.
        entropy_bonus: >= 0.
        num_items: What the sum over tokens is divided by in place of their number: the tokens of
            all micro-batches of a step (DAPO), or any other constant (Dr. GRPO, Liu et al. 2025).

    Returns:
        0-d; without ``num_items`` nan where the mask selects nothing. What masked tokens hold does
        not matter, and finite log-probabilities give a finite loss and gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    valid = _mask(mask, log_probs)
    if advantages.shape not in (log_probs.shape, (*log_probs.shape[:-1], 1)):
        raise ValueError(
            "advantages must have the shape of the log-probabilities, or one number per sequence, "
            f"{(*log_probs.shape[:-1], 1)}; got {tuple(advantages.shape)}"
        )
    losses = _clipped(valid, log_probs, old_log_probs, advantages, clip, clip_high)
    losses = losses - _bonus(valid, log_probs, entropy, entropy_bonus)
    items = items_tensor(num_items, "mean", log_probs)
    return _finite(composite.mean(_where(valid, losses), valid.sum(), items))


def _clipped(
    valid: Tensor,
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None,
) -> Tensor:
    _same_shape(log_probs, old_log_probs=old)
    high = clip if clip_high is None else clip_high
    if not (0.0 < clip < math.inf and 0.0 < high < math.inf):
        raise ValueError(f"clip and clip_high must be finite numbers > 0, got {clip, high}")
    advantages = _where(valid, advantages)
    log_ratio = _where(valid, log_probs) - _where(valid, old.detach())
    ratio = torch.exp(_exponent(log_ratio))
    clipped = ratio.clamp(1 - clip, 1 + high)
    return -torch.minimum(_finite(ratio * advantages), clipped * advantages)


def _bonus(
    valid: Tensor, log_probs: Tensor, entropy: Tensor | None, weight: float
) -> Tensor | float:
    _same_shape(log_probs, entropy=entropy)
    if weight == 0:
        return 0.0
    if entropy is None or not 0.0 < weight < math.inf:
        raise ValueError("entropy_bonus must be a finite number >= 0, and needs the entropy")
    return weight * _where(valid, entropy)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_log_probs: Tensor | None = None,
    kl_weight: float = 0.04,
    clip: float = 0.2,
    clip_high: float | None = None,
    entropy: Tensor | None = None,
    entropy_bonus: float = 0.0,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Group-relative policy optimisation (Shao et al. 2024).

    The clipped surrogate, averaged over each sequence's tokens and then over sequences, plus
    kl_weight times the k3 estimate of KL(pi || ref): e^d - d - 1, d = log ref - log pi
    (Schulman 2020), minus entropy_bonus times the entropy.

    Args:
        log_probs: (B, S) of the policy, in nats.
        old_log_probs: (B, S), without a gradient.
        advantages: (B): rewards of a prompt's group, standardised within it.
        mask: (B, S): which tokens count.
        reference_log_probs: (B, S), without a gradient; None: no KL term.
        kl_weight: >= 0.
        clip: > 0.
        clip_high: Another limit above; None: ``clip``.
        entropy: (B, S), with ``entropy_bonus``.
        entropy_bonus: >= 0.
        num_items: What the sum over sequences is divided by in place of their number: the sequences
            of all micro-batches of a step.

    Returns:
        0-d. A sequence of no token counts as 0. What masked tokens hold does not matter, and finite
        log-probabilities give a finite loss and gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    if advantages.shape != log_probs.shape[:-1]:
        raise ValueError(
            f"advantages must have one number per sequence, {tuple(log_probs.shape[:-1])}, got "
            f"{tuple(advantages.shape)}"
        )
    if not 0.0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be a finite number >= 0, got {kl_weight}")
    valid = _mask(mask, log_probs)
    losses = _clipped(valid, log_probs, old_log_probs, advantages.unsqueeze(-1), clip, clip_high)
    _same_shape(log_probs, reference_log_probs=reference_log_probs)
    if reference_log_probs is not None and kl_weight != 0:
        d = _exponent(_where(valid, reference_log_probs.detach()) - _where(valid, log_probs))
        losses = _finite(losses + _finite(kl_weight * (torch.expm1(d) - d)))
    losses = losses - _bonus(valid, log_probs, entropy, entropy_bonus)
    tokens = valid.sum(-1).clamp_min(1)
    sequences = _finite(_where(valid, losses).sum(-1)) / tokens
    items = items_tensor(num_items, "mean", log_probs)
    return _finite(sequences.mean() if items is None else composite.mean(sequences, 1, items))
