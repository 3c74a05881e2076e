"""What the losses of tokens have in common: their terms, and where the statistics come from."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from llmloss_ext import functional
from llmloss_ext.composite import LossOptions, losses_of
from llmloss_ext.functional import TokenStats
from llmloss_ext.linear import linear_token_stats
from llmloss_ext.losses.shapes import classes_last

__all__ = ["Objective", "check_projection", "statistics"]


class Objective(NamedTuple):
    """What the loss of a token is made of, besides -log p."""

    label_smoothing: float = 0.0
    """In [0, 1]."""
    z_loss: float = 0.0
    """Factor of lse^2, >= 0."""
    confidence_penalty: float = 0.0
    """Factor of -entropy, >= 0 (Pereyra et al. 2017)."""

    def check(self) -> None:
        """Raises a ValueError if an option is out of range."""
        smoothing, z_loss, penalty = self
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {smoothing}")
        if not 0.0 <= z_loss < math.inf or not 0.0 <= penalty < math.inf:
            raise ValueError(
                "z_loss and confidence_penalty must be finite numbers >= 0, got "
                f"{z_loss} and {penalty}"
            )

    def rows(self, stats: TokenStats, target: Tensor, ignore_index: int) -> Tensor:
        """The loss of each token in nats, shaped like the target; 0 where it is ignored."""
        options = LossOptions(self.label_smoothing, self.z_loss, 0)
        rows = losses_of(stats[:4], target, None, None, ignore_index, options)
        return rows - self.confidence_penalty * stats.entropy if self.confidence_penalty else rows


def check_projection(linear_weight: Tensor | None, **others: object) -> None:
    """Raises a ValueError if an option of the projection is given, but no projection."""
    given = [name for name, value in others.items() if value is not None]
    if linear_weight is None and given:
        raise ValueError(f"{given[0]} belongs to hidden states, which need linear_weight")


def statistics(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    *,
    ignore_index: int,
    vocab_size: int | None = None,
    with_rank: bool = False,
) -> TokenStats:
    """The statistics of logits (..., V), or with ``linear_weight`` of hidden states (..., D)."""
    check_projection(linear_weight, linear_bias=linear_bias)
    if linear_weight is None:
        rows = classes_last(input, target)
        return functional.token_stats(
            rows, target, ignore_index=ignore_index, vocab_size=vocab_size, with_rank=with_rank
        )
    return linear_token_stats(
        input, linear_weight, target, linear_bias=linear_bias, ignore_index=ignore_index,
        vocab_size=vocab_size, with_rank=with_rank,
    )  # fmt: skip
