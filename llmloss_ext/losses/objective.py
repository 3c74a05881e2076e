"""What the losses of tokens have in common: their terms, and where the statistics come from."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .. import functional
from ..composite import losses_of, target_weights
from ..linear import linear_token_stats
from ..options import LOSS_OPTIONS, LossOptions
from ..statistics import FloatStats, TokenStats

__all__ = ["Objective", "check_projection", "statistics"]


class Objective(NamedTuple):
    """What the loss of a token is made of."""

    loss: LossOptions
    confidence_penalty: float = 0.0
    """Factor of -entropy, >= 0 (Pereyra et al. 2017)."""

    @classmethod
    def of(cls, *, confidence_penalty: float = 0.0, **options: float) -> Objective:
        """From the options of the loss: label_smoothing, z_loss ...

        Raises:
            ValueError: An option is out of range.
            TypeError: There is no such option.
        """
        if not 0.0 <= confidence_penalty < math.inf:
            raise ValueError(
                f"confidence_penalty must be a finite number >= 0, got {confidence_penalty}"
            )
        unknown = options.keys() - set(LOSS_OPTIONS)
        if unknown:
            raise TypeError(f"there is no option {', '.join(sorted(unknown))} of the loss")
        return cls(LossOptions.of(**options), confidence_penalty)  # type: ignore[arg-type]

    @property
    def options(self) -> dict[str, float]:
        """The options of the loss by name, for `llmloss_ext.cross_entropy`."""
        return {name: getattr(self.loss, name) for name in LOSS_OPTIONS}

    def rows(self, stats: TokenStats, target: Tensor, ignore_index: int) -> Tensor:
        """The loss of each token in nats, shaped like the target; 0 where it is ignored."""
        floats = FloatStats(**{name: getattr(stats, name) for name in FloatStats._fields})
        w_y = target_weights(target, None, ignore_index, stats.lse.dtype)
        rows = losses_of(floats, w_y, None, self.loss)
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
        return functional.token_stats(
            input, target, ignore_index=ignore_index, vocab_size=vocab_size, with_rank=with_rank
        )
    return linear_token_stats(
        input, linear_weight, target, linear_bias=linear_bias, ignore_index=ignore_index,
        vocab_size=vocab_size, with_rank=with_rank,
    )  # fmt: skip
