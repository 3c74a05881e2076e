"""What the preference losses share: their options, their result, and how pairs are averaged."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..options import Option
from .bounded import finite, finite_gradient

__all__ = ["PREFERENCE_OPTIONS", "PreferenceLoss"]


PREFERENCE_OPTIONS = {
    "kind": Option(
        "str | Sequence[str]",
        "sigmoid",
        "One of the kinds above, or several of them, whose losses are added up.",
    ),
    "loss_weights": Option(
        "Sequence[float] | None",
        None,
        "A factor for each of several kinds (MPO, Wang et al. 2024); by default 1.",
    ),
    "beta": Option("float", 0.1, "> 0: the scale of the rewards; of ``ipo`` its tau."),
    "label_smoothing": Option(
        "float", 0.0, "eps in [0, 0.5): the probability that a label is the wrong way round."
    ),
    "f_divergence_type": Option(
        "str",
        "reverse_kl",
        "What keeps the policy near the reference (f-DPO, Wang et al. 2023). With the log-ratio d "
        'of a sequence, its score is d for ``"reverse_kl"``, 1 - e^-d for ``"forward_kl"``, '
        'log 2 + log sigma(d) for ``"js_divergence"`` and (e^((alpha - 1) d) - 1) / (alpha - 1) '
        'for ``"alpha_divergence"``.',
    ),
    "f_alpha_divergence_coef": Option(
        "float", 0.5, "alpha of that divergence; of 1, which is its limit, reverse_kl."
    ),
    "discopop_tau": Option("float", 0.05, "tau of ``discopop``, > 0."),
    "chosen_lengths": Option(
        "Tensor | None", None, "(B): the tokens of each chosen sequence, by which it is divided."
    ),
    "rejected_lengths": Option("Tensor | None", None, "(B)."),
    "pair_weight": Option(
        "Tensor | None",
        None,
        "(B), taken as constants: factors of the pairs' losses, such as the product of the chosen "
        "and the rejected `llmloss_ext.losses.wpo_weights`. The mean still divides by the number "
        "of pairs.",
    ),
    "nll_loss": Option(
        "Tensor | None",
        None,
        "0-d: the mean cross entropy of the chosen sequences' tokens, e.g. of "
        "`llmloss_ext.linear_cross_entropy`, with its own ``num_items`` where there are "
        "micro-batches.",
    ),
    "reduction": Option(
        "str",
        "mean",
        '``"mean"``, or ``"none"``: one loss each, (B), whose mean is that of ``"mean"``.',
    ),
    "num_items": Option(
        "int | Tensor | None",
        None,
        "What the sum over the batch is divided by in place of B: the pairs (or sequences) of all "
        "micro-batches of a step. Of 0 items, the loss and its gradients are 0.",
    ),
    "simpo_gamma": Option("float", 0.5, "The margin that ``simpo`` asks for, in units of rewards."),
    "gamma": Option("float", 0.5, "The margin that is asked for, in units of rewards."),
    "alpha": Option(
        "float",
        0.0,
        "AlphaPO (Gupta et al. 2025): a sequence's score is (1 - p^-alpha) / alpha in place of "
        "log p, which is that of 0.",
    ),
    "cpo_alpha": Option("float", 1.0, "The factor of ``nll_loss``, >= 0; 0: without it."),
    "desirable_weight": Option("float", 1.0, "Factor of the desirable sequences' losses, >= 0."),
    "undesirable_weight": Option("float", 1.0, "Factor of the others' losses, >= 0."),
    "kl": Option(
        "Tensor | None",
        None,
        "0-d, of `llmloss_ext.losses.kl_estimate`, taken as a constant.",
    ),
    "weight": Option(
        "Tensor | None",
        None,
        "(B), taken as constants: factors of the sequences' losses, such as the density ratios of "
        "underlying distribution matching (1 for the desirable).",
    ),
}
"""The options of this family of losses."""


class PreferenceLoss(NamedTuple):
    """A preference loss and, detached, what trainers log: one number a pair where not said."""

    loss: Tensor
    """0-d, or (B) without a reduction."""
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    """Chosen minus rejected rewards."""
    accuracies: Tensor
    """1 where the chosen reward is the higher one, else 0."""
    chosen_log_probs: Tensor
    rejected_log_probs: Tensor
    nll_loss: Tensor | None = None
    """0-d, where the loss has this term."""
    log_odds_ratio: Tensor | None = None
    """Of ORPO: log sigma(log odds)."""
    log_odds_chosen: Tensor | None = None
    """Of ORPO: the log of the odds' ratio."""


