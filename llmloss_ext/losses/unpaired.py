"""Preference losses of sequences that come without pairs, each good or bad: KTO and BCO."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composite import total
from ..options import documented
from .bounded import finite
from .pairs import (
    PREFERENCE_OPTIONS,
    check_call,
    check_number,
    check_vectors,
    constant,
    reduced,
    working,
)

__all__ = ["RunningMean", "UnpairedLoss", "bco_loss", "kl_estimate", "kto_loss"]

_KINDS = ("kto", "apo_zero_unpaired")


class UnpairedLoss(NamedTuple):
    """A loss of sequences and, detached, what trainers log; a mean of none is nan."""

    loss: Tensor
    """0-d, or (B) without a reduction."""
    rewards: Tensor
    """(B): beta (log pi - log ref)."""
    chosen_rewards: Tensor
    """0-d: the mean over the desirable sequences."""
    rejected_rewards: Tensor
    """0-d: over the others."""
    margins: Tensor
    """0-d: the difference of the two."""
    chosen_log_probs: Tensor
    """0-d: the mean over the desirable sequences of the policy's."""
    rejected_log_probs: Tensor
    """0-d: over the others."""
    shift: Tensor
    """0-d: what a reward is compared to: beta times the KL, or BCO's running mean."""


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:
    """KTO's estimate of KL(pi || ref): the mean of log pi - log ref, at least 0.

    Args:
        policy: (B) log-probabilities of sequences that belong to other prompts, in nats.
        reference: (B).

    Returns:
        0-d in nats, without a gradient. Over several ranks, or micro-batches, it is the mean over
        all of them, clamped then: pass all of the log-probabilities, gathered.

    Raises:
        ValueError: The shapes differ.
    """
    check_vectors(policy=policy, reference=reference)
    return finite(finite(constant(policy) - constant(reference)).mean()).clamp_min(0)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | None = None,
    kind: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> UnpairedLoss:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024), the mean over sequences.

    With d = log pi - log ref, ``"kto"``: 1 - sigma(beta (d - kl)) of a desirable sequence,
    1 - sigma(beta (kl - d)) of another; ``"apo_zero_unpaired"``: 1 - sigma(beta d) and
    sigma(beta d) (D'Oosterlinck et al. 2024). As in TRL, the mean divides by the number of
    sequences, not by their weights.

    Args:
        policy: (B) log-probabilities of sequences, see `sequence_log_probs`.
        reference: (B), without a gradient.
        desirable: (B) bool, or 0 and 1.
        kind: ``"kto"``, which needs ``kl``, or ``"apo_zero_unpaired"``, which takes none.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        An `UnpairedLoss`. float64 for float64, else float32. Finite log-probabilities give a finite
        loss and gradient. Micro-batches with ``num_items`` add up to the batch if they are given
        its ``kl``; each with its own, they do not.

    Raises:
        ValueError: The shapes differ, or an option is out of range or not one of the kind's.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    if (kl is None) == (kind == "kto"):
        given = "none" if kl is None else "one"
        raise ValueError(f'kl belongs to kind="kto", which needs it; got {given} and {kind!r}')
    check_call(beta, reduction, policy=policy, reference=reference, desirable=desirable)
    _check_0d("kl", kl)
    check_number("desirable_weight", desirable_weight)
    check_number("undesirable_weight", undesirable_weight)
    log_probs, good = working(policy), desirable.bool()
    log_ratio = finite(log_probs - constant(reference))
    shift = log_ratio.new_zeros(()) if kl is None else constant(kl).to(log_ratio.dtype)
    margin = finite(beta * finite(log_ratio - shift))
    # 1 - sigma(x) = sigma(-x), which keeps its digits as it goes to 0.
    losses = torch.sigmoid(torch.where(good, -margin, margin))
    losses = finite(torch.where(good, desirable_weight * losses, undesirable_weight * losses))
    loss = reduced(losses, reduction, num_items)
    return _result(loss, finite(beta * log_ratio), log_probs, good, finite(beta * shift))


documented(
    kto_loss,
    ("kl", "beta", "desirable_weight", "undesirable_weight", "reduction", "num_items"),
    PREFERENCE_OPTIONS,
)


class RunningMean:
    """The mean of all numbers seen so far, on their device; nobody waits for it.

    Attributes:
        mean: 0-d float64: 0 before the first number.
        count: 0-d int64.
    """

    def __init__(self) -> None:
        self.mean = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)

    def update(self, values: Tensor) -> Tensor:
        """Takes numbers in, and returns the mean, 0-d; a number that is nan counts for nothing.

        The numbers of several ranks have to be gathered before.
        """
        values = values.detach().double()
        valid = ~values.isnan()
        new = valid.sum()
        self.count = self.count.to(values.device) + new
        share = self.count.clamp_min(1)
        old = self.mean.to(values.device)
        # The mean of differences: sums of many numbers would lose their last digits.
        self.mean = old + torch.where(valid, values - old, 0.0).sum() / share
        return self.mean

    def state_dict(self) -> dict[str, Tensor]:
        """The mean and the count, for a checkpoint."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from a checkpoint.

        Raises:
            KeyError: It is not one of this class.
        """
        self.mean, self.count = state["mean"].clone(), state["count"].clone()


