"""On-policy distillation: the reverse KL of what the student has sampled itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..composite import real_of
from .bounded import Bounds, check_same_shape, finite, finite_gradient, valid_tokens, where_valid

__all__ = ["SampledKL", "sampled_reverse_kl"]


class SampledKL(NamedTuple):
    """The loss, and what trainers log."""

    loss: Tensor
    """0-d."""
    reverse_kl: Tensor
    """The mean of log q - log p over the tokens of this call, 0-d and detached, in nats."""
    clip_fraction: Tensor
    """The share of tokens whose ratio the clip has cut off, 0-d and detached."""

    def backward(self) -> None:
        """As ``loss.backward()``."""
        self.loss.backward()  # type: ignore[no-untyped-call]


def sampled_reverse_kl(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    loss_max_clamp: float | None = None,
    num_items: int | Tensor | None = None,
) -> SampledKL:
    """The reverse KL(student || teacher) of each sampled token, with the gradient of a policy.

    On-policy distillation (Thinking Machines 2025; verl's ``use_policy_gradient`` of "k1"): a token
    that the student q has sampled has the advantage A = log p - log q, p the teacher, taken as a
    constant, and the loss is the mean of -r A, r = q / q_old (1 in value without old_log_probs).

    Its value is an unbiased estimate of the mean KL of the tokens, k1, and its gradient one of that
    KL's gradient, E[(log q - log p) grad log q]: no token is credited with what later ones do (a
    discount of 0). To differentiate k1 itself would be wrong: E[grad log q] is 0, whatever the
    teacher says. A is of the student as it is, as in verl, which r makes exact for later steps on
    the same samples, too; Thinking Machines and TRL's IW-OPD have that of the rollout, the same at
    the first.

    Args:
        log_probs: (..., S) of the sampled tokens, in nats: of `llmloss_ext.linear_log_probs`.
        teacher_log_probs: (..., S) of the same tokens, taken as a constant.
        mask: (..., S): which tokens the student has sampled; others may hold anything.
        old_log_probs: (..., S) of the student that sampled, taken as a constant; None: this one.
        epsilon: -min(r A, clamp(r, 1 - epsilon, 1 + epsilon_high) A) in place of -r A, as PPO;
            > 0; None: no clip.
        epsilon_high: Another limit above, > 0; None: ``epsilon``.
        loss_max_clamp: The most that |A| may be, > 0 (verl); None: no limit.
        num_items: What the sum over tokens is divided by in place of their number: those of all
            micro-batches of a step. Of 0 items the loss is 0.

    Returns:
        A `SampledKL` in float32 (float64 for float64). Without ``num_items`` its loss is nan where
        the mask selects nothing. Finite log-probabilities give a finite loss and gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    valid = valid_tokens(mask, log_probs)
    check_same_shape(log_probs, teacher_log_probs=teacher_log_probs, old_log_probs=old_log_probs)
    _check_positive(epsilon=epsilon, epsilon_high=epsilon_high, loss_max_clamp=loss_max_clamp)
    if epsilon is None and epsilon_high is not None:
        raise ValueError("epsilon_high needs epsilon")
    real = real_of(log_probs)
    bounds = Bounds.of(log_probs.dtype, parts=1)
    student = where_valid(valid, finite_gradient(log_probs).to(real))
    teacher = where_valid(valid, teacher_log_probs.detach()).to(real)
    now = student.detach()
    k1 = now - teacher
    advantages = bounds.finite(-k1)
    if loss_max_clamp is not None:
        advantages = advantages.clamp(-loss_max_clamp, loss_max_clamp)
    old = now if old_log_probs is None else where_valid(valid, old_log_probs.detach()).to(real)
    ratio = bounds.exp(student - old)
    gains = bounds.finite(ratio * advantages)
    is_clipped = torch.zeros_like(valid)
    if epsilon is not None:
        high = epsilon if epsilon_high is None else epsilon_high
        clipped = ratio.clamp(1 - epsilon, 1 + high) * advantages
        is_clipped = clipped < gains
        gains = torch.minimum(gains, clipped)
    count = valid.sum()
    items = items_tensor(num_items, "mean", log_probs)
    losses = where_valid(valid, -gains)
    return SampledKL(
        finite(composite.mean(losses, count, items)),
        composite.mean(where_valid(valid, k1), count, None).detach(),
        composite.mean(where_valid(valid, is_clipped.to(real)), count, None).detach(),
    )


def _check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value}")
