"""Sums of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CombinedLoss", "UncertaintyWeights", "combined_loss", "linear_schedule"]

Term = Tensor | Callable[[], Tensor]


class CombinedLoss(NamedTuple):
    """A weighted sum, and what it is made of."""

    total: Tensor
    """With its gradient."""
    terms: dict[str, Tensor]
    """Each term before its weight, detached; those of weight 0 are left out."""


def combined_loss(terms: Mapping[str, Term], weights: Mapping[str, float]) -> CombinedLoss:
    """The sum over names of weight times term. Does not wait for the device.

    Args:
        terms: Losses (0-d), or functions that compute them: a term of weight 0 is not computed.
        weights: A finite number for each term.

    Returns:
        A `CombinedLoss`: the total, 0-d, in the terms' unit, and each term detached.

    Raises:
        ValueError: The names differ, a weight is not finite, there is no term of a weight other
            than 0, or a term is not 0-d.

    Example:
        >>> combined_loss({"lm": lm, "mlm": lambda: mlm_loss(h, labels, w)}, {"lm": 1, "mlm": 0.1})
    """
    if terms.keys() != weights.keys():
        raise ValueError(
            f"terms and weights must have the same names, got {sorted(terms)} and {sorted(weights)}"
        )
    total: Tensor | None = None
    computed: dict[str, Tensor] = {}
    for name, term in terms.items():
        weight = weights[name]
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be finite, got {weight}")
        if weight == 0:
            continue
        loss = term if isinstance(term, Tensor) else term()
        _check_term(name, loss)
        computed[name] = loss.detach()
        total = loss * weight if total is None else total + loss * weight
    if total is None:
        raise ValueError("there is no term whose weight is not 0")
    return CombinedLoss(total, computed)


def _check_term(name: str, loss: Tensor) -> None:
    if loss.dim() != 0:
        raise ValueError(f"the term {name!r} must be a 0-d loss, got shape {tuple(loss.shape)}")


class UncertaintyWeights(torch.nn.Module):
    """Learned weights: sum of e^{-s_i} L_i + s_i / 2, s_i = log sigma_i^2 (Kendall et al. 2018).

    e^{-s} / 2 L + s / 2 for a regression, e^{-s} L + s / 2 for a classification, which is the form
    here.

    Args:
        names: Of the terms. The parameter ``log_variances`` holds s in their order, 0 at first.

    Raises:
        ValueError: There is no name, or one twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected different names of terms, got {list(names)}")
        self.names = tuple(names)
        self.log_variances = torch.nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, terms: Mapping[str, Tensor]) -> CombinedLoss:
        """The weighted sum of the terms.

        Args:
            terms: A 0-d loss for each name.

        Returns:
            A `CombinedLoss`: the total, 0-d, and each term detached.

        Raises:
            ValueError: The names differ, or a term is not 0-d.
        """
        if set(terms) != set(self.names):
            raise ValueError(f"expected the terms {sorted(self.names)}, got {sorted(terms)}")
        for name, loss in terms.items():
            _check_term(name, loss)
        losses = torch.stack([terms[name] for name in self.names])
        s = self.log_variances.to(losses.dtype)
        total = (torch.exp(-s) * losses + s / 2).sum()
        return CombinedLoss(total, {name: terms[name].detach() for name in self.names})


def linear_schedule(step: int, begin: int, end: int, first: float, last: float) -> float:
    """A weight that moves from ``first`` to ``last`` between two steps, and stays.

    Args:
        step: Now.
        begin: Up to this step it is ``first``.
        end: From this step on it is ``last``; in between it changes linearly.
        first: A weight.
        last: A weight.

    Returns:
        first + (last - first) (step - begin) / (end - begin), kept between both.

    Raises:
        ValueError: ``end`` lies before ``begin``.
    """
    if end < begin:
        raise ValueError(f"expected begin <= end, got {begin} and {end}")
    if step <= begin:
        return first
    if step >= end:
        return last
    return first + (last - first) * (step - begin) / (end - begin)
