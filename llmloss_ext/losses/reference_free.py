"""Preference losses over pairs of sequences that need no reference: CPO, SimPO and ORPO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import documented
from .bounded import bounded_exponent, finite, finite_gradient
from .pairs import (
    PREFERENCE_OPTIONS,
    PreferenceLoss,
    check_call,
    check_number,
    reduced,
    result,
    smoothed,
    working,
)

__all__ = ["cpo_loss", "orpo_loss", "simpo_loss"]

_SMOOTHED = ("sigmoid", "simpo")
_KINDS = (*_SMOOTHED, "hinge", "ipo")


def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    nll_loss: Tensor | None = None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float | None = None,
    alpha: float = 0.0,
    cpo_alpha: float = 1.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> PreferenceLoss:
    """Contrastive preference optimisation (Xu et al. 2024): DPO without a reference, plus an NLL.

    With h the difference of the scores, which are log-probabilities (``alpha`` makes others):
    ``"sigmoid"``: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h); ``"simpo"``: the same of
    beta h - simpo_gamma (Meng et al. 2024; with an NLL, CPO-SimPO);
    ``"hinge"``: max(0, 1 - beta h); ``"ipo"``: (h - 1 / (2 beta))^2. The mean over pairs, plus
    cpo_alpha times ``nll_loss``.

    Args:
        policy_chosen: (B) log-probabilities of sequences, see `sequence_log_probs`; averages over
            their tokens for ``"simpo"`` and ``"ipo"``, as in TRL.
        policy_rejected: (B).
        nll_loss: 0-d: the mean cross entropy of the chosen sequences' tokens, e.g. of
            `llmloss_ext.linear_cross_entropy`, with its own ``num_items`` where there are
            micro-batches. Needed unless ``cpo_alpha`` is 0.
        kind: ``"sigmoid"``, ``"simpo"``, ``"hinge"`` or ``"ipo"``.
        simpo_gamma: The margin that ``"simpo"`` asks for, in units of rewards; None: 0.5.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `PreferenceLoss`; the rewards are beta times the scores. float64 for float64, else
        float32. Finite log-probabilities give a finite loss and gradient. Micro-batches with
        ``num_items`` add up to the batch.

    Raises:
        ValueError: The shapes differ, or an option is out of range or not one of the kind's.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    check_call(
        beta, reduction, nll_loss, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    check_number("label_smoothing", label_smoothing, below=0.5)
    check_number("cpo_alpha", cpo_alpha)
    check_number("alpha", abs(alpha))
    if label_smoothing and kind not in _SMOOTHED:
        raise ValueError(f"label_smoothing belongs to kind sigmoid, simpo; got {kind!r}")
    if simpo_gamma is None:
        simpo_gamma = PREFERENCE_OPTIONS["gamma"].default
    elif kind != "simpo":
        raise ValueError(f'simpo_gamma belongs to kind="simpo", got {kind!r}')
    check_number("simpo_gamma", simpo_gamma)
    if nll_loss is None and cpo_alpha != 0:
        raise ValueError("nll_loss is needed, unless cpo_alpha is 0")

    log_probs = working(policy_chosen), working(policy_rejected)
    chosen, rejected = (_score(x, alpha) for x in log_probs)
    h = finite(chosen - rejected)
    if kind == "hinge":
        losses = finite(torch.relu(1 - beta * h))
    elif kind == "ipo":
        distance = h - 1 / (2 * beta)
        losses = finite(distance * distance)
    else:
        margin = beta * h if kind == "sigmoid" else beta * (h - simpo_gamma / beta)
        losses = smoothed(finite(margin), label_smoothing)
    added = 0.0 if nll_loss is None else cpo_alpha * nll_loss
    loss = reduced(losses, reduction, num_items, added)
    rewards = finite(beta * chosen), finite(beta * rejected)
    return result(loss, *rewards, *log_probs, nll_loss)


documented(
    cpo_loss,
    ("beta", "label_smoothing", "alpha", "cpo_alpha", "reduction", "num_items"),
    PREFERENCE_OPTIONS,
)


def _score(log_probs: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha, whose limit for alpha = 0 is log p."""
    if alpha == 0:
        return log_probs
    exponent = bounded_exponent(finite(-alpha * log_probs))
    return finite_gradient(finite(-torch.expm1(exponent) / alpha))


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> PreferenceLoss:
    """Simple preference optimisation (Meng et al. 2024), the mean over pairs.

    -(1 - eps) log sigma(m) - eps log sigma(-m), m = beta (mean log pi(chosen) - mean log
    pi(rejected)) - gamma. It is `cpo_loss` with ``kind="simpo"`` and no NLL term. The paper's
    gamma is this one; its authors' trainer has gamma / beta.

    Args:
        policy_chosen: (B) averages over the tokens of log p:
            ``sequence_log_probs(..., average=True)``.
        policy_rejected: (B).
        beta: > 0: the scale of the rewards.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `PreferenceLoss`; the rewards are beta times the averages. float64 for float64, else
        float32. Finite log-probabilities give a finite loss and gradient. Micro-batches with
        ``num_items`` add up to the batch.

    Raises:
        ValueError: The shapes differ, or an option is out of range.
    """
    check_number("gamma", gamma)
    return cpo_loss(
        policy_chosen, policy_rejected, kind="simpo", beta=beta, label_smoothing=label_smoothing,
        simpo_gamma=gamma, cpo_alpha=0.0, reduction=reduction, num_items=num_items,
    )  # fmt: skip


documented(simpo_loss, ("gamma", "label_smoothing", "reduction", "num_items"), PREFERENCE_OPTIONS)


def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    nll_loss: Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> PreferenceLoss:
    """Odds-ratio preference optimisation (Hong et al. 2024).

    ``nll_loss`` minus beta times the mean over pairs of log sigma(log odds(chosen) -
    log odds(rejected)), log odds = log p - log(1 - p), log p the average over the tokens.

    Args:
        policy_chosen: (B) averages over the tokens of log p:
            ``sequence_log_probs(..., average=True)``.
        policy_rejected: (B).
        nll_loss: 0-d: the mean cross entropy of the chosen sequences, in TRL with their prompts,
            e.g. of `llmloss_ext.linear_cross_entropy`, with its own ``num_items`` where there are
            micro-batches.
        beta: > 0 (lambda in the paper).
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `PreferenceLoss`; the rewards are beta times the averages. float64 for float64, else
        float32. Finite log-probabilities give a finite loss and gradient: one of 0 stands as the
        next lower number, constant. Micro-batches with ``num_items`` add up to the batch.

    Raises:
        ValueError: The shapes differ, or an option is out of range.
    """
    check_call(
        beta, reduction, nll_loss, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    chosen, rejected = working(policy_chosen), working(policy_rejected)
    log_odds = finite(
        finite(chosen - rejected) - (_log_of_the_rest(chosen) - _log_of_the_rest(rejected))
    )
    ratio = F.logsigmoid(log_odds)
    return result(
        reduced(finite(-beta * ratio), reduction, num_items, nll_loss),
        finite(beta * chosen), finite(beta * rejected), chosen, rejected, nll_loss, ratio, log_odds,
    )  # fmt: skip


documented(orpo_loss, ("reduction", "num_items"), PREFERENCE_OPTIONS)


def _log_of_the_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), for log p < 0; expm1 keeps the digits where p is nearly 1."""
    return torch.log(-torch.expm1(log_p.clamp_max(-torch.finfo(log_p.dtype).tiny)))
