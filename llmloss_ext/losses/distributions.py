"""Information measures of distributions that are given as probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_probabilities", "cross_entropy_between", "entropy", "kl_divergence"]


def entropy(p: Tensor, base: float = math.e, *, check: bool = False) -> Tensor:
    """H(p) = - sum_i p_i log p_i, with 0 log 0 = 0 (Shannon 1948).

    Args:
        p: Probabilities (..., V), floating point.
        base: Of the logarithm: e for nats, 2 for bits.
        check: Whether to check that p holds probabilities, which costs a pass and waits for the
            device.

    Returns:
        (...), in the dtype of p.

    Raises:
        ValueError: ``base`` is not a number > 0 other than 1, or with ``check``, a row is no
            distribution.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5]), base=2)
        tensor(1.)
    """
    _check(base, p=p if check else None)
    return -(p * _log(p, p)).sum(-1) / math.log(base)


def cross_entropy_between(
    p: Tensor, q: Tensor, base: float = math.e, *, check: bool = False
) -> Tensor:
    """H(p, q) = - sum_i p_i log q_i, with 0 log 0 = 0; inf where p_i > 0 and q_i = 0.

    Args:
        p: Probabilities (..., V) of what happens.
        q: Probabilities (..., V) of what is expected.
        base: Of the logarithm: e for nats, 2 for bits.
        check: As in `entropy`.

    Returns:
        (...).

    Raises:
        ValueError: As in `entropy`, or the shapes do not fit.
    """
    _check(base, **({"p": p, "q": q} if check else {}))
    _same_columns(p, q)
    return -(p * _log(q, p)).sum(-1) / math.log(base)


def kl_divergence(p: Tensor, q: Tensor, base: float = math.e, *, check: bool = False) -> Tensor:
    """KL(p || q) = sum_i p_i log(p_i / q_i) = H(p, q) - H(p) >= 0 (Kullback and Leibler 1951).

    Args:
        p: Probabilities (..., V).
        q: Probabilities (..., V).
        base: Of the logarithm: e for nats, 2 for bits.
        check: As in `entropy`.

    Returns:
        (...): 0 where p = q, inf where p_i > 0 and q_i = 0.

    Raises:
        ValueError: As in `entropy`, or the shapes do not fit.
    """
    _check(base, **({"p": p, "q": q} if check else {}))
    _same_columns(p, q)
    # Term by term: the difference of two large sums would lose the digits of a small divergence.
    return (p * (_log(p, p) - _log(q, p))).sum(-1) / math.log(base)


def _log(q: Tensor, p: Tensor) -> Tensor:
    """Log q, but 0 where p and q are 0: 0 log 0 = 0, with a finite gradient. nan stays nan."""
    return torch.log(torch.where((p == 0) & (q == 0), 1.0, q))


def _same_columns(p: Tensor, q: Tensor) -> None:
    if p.shape[-1:] != q.shape[-1:]:
        raise ValueError(
            f"p and q must have the same number of outcomes, got {tuple(p.shape)} and "
            f"{tuple(q.shape)}"
        )


def _check(base: float, **distributions: Tensor | None) -> None:
    if not (0.0 < base < math.inf and base != 1.0):
        raise ValueError(f"base must be a number > 0 other than 1, got {base}")
    for name, p in distributions.items():
        if p is not None:
            check_probabilities(p, name)


def check_probabilities(p: Tensor, name: str = "p") -> None:
    """Checks that each row is a distribution. Costs a pass, and waits for the device.

    No loss does so unasked: call it for probability targets that may be wrong.

    Args:
        p: (..., V).
        name: What messages call it.

    Raises:
        ValueError: A probability is negative or nan, or a row's sum differs from 1 by more than
            0.001 or the rounding of p's dtype.
    """
    if bool((p < 0).any()) or bool(p.isnan().any()):
        raise ValueError(f"{name} holds a negative probability, or nan")
    off = float((p.sum(-1, dtype=torch.float64) - 1).abs().max()) if p.numel() else 0.0
    if off > max(1e-3, torch.finfo(p.dtype).eps):
        raise ValueError(f"{name} must sum to 1 in each row; the worst row is off by {off:.3g}")
