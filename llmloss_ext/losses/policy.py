"""Policy losses, over the log-probabilities of tokens.

They take what `llmloss_ext.token_stats` and `llmloss_ext.linear_log_probs` return, so that they
work from logits and from hidden states alike. What a token adds to them is in `surrogates`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..options import documented, spelled_out
from .bounded import Bounds, check_same_shape, valid_tokens, where_valid
from .policy_options import POLICY_OPTIONS, PolicyOptions
from .surrogates import (
    PolicyMetrics,
    added_up,
    prepare,
    surrogate,
    token_losses,
    with_sequences,
)

__all__ = ["PolicyLoss", "PolicyMetrics", "ValueLoss", "grpo_loss", "ppo_clip_loss", "value_loss"]


class PolicyLoss(NamedTuple):
    """A policy loss, and what trainers log."""

    loss: Tensor
    """0-d, or (..., S) without a reduction; float32, or float64 for float64."""
    metrics: PolicyMetrics
    """0-d and detached. ``policy_loss`` is divided as the loss, the others are means over the
    tokens of this call, whatever ``num_items``."""

    def backward(self) -> None:
        """As ``loss.backward()``."""
        self.loss.backward()  # type: ignore[no-untyped-call]

    def item(self) -> float:
        """The loss as a number; waits for its device."""
        return float(self.loss.item())


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    num_items: int | Tensor | None = None,
    entropy_items: int | Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> PolicyLoss:
    """Group-relative policy optimisation (Shao et al. 2024) and its kin, as TRL's GRPOTrainer.

    Of each token, with r = exp(log pi - log pi_old): the clipped surrogate
    -min(min(r, delta) A, clamp(r, 1 - epsilon, 1 + epsilon_high) A), or what ``loss_type`` puts in
    its place, times ``importance_sampling_ratio``; plus beta times an estimate of KL(pi || ref).
    The tokens' losses are added up and divided as ``loss_type`` says; then entropy_coef times the
    mean entropy is subtracted.

    With ``loss_type="dapo"`` and advantages of tokens this is `ppo_clip_loss`, with metrics.

    Args:
        log_probs: (..., S) of the policy, in nats; every row of S is a sequence.
        old_log_probs: (..., S) of the policy that acted, without a gradient; None: the policy
            itself, so that every ratio is 1.
        advantages: (...) or (..., 1), one a sequence, or (..., S); see `group_advantages`.
        mask: (..., S): which tokens count; others may hold anything.
        reference_log_probs: (..., S), without a gradient; None: no KL.
        entropy: (..., S) in nats, of `llmloss_ext.token_stats`; for ``entropy_coef``, and a metric.
        entropy_mask: (..., S): the only tokens that have a surrogate and an entropy bonus; see
            `high_entropy_mask`. The others still have the KL, and count where one divides.
        importance_sampling_ratio: (..., S) or (..., 1): factor of the surrogate, see
            `rollout_weights`. Of vespo it enters the sequence's ratio.
        sampling_log_probs: (..., S), nan where there is none, of the engine that sampled, with
            ``off_policy_mask_threshold``; None: ``old_log_probs``.
        Options: each is described in `llmloss_ext.options`.
        num_items: What the sum is divided by, for exact accumulation: the sequences of all
            micro-batches of a step (grpo, sapo, luspo; dr_grpo, times its length) or their tokens
            (dapo, cispo, vespo). An int >= 0 or a 0-d tensor; of 0 items the loss is 0.
        entropy_items: The tokens of all micro-batches that have an entropy bonus; with
            ``num_items`` and ``entropy_coef``.
        reduction: ``"mean"``; ``"none"``: the tokens' losses, not divided, each less entropy_coef
            times its entropy.

    Returns:
        A `PolicyLoss`. Where the mask selects nothing the loss is 0. Finite log-probabilities give
        a finite loss and gradient, also of 16 bits: ratios are bounded where they overflow.

    Raises:
        ValueError: The shapes do not fit, an option is out of range or not of this loss, or what
            it needs is not there.
    """
    checked = PolicyOptions.of(**options)
    check_same_shape(log_probs, mask=mask, entropy=entropy, sampling_log_probs=sampling_log_probs)
    if checked.entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs the entropy")
    if sampling_log_probs is not None and checked.off_policy_mask_threshold is None:
        raise ValueError("sampling_log_probs belongs to off_policy_mask_threshold")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    tokens = prepare(
        mask,
        checked,
        log_probs.dtype,
        advantages=advantages,
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        importance_sampling_ratio=importance_sampling_ratio,
        entropy_mask=entropy_mask,
        num_items=items_tensor(num_items, reduction, mask),
        entropy_items=items_tensor(entropy_items, reduction, mask),
    )
    if checked.by_sequences:
        tokens = with_sequences(log_probs, tokens, checked, sampling_log_probs)
    terms = surrogate(log_probs, tokens, checked)
    whole = added_up(terms, entropy, tokens, checked)
    if reduction == "none":
        return PolicyLoss(token_losses(terms, entropy, tokens, checked), whole.metrics)
    return PolicyLoss(*whole)


documented(spelled_out(grpo_loss, POLICY_OPTIONS, POLICY_OPTIONS), table=POLICY_OPTIONS)


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate, the mean over tokens (Schulman et al. 2017).

    -min(r A, clamp(r, 1 - epsilon, 1 + epsilon_high) A), r = exp(log pi - log pi_old), minus
    entropy_coef times the mean entropy. `grpo_loss` returns the same with metrics.

    Args:
        log_probs: (..., S) of the policy, in nats.
        old_log_probs: (..., S) of the policy that acted, without a gradient.
        advantages: (..., S), or (..., 1) or (...) for one a sequence; see `gae`.
        mask: (..., S): which tokens count; others may hold anything.
        Options: each is described in `llmloss_ext.options`.
        entropy: (..., S) in nats, of `llmloss_ext.token_stats`; with ``entropy_coef``.
        num_items: What both sums over tokens are divided by in place of their number: the tokens of
            all micro-batches of a step, or any other constant. Of 0 items the loss is 0.

    Returns:
        0-d, float32, or float64 for float64; 0 where the mask selects nothing. Finite
        log-probabilities give a finite loss and gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    return grpo_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        entropy=entropy,
        entropy_coef=entropy_coef,
        num_items=num_items,
        entropy_items=num_items,
    ).loss


documented(ppo_clip_loss, table=POLICY_OPTIONS)


class ValueLoss(NamedTuple):
    """A value loss, and the fraction of tokens whose value was clipped, detached; both 0-d."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    num_items: int | Tensor | None = None,
) -> ValueLoss:
    """The clipped loss of a critic, the mean over tokens (Schulman et al. 2017; as TRL and verl).

    max((v - R)^2, (clamp(v, v_old - c, v_old + c) - R)^2) / 2, c = cliprange_value.

    Args:
        values: (..., S) of the critic.
        old_values: (..., S) when the tokens were sampled, without a gradient.
        returns: (..., S), of `gae`.
        mask: (..., S): which tokens count; others may hold anything.
        cliprange_value: > 0; None: not clipped, and ``old_values`` are not looked at.
        num_items: What the sum is divided by in place of the number of tokens; of 0 items the loss
            is 0.

    Returns:
        A `ValueLoss`, float32, or float64 for float64; 0 where the mask selects nothing.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    if cliprange_value is not None and not 0.0 < cliprange_value < math.inf:
        raise ValueError(f"cliprange_value must be a finite number > 0, got {cliprange_value}")
    valid = valid_tokens(mask, values)
    check_same_shape(values, old_values=old_values, returns=returns)
    real = composite.real_of(values)
    of_gradient, of_squares = Bounds.of(values.dtype, parts=1), Bounds.of(real, parts=1)
    v, old, wanted = (
        where_valid(valid, x.to(real)) for x in (values, old_values.detach(), returns.detach())
    )

    def squared(x: Tensor) -> Tensor:
        error = of_gradient.finite(x - wanted)
        return of_squares.finite(error * error)

    losses = squared(v)
    clipped = torch.zeros_like(valid)
    if cliprange_value is not None:
        others = squared(
            torch.maximum(torch.minimum(v, old + cliprange_value), old - cliprange_value)
        )
        clipped = others > losses
        losses = torch.maximum(losses, others)
    count = valid.sum().clamp_min(1)
    items = items_tensor(num_items, "mean", values)
    loss = of_squares.finite(composite.mean(0.5 * where_valid(valid, losses), count, items))
    return ValueLoss(loss, (clipped & valid).sum() / count)
