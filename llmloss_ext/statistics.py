"""The statistics of a token: what the kernels compute, and what users get.

`FloatStats` has the order of the enumeration in csrc/core/statistics.h; a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class FloatStats(NamedTuple):
    """The differentiable statistics, or one tensor for each of them (a gradient); None: none."""

    log_prob: Any = None
    lse: Any = None
    entropy: Any = None
    mean_log_prob: Any = None
    log_sum_sq_probs: Any = None

    @property
    def used(self) -> tuple[str, ...]:
        """The names of those that are there."""
        return tuple(name for name in self._fields if getattr(self, name) is not None)

    def only(self, wanted: int) -> FloatStats:
        """Those asked for."""
        return FloatStats(*(x if wanted >> i & 1 else None for i, x in enumerate(self)))

    def for_backward(self) -> list[Tensor]:
        """What the gradient kernel reads again; the others without elements."""
        needed = _READ_BY_THEIR_GRADIENT
        pairs = zip(self._fields, self, strict=True)
        return [x if name in needed else x.new_empty(0) for name, x in pairs]


_READ_BY_THEIR_GRADIENT = {"entropy", "log_sum_sq_probs"}
_INDICES = ("argmax", "rank")
STATISTICS = (*FloatStats._fields, *_INDICES)
_ALWAYS = ("log_prob", "lse", "entropy", "mean_log_prob")
"""What `TokenStats` has without being asked."""
_BESIDE_A_LOSS = ("log_prob", "lse", "entropy", *_INDICES)


def asked(names: Iterable[str]) -> int:
    """The operators' ``wanted``: a bit for each statistic."""
    wanted = 0
    for name in names:
        wanted |= 1 << STATISTICS.index(name)
    return wanted


def asked_by_user(with_rank: bool, extra: Iterable[str]) -> int:
    """What the public functions are asked for.

    Raises:
        ValueError: ``extra`` names something that is not a statistic.
    """
    if isinstance(extra, str) or not set(STATISTICS).issuperset(extra):
        known = ", ".join(name for name in STATISTICS if name not in _ALWAYS)
        raise ValueError(f"extra must hold names of statistics ({known}), got {extra!r}")
    return asked({*_ALWAYS, *extra, *(_INDICES if with_rank else ())})


def asked_beside_a_loss(return_stats: bool | Sequence[str]) -> int:
    """What a loss is asked for with its ``return_stats``; 0: nothing.

    Raises:
        ValueError: It names something that is not a statistic.
    """
    if isinstance(return_stats, bool):
        return asked(_BESIDE_A_LOSS) if return_stats else 0
    if isinstance(return_stats, str) or not set(STATISTICS).issuperset(return_stats):
        raise ValueError(
            f"return_stats must be a bool or names of statistics ({', '.join(STATISTICS)}), got "
            f"{return_stats!r}"
        )
    return asked(return_stats)


def is_asked(wanted: int, name: str) -> bool:
    """Whether a statistic is asked for."""
    return bool(wanted >> STATISTICS.index(name) & 1)


class RowStats(NamedTuple):
    """What an operator returns of rows; what was not asked for has no elements."""

    state: Tensor
    """(rows of the state, N): what the gradient kernel reads again."""
    floats: FloatStats
    argmax: Tensor
    rank: Tensor

    @classmethod
    def of(cls, results: Sequence[Tensor]) -> RowStats:
        """From the results of an operator, in the kernels' order."""
        state, *floats, argmax, rank = results
        return cls(state, FloatStats(*floats), argmax, rank)

    def results(self) -> tuple[Tensor, ...]:
        """In the kernels' order again."""
        return (self.state, *self.floats, self.argmax, self.rank)


class TokenStats(NamedTuple):
    """Statistics of the predicted distributions p = softmax(x), one number per token.

    All are shaped like the target. The floats are float32 (float64 for float64 logits).
    At ignored tokens they are 0, ``argmax`` is -1 and ``rank`` is the vocabulary size.
    """

    log_prob: Tensor
    """log p_target, in nats. Cross entropy is its negative."""
    lse: Tensor
    """log sum_j exp(x_j)."""
    entropy: Tensor
    """-sum_j p_j log p_j, in nats."""
    mean_log_prob: Tensor
    """(1 / V) sum_j w_j log p_j, where w is the class weight (1 without)."""
    argmax: Tensor | None
    """int64: the predicted token, the first of equals; -1 in a row that holds nan or +inf."""
    rank: Tensor | None
    """int64: classes that come before the target when sorted by logit, equal ones by class: logits
    greater than the target's, or equal at a lower class. ``rank == 0`` exactly where ``argmax`` is
    the target; ``rank < k`` is a top-k hit. The vocabulary size in a row that holds nan or +inf."""
    log_sum_sq_probs: Tensor | None = None
    """log sum_j p_j^2, minus the Renyi entropy of order 2, in nats: an ``extra``."""

    @property
    def mean_logit(self) -> Tensor:
        """(1 / V) sum_j x_j, differentiable: of statistics without class weights.

        x are the logits that the losses see, after logit_scale, softcap and temperature.
        """
        return self.mean_log_prob + self.lse

    @classmethod
    def beside(cls, rows: RowStats | None, wanted: int, shape: torch.Size) -> TokenStats:
        """`shaped`, without a gradient; of None, nothing."""
        if rows is None:
            return cls.shaped(RowStats.of([torch.empty(0)] * (1 + len(STATISTICS))), 0, shape)
        floats = FloatStats(*(x.detach() for x in rows.floats))
        return cls.shaped(rows._replace(floats=floats), wanted, shape)

    @classmethod
    def shaped(cls, rows: RowStats, wanted: int, shape: torch.Size) -> TokenStats:
        """The statistics of rows in the shape of the target; None where not asked for."""
        named = {**rows.floats._asdict(), "argmax": rows.argmax, "rank": rows.rank}
        asked = {name: x.reshape(shape) for name, x in named.items() if is_asked(wanted, name)}
        return cls(**dict.fromkeys(cls._fields) | asked)  # type: ignore[arg-type]
