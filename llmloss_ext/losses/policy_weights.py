"""Which tokens a policy loss learns from, and how much: masks and weights without a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import composite
from .bounded import (
    Bounds,
    check_same_shape,
    of_tokens_or_sequences,
    valid_tokens,
    where_valid,
)

__all__ = ["high_entropy_mask", "off_policy_mask", "rollout_weights"]

_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def rollout_weights(
    old_log_probs: Tensor,
    sampling_log_probs: Tensor,
    mask: Tensor,
    *,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """The importance weights of tokens that another engine has sampled, for `grpo_loss`.

    pi_old / pi_sampling of each token, or the product over a sequence: an inference engine's
    probabilities differ from the trainer's own (Yao et al. 2025). As TRL's
    ``vllm_importance_sampling_correction``, whose options have the prefix
    ``vllm_importance_sampling_``.

    Args:
        old_log_probs: (..., S) by the trainer's model, in nats, before the step.
        sampling_log_probs: (..., S) by the engine; nan where it has none: the ratio is 1 there.
        mask: (..., S): which tokens count.
        mode: ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"`` or
            ``"sequence_mask"``: of tokens or of sequences; ratios beyond the bounds become the
            bound (truncate) or 0 (mask).
        clip_max: The upper bound; None: none.
        clip_min: The lower bound; None: none.

    Returns:
        (..., S) of tokens, 1 where the mask leaves them out; (..., 1) of sequences. Float32, or
        float64; without a gradient, and finite for finite log-probabilities.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}; got {mode!r}")
    if clip_min is clip_max is None and mode.endswith("truncate"):
        raise ValueError("to truncate, clip_max or clip_min is needed")
    low, high = (
        (0.0 if clip_min is None else clip_min),
        (math.inf if clip_max is None else clip_max),
    )
    if not 0.0 <= low < high:
        raise ValueError(f"expected 0 <= clip_min < clip_max, got {clip_min} and {clip_max}")
    check_same_shape(old_log_probs, sampling_log_probs=sampling_log_probs)
    valid = valid_tokens(mask, old_log_probs)
    old, sampling = _real(old_log_probs), _real(sampling_log_probs)
    log_ratio = torch.where(valid & ~sampling.isnan(), old - sampling, 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = Bounds.of(log_ratio.dtype).exp(log_ratio)
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def off_policy_mask(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    threshold: float,
) -> Tensor:
    """Which tokens are kept: all but those of bad sequences that have become unlikely.

    A sequence of negative advantage is dropped where the mean of log pi_sampling - log pi over its
    tokens is above the threshold (DeepSeek-V3.2, 2025; TRL's ``off_policy_mask_threshold``).

    Args:
        log_probs: (..., S) of the policy, in nats; no gradient is taken.
        sampling_log_probs: (..., S) when the tokens were sampled; nan where there is none.
        advantages: (...), (..., 1) or (..., S).
        mask: (..., S): which tokens count.
        threshold: In nats, > 0.

    Returns:
        bool, (..., 1), or (..., S) for advantages of tokens.

    Raises:
        ValueError: The shapes do not fit, or the threshold is not > 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0, got {threshold}")
    check_same_shape(log_probs, sampling_log_probs=sampling_log_probs)
    valid = valid_tokens(mask, log_probs)
    advantages = of_tokens_or_sequences("advantages", advantages, log_probs)
    fallen = _real(sampling_log_probs) - _real(log_probs)
    fallen = torch.where(valid & ~fallen.isnan(), fallen, 0.0).sum(-1, keepdim=True)
    return (advantages >= 0) | (fallen / valid.sum(-1, keepdim=True).clamp_min(1) <= threshold)


def high_entropy_mask(entropy: Tensor, mask: Tensor, top_entropy_quantile: float) -> Tensor:
    """The tokens of highest entropy, to be ``entropy_mask`` of `grpo_loss` (Wang et al. 2025).

    Those whose entropy is at least the (1 - top_entropy_quantile) quantile, linearly interpolated,
    of the tokens that count in all of this batch. As TRL's ``top_entropy_quantile``, but for one
    process: TRL takes the quantile over all of them.

    Args:
        entropy: (..., S) in nats, of `llmloss_ext.token_stats`.
        mask: (..., S): which tokens count; others may hold anything.
        top_entropy_quantile: In [0, 1]; 1 keeps all, 0 the highest alone.

    Returns:
        bool, (..., S). Nothing waits for the device.

    Raises:
        ValueError: The shapes differ, or the quantile is out of range.
    """
    if not 0.0 <= top_entropy_quantile <= 1.0:
        raise ValueError(f"top_entropy_quantile must be in [0, 1], got {top_entropy_quantile}")
    valid = valid_tokens(mask, entropy)
    entropy = where_valid(valid, _real(entropy))
    if entropy.numel() == 0:
        return valid
    ordered = torch.where(valid, entropy, -math.inf).flatten().sort().values
    count = valid.sum()
    rank = (1.0 - top_entropy_quantile) * (count - 1).clamp_min(0).to(torch.float64)
    low = rank.floor()
    first = ordered.numel() - count  # before it stand the tokens that do not count
    last = ordered.numel() - 1
    below, above = (
        ordered.gather(0, (first + at.long()).clamp_max(last).reshape(1)).squeeze(0)
        for at in (low, rank.ceil())
    )
    threshold = torch.lerp(below, above, (rank - low).to(entropy.dtype))
    return valid & (entropy >= threshold)


def _real(x: Tensor) -> Tensor:
    """Without a gradient, in float32 or float64."""
    return x.detach().to(composite.real_of(x))