def bco_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    shift: RunningMean | Tensor | float,
    beta: float = 0.1,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> UnpairedLoss:
    """Binary classifier optimisation (Jung et al. 2024), the mean over sequences.

    With the reward r = beta (log pi - log ref): -log sigma(r - shift) of a desirable sequence,
    -log sigma(shift - r) of another.

    Args:
        policy: (B) log-probabilities of sequences, see `sequence_log_probs`.
        reference: (B), without a gradient.
        desirable: (B) bool, or 0 and 1.
        shift: A `RunningMean`, which takes the rewards of this batch in before its mean is used (as
            TRL does in training); or a number, taken as a constant: in an evaluation, the ``mean``
            of one. The paper has the mean of the means of either sort.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        An `UnpairedLoss`. float64 for float64, else float32. Finite log-probabilities give a finite
        loss and gradient. Micro-batches with ``num_items`` add up to the batch if they are given
        one number as the shift; a `RunningMean` moves from one to the next.

    Raises:
        ValueError: The shapes differ, or an option is out of range.
    """
    check_call(
        beta, reduction, policy=policy, reference=reference, desirable=desirable, weight=weight
    )
    log_probs, good = working(policy), desirable.bool()
    rewards = finite(beta * finite(log_probs - constant(reference)))
    if isinstance(shift, RunningMean):
        shift = shift.update(rewards)
    elif not isinstance(shift, Tensor):
        shift = torch.full((), shift, dtype=rewards.dtype, device=rewards.device)
    _check_0d("shift", shift)
    shift = shift.detach().to(rewards.dtype)
    margin = finite(rewards - shift)
    losses = -F.logsigmoid(torch.where(good, margin, -margin))
    if weight is not None:
        losses = finite(losses * weight.detach().to(losses.dtype))
    return _result(reduced(losses, reduction, num_items), rewards, log_probs, good, shift)


documented(bco_loss, ("beta", "weight", "reduction", "num_items"), PREFERENCE_OPTIONS)


def _check_0d(name: str, value: Tensor | None) -> None:
    if value is not None and value.dim() != 0:
        raise ValueError(f"{name} must be 0-d, got shape {tuple(value.shape)}")


def _result(
    loss: Tensor, rewards: Tensor, log_probs: Tensor, good: Tensor, shift: Tensor
) -> UnpairedLoss:
    rewards, log_probs = rewards.detach(), log_probs.detach()
    chosen, rejected = _mean(rewards, good), _mean(rewards, ~good)
    of_policy = _mean(log_probs, good), _mean(log_probs, ~good)
    return UnpairedLoss(
        loss, rewards, chosen, rejected, finite(chosen - rejected), *of_policy, shift.detach()
    )


def _mean(x: Tensor, chosen: Tensor) -> Tensor:
    """Over those that are chosen; nan if none is."""
    return total(torch.where(chosen, x, 0.0)) / chosen.sum()
