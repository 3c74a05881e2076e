"""Sums of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..composite import real_of

__all__ = ["CombinedLoss", "UncertaintyWeights", "combined_loss", "linear_schedule"]

Term = Tensor | Callable[[], Tensor]


class CombinedLoss(NamedTuple):
    """A weighted sum, and what it is made of."""

    total: Tensor
    """With its gradient."""
    terms: dict[str, Tensor]
    """Each term before its weight, detached; those of weight 0 are left out."""


def combined_loss(terms: Mapping[str, Term], weights: Mapping[str, float | Tensor]) -> CombinedLoss:
    """The sum over names of weight times term. Does not wait for the device.

    Args:
        terms: Losses (0-d), or functions that compute them: a term of weight 0 is not computed, and
            whatever a tensor holds there (nan) counts for nothing.
        weights: A finite number for each term; or a tensor (0-d), which is not looked at: its term
            is computed whatever it holds.

    Returns:
        A `CombinedLoss`: the total, 0-d, in the terms' unit, and each term detached. The total of
        16-bit terms is float32.

    Raises:
        ValueError: The names differ, a weight is not finite, there is no term of a weight other
            than 0, or a term is not 0-d.
        TypeError: A term is no tensor, nor a function that returns one.

    Example:
        >>> combined_loss({"lm": lm, "mlm": lambda: mlm_loss(h, labels, w)}, {"lm": 1, "mlm": 0.1})
    """
    computed = computed_terms(terms, weights)
    total: Tensor | None = None
    for name, loss in computed.items():
        part = loss * weights[name]
        total = part if total is None else total + part
    assert total is not None  # there is a term
    return CombinedLoss(total, {name: loss.detach() for name, loss in computed.items()})


def computed_terms(
    terms: Mapping[str, Term], weights: Mapping[str, float | Tensor]
) -> dict[str, Tensor]:
    """The terms whose weight is not 0, in float32 at least; see `combined_loss`."""
    if terms.keys() != weights.keys():
        raise ValueError(
            f"terms and weights must have the same names, got {sorted(terms)} and {sorted(weights)}"
        )
    computed: dict[str, Tensor] = {}
    for name, term in terms.items():
        weight = weights[name]
        if isinstance(weight, Tensor):
            if weight.dim():
                raise ValueError(
                    f"the weight of {name!r} must be 0-d, got shape {tuple(weight.shape)}"
                )
        elif not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be finite, got {weight}")
        elif weight == 0:
            continue
        computed[name] = _checked_term(name, term if isinstance(term, Tensor) else term())
    if not computed:
        raise ValueError("there is no term whose weight is not 0")
    return computed


def _checked_term(name: str, loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the term {name!r} must be a tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"the term {name!r} must be a 0-d loss, got shape {tuple(loss.shape)}")
    return loss.to(real_of(loss))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of terms; a ValueError if there is none, or one twice."""
    if not names or isinstance(names, str) or len(set(names)) != len(names):
        raise ValueError(f"expected different names of terms, got {list(names)}")
    return tuple(names)


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
        self.names = check_names(names)
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
        losses = torch.stack([_checked_term(name, terms[name]) for name in self.names])
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
