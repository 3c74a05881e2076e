"""Policy losses, over the log-probabilities of tokens.

They take what `llmloss_ext.token_stats` and `llmloss_ext.linear_log_probs` return, so that they
work from logits and from hidden states alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from .bounded import bounded_exponent, check_same_shape, finite, valid_tokens, where_valid

__all__ = ["grpo_loss", "ppo_clip_loss"]


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
    valid = valid_tokens(mask, log_probs)
    if advantages.shape not in (log_probs.shape, (*log_probs.shape[:-1], 1)):
        raise ValueError(
            "advantages must have the shape of the log-probabilities, or one number per sequence, "
            f"{(*log_probs.shape[:-1], 1)}; got {tuple(advantages.shape)}"
        )
    losses = _clipped(valid, log_probs, old_log_probs, advantages, clip, clip_high)
    losses = losses - _bonus(valid, log_probs, entropy, entropy_bonus)
    items = items_tensor(num_items, "mean", log_probs)
    return finite(composite.mean(where_valid(valid, losses), valid.sum(), items))


def _clipped(
    valid: Tensor,
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None,
) -> Tensor:
    check_same_shape(log_probs, old_log_probs=old)
    high = clip if clip_high is None else clip_high
    if not (0.0 < clip < math.inf and 0.0 < high < math.inf):
        raise ValueError(f"clip and clip_high must be finite numbers > 0, got {clip, high}")
    advantages = where_valid(valid, advantages)
    log_ratio = where_valid(valid, log_probs) - where_valid(valid, old.detach())
    ratio = torch.exp(bounded_exponent(log_ratio))
    clipped = ratio.clamp(1 - clip, 1 + high)
    return -torch.minimum(finite(ratio * advantages), clipped * advantages)


def _bonus(
    valid: Tensor, log_probs: Tensor, entropy: Tensor | None, weight: float
) -> Tensor | float:
    check_same_shape(log_probs, entropy=entropy)
    if weight == 0:
        return 0.0
    if entropy is None or not 0.0 < weight < math.inf:
        raise ValueError("entropy_bonus must be a finite number >= 0, and needs the entropy")
    return weight * where_valid(valid, entropy)


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
    valid = valid_tokens(mask, log_probs)
    losses = _clipped(valid, log_probs, old_log_probs, advantages.unsqueeze(-1), clip, clip_high)
    check_same_shape(log_probs, reference_log_probs=reference_log_probs)
    if reference_log_probs is not None and kl_weight != 0:
        d = bounded_exponent(where_valid(valid, reference_log_probs.detach()) - where_valid(valid, log_probs))
        losses = finite(losses + finite(kl_weight * (torch.expm1(d) - d)))
    losses = losses - _bonus(valid, log_probs, entropy, entropy_bonus)
    tokens = valid.sum(-1).clamp_min(1)
    sequences = finite(where_valid(valid, losses).sum(-1)) / tokens
    items = items_tensor(num_items, "mean", log_probs)
    return finite(sequences.mean() if items is None else composite.mean(sequences, 1, items))
