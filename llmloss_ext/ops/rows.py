"""The kernels over rows of logits, for a walk over chunks: without derivatives, mostly in place.

`LocalRows` has the columns of all classes; `llmloss_ext.shard.ShardedRows`, which does the same for
the columns of one rank, has the same methods.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..options import LogitOptions, LossOptions, pack
from ..statistics import FloatStats, RowStats
from .library import kernels

Rows = slice | Tensor
"""The rows of a chunk: neighbours, or the indices of those that are not ignored."""


def count_of(rows: Rows) -> int:
    """The number of rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """The rows of a tensor; a view of neighbours, else a copy."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def put(tensor: Tensor, rows: Rows, values: Tensor) -> None:
    """Writes the rows of a tensor."""
    if isinstance(rows, slice):
        tensor[rows] = values
    else:
        tensor.index_copy_(0, rows, values)


class Labels(NamedTuple):
    """What belongs to each token besides its logits; None: 1 for all."""

    target: Tensor
    token_weight: Tensor | None = None
    target_weight: Tensor | None = None
    """The class weight of each target, where several ranks had to look for it."""

    def take(self, rows: Rows) -> Labels:
        """Those of some rows."""
        return Labels(*(None if x is None else take(x, rows) for x in self))  # type: ignore[arg-type]


class LocalRows:
    """Rows of logits whose columns are all here."""

    def __init__(
        self, weight: Tensor | None, logit_scale: Tensor | None, options: LogitOptions
    ) -> None:
        """weight: class weights. logit_scale: 0-d; None: the options' number."""
        self.weight, self.logit_scale, self.options = weight, logit_scale, options

    def labels(self, input: Tensor, target: Tensor, token_weight: Tensor | None) -> Labels:
        """What `losses` reads of each token; ``input`` has a row for each."""
        return Labels(target, token_weight)

    def denominator(self, labels: Labels, loss: LossOptions, real: torch.dtype) -> Tensor:
        """What the mean divides by: `llmloss_ext.composite.denominator`."""
        return composite.counted(
            labels.target, self.weight, labels.token_weight, self.options, loss, real
        )

    def statistics(self, logits: Tensor, target: Tensor, wanted: int) -> RowStats:
        """The statistics of the rows; ``wanted``: see `llmloss_ext.statistics.asked`."""
        packed = pack(self.options)
        return RowStats.of(
            kernels.token_stats(logits, target, self.weight, self.logit_scale, *packed, wanted)
        )

    def gradient(
        self,
        grads: FloatStats,
        logits: Tensor,
        target: Tensor,
        stats: list[Tensor],
        state: Tensor,
        with_scale: bool,
        *,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the logits (``inplace``: over them) and, if asked for, of logit_scale.

        ``grads`` are those of the statistics; ``stats`` and ``state`` come from `statistics`.
        """
        where = (logits, target, self.weight, self.logit_scale, *pack(self.options))
        arguments = (grads, *where, stats, state, with_scale)
        if inplace:
            return logits, kernels.token_stats_backward_(*arguments)
        gradient, scale = kernels.token_stats_backward(*arguments)
        return gradient, scale

    def losses(self, logits: Tensor, labels: Labels, divisor: Tensor, loss: LossOptions) -> Tensor:
        """The sum of the losses, divided by ``divisor``: `llmloss_ext.composite.denominator`.

        The reduction is "mean".
        """
        value: Tensor
        value, *_ = kernels.cross_entropy(*self._loss_arguments(logits, labels, divisor, loss))
        return value

    def losses_and_gradient_(
        self, logits: Tensor, labels: Labels, divisor: Tensor, loss: LossOptions, with_scale: bool
    ) -> tuple[Tensor, Tensor]:
        """`losses`, with the gradient over the logits; and that of logit_scale, if asked for."""
        arguments = self._loss_arguments(logits, labels, divisor, loss)
        value, grad_scale = kernels.cross_entropy_fused_(*arguments, with_scale)
        return value, grad_scale

    def _loss_arguments(
        self, logits: Tensor, labels: Labels, divisor: Tensor, loss: LossOptions
    ) -> tuple[object, ...]:
        tensors = (logits, labels.target, self.weight, labels.token_weight, divisor)
        return (*tensors, self.logit_scale, *pack(self.options, loss))

    def sum_over_ranks(self, grad_hidden: Tensor | None, grad_scale: Tensor | None) -> None:
        """Nothing: this rank knows all of it."""