def working(log_probs: Tensor) -> Tensor:
    """In float32 (float64 stays); the gradient that comes back fits into the own dtype."""
    return finite_gradient(log_probs).to(composite.real_of(log_probs))


def constant(log_probs: Tensor) -> Tensor:
    """In float32 (float64 stays), without a gradient."""
    return log_probs.detach().to(composite.real_of(log_probs))


def check_vectors(**vectors: Tensor | None) -> None:
    """Raises a ValueError unless all are of one shape: a broadcast would be a mistake."""
    given = {name: t for name, t in vectors.items() if t is not None}
    first = next(iter(given.values()))
    if any(t.shape != first.shape for t in given.values()):  # a set would fix a symbolic size
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        raise ValueError(f"expected tensors of one shape, got {shapes}")


def check_number(
    name: str, value: float, at_least: float = 0.0, *, below: float = math.inf, strict: bool = False
) -> None:
    """Raises a ValueError unless at_least <= value (or <, if ``strict``) and value < below."""
    if not (at_least < value if strict else at_least <= value) or not value < below:
        limit = f"{'>' if strict else '>='} {at_least}"
        limit += f" and < {below}" if below < math.inf else ""
        raise ValueError(f"{name} must be a finite number {limit}, got {value}")


def check_reduction(reduction: str) -> None:
    """Raises a ValueError unless it is one of this family's."""
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')


def check_call(
    beta: float,
    reduction: str,
    nll_loss: Tensor | None = None,
    **vectors: Tensor | None,
) -> None:
    """What all these losses check: one number a pair (or sequence) each, and what they share.

    Raises:
        ValueError: The shapes differ, ``nll_loss`` is not one number on the device of the others,
            or an option is out of range.
    """
    check_vectors(**vectors)
    like = next(t for t in vectors.values() if t is not None)
    if nll_loss is not None and (nll_loss.dim() != 0 or nll_loss.device != like.device):
        raise ValueError(
            f"nll_loss must be 0-d and on {like.device}, got shape {tuple(nll_loss.shape)} on "
            f"{nll_loss.device}"
        )
    check_number("beta", beta, strict=True)
    check_reduction(reduction)


def reduced(
    losses: Tensor,
    reduction: str,
    num_items: int | Tensor | None,
    added: Tensor | float = 0.0,
) -> Tensor:
    """The mean over pairs (or each), plus a number that is a mean already."""
    check_reduction(reduction)
    items = items_tensor(num_items, reduction, losses)
    if reduction == "mean":
        mean = losses.mean() if items is None else composite.mean(losses, losses.numel(), items)
        losses = finite(mean)
    return losses if isinstance(added, float) else finite(losses + added.to(losses.dtype))


def result(
    loss: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    nll_loss: Tensor | None = None,
    log_odds_ratio: Tensor | None = None,
    log_odds_chosen: Tensor | None = None,
) -> PreferenceLoss:
    """The loss, and its metrics detached; nobody waits for the device."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    optional = (nll_loss, log_odds_ratio, log_odds_chosen)
    return PreferenceLoss(
        loss,
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).to(chosen.dtype),
        chosen_log_probs.detach(),
        rejected_log_probs.detach(),
        *(None if t is None else t.detach() for t in optional),
    )


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin)."""
    losses = -(1 - label_smoothing) * torch.nn.functional.logsigmoid(margin)
    if label_smoothing:
        losses = losses - label_smoothing * torch.nn.functional.logsigmoid(-margin)
    return losses
