"""Partial states of rows and their merge: `csrc/core/row_stats.h`, for the ranks of a group.

What some columns know of a row is their largest logit and sums relative to it. Such states merge,
over ranks as over threads and blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Parts", "merge", "part_of"]


class Parts(NamedTuple):
    """Partial states of rows: (N) of one rank, (ranks, N) of all, (N) merged.

    With x the logits of the rank's columns and a_i = w_i / V its share of the weighted mean.
    """

    max: Tensor
    """m, the largest logit; -inf where there is none above it."""
    sum_exp: Tensor
    """sum e^(x - m)."""
    target: Tensor
    """x_y - m on the rank that holds the target, else 0."""
    owners: Tensor
    """1 on the rank that holds the target, else 0."""
    sum_x_exp: Tensor | None
    """sum (x - m) e^(x - m), for the entropy."""
    sum_weights: Tensor | None
    """sum a, for the weighted mean of log-probabilities."""
    sum_weighted: Tensor | None
    """sum a (x - m)."""

    def pack(self) -> Tensor:
        """(fields, N)."""
        return torch.stack([field for field in self if field is not None])

    def unpack(self, packed: Tensor) -> Parts:
        """From (ranks, fields, N), with the fields that this one has."""
        fields = iter(packed.unbind(1))
        return Parts(*(None if field is None else next(fields) for field in self))  # type: ignore[arg-type]


def part_of(
    log_prob: Tensor,
    entropy: Tensor | None,
    mean_log_prob: Tensor | None,
    state: Tensor,
    owned: Tensor,
    share: float,
) -> Parts:
    """The partial state behind a rank's statistics.

    Args:
        log_prob: (N), of the target among the rank's columns where ``owned``.
        entropy: (N), if asked for.
        mean_log_prob: (N), if asked for: the mean over the rank's columns.
        state: (3, N), the kernel's: reference, sum_exp, sum_weights.
        owned: (N) bool.
        share: The rank's share of all classes.
    """
    reference, sum_exp, sum_weights = state.double()
    log_sum = sum_exp.log()
    is_empty = sum_exp == 0  # no logit above -inf; the kernel's reference is 0 then

    def unless_empty(value: Tensor, otherwise: float) -> Tensor:
        return torch.where(is_empty, otherwise, value)

    sum_x_exp = shares = weighted = None
    if entropy is not None:
        sum_x_exp = unless_empty(sum_exp * (log_sum - entropy), 0.0)
    if mean_log_prob is not None:
        shares = sum_weights * share
        weighted = unless_empty((mean_log_prob + sum_weights * log_sum) * share, -math.inf)
        weighted = torch.where(shares == 0, 0.0, weighted)
    return Parts(
        max=unless_empty(reference, -math.inf),
        sum_exp=sum_exp,
        target=torch.where(owned, unless_empty(log_prob + log_sum, -math.inf), 0.0),
        owners=owned.double(),
        sum_x_exp=sum_x_exp,
        sum_weights=shares,
        sum_weighted=weighted,
    )


def merge(parts: Parts) -> Parts:
    """Of all ranks, (ranks, N), to one, (N), whose ``max`` is the point all sums are relative to.

    In float64: a row's bits then do not depend on how torch orders a sum of so few.
    """
    parts = Parts(*(None if field is None else field.double() for field in parts))  # type: ignore[arg-type]
    largest = parts.max.amax(0)
    reference = torch.where(largest == -math.inf, 0.0, largest)
    shift = parts.max - reference
    factor = shift.exp()
    sum_x_exp = sum_weights = sum_weighted = None
    if parts.sum_x_exp is not None:
        moved = factor * (parts.sum_x_exp + shift * parts.sum_exp)
        # A part that underflows is gone; 0 * inf must not make it nan.
        sum_x_exp = torch.where(factor == 0, 0.0, moved).sum(0)
    if parts.sum_weights is not None and parts.sum_weighted is not None:
        moved = parts.sum_weighted + parts.sum_weights * shift
        sum_weights = parts.sum_weights.sum(0)
        sum_weighted = torch.where(parts.sum_weights == 0, 0.0, moved).sum(0)
    return Parts(
        max=reference,
        sum_exp=(parts.sum_exp * factor).sum(0),
        target=torch.where(parts.owners != 0, parts.target + shift, 0.0).sum(0),
        owners=parts.owners.sum(0),
        sum_x_exp=sum_x_exp,
        sum_weights=sum_weights,
        sum_weighted=sum_weighted,
    )
