"""Helpers of training loops."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossMonitor", "accumulate_gradients", "count_items"]


def count_items(
    targets: Iterable[Tensor],
    ignore_index: int = -100,
    *,
    shift: int = 0,
    weights: Iterable[Tensor] | None = None,
    group: Any = None,
) -> Tensor:
    """The tokens that take part in a step: what every micro-batch's sum is to be divided by.

    With it as ``num_items``, the gradient of k micro-batches is that of the one large batch,
    however unequal they are; dividing each micro-batch's mean by k is not.

    Args:
        targets: Of each micro-batch of the step.
        ignore_index: Tokens that take no part.
        shift: As in `llmloss_ext.linear_cross_entropy`: the first ``shift`` targets (..., S) of
            each sequence are nobody's.
        weights: Token weights of each micro-batch, shaped like its targets, whose sum over the
            tokens that take part is returned instead of their number.
        group: A process group of torch.distributed, whose ranks' tokens are added. Gradients
            that data parallelism averages over its ranks then have to be multiplied by their
            number: divide the returned count by it.

    Returns:
        0-d int64, or float64 for weights, on the targets' device. Does not wait for it.

    Raises:
        ValueError: There is no micro-batch, not as many weights, or their shapes differ; or
            ``shift`` is negative.
    """
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    step = [target[..., shift:] if shift else target for target in targets]
    if not step:
        raise ValueError("a step needs at least one micro-batch")
    if weights is None:
        counts = [(target != ignore_index).sum() for target in step]
    else:
        counts = [
            _weight_of(target, weight, ignore_index, shift)
            for target, weight in zip(step, weights, strict=True)
        ]
    total = torch.stack(counts).sum()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def _weight_of(target: Tensor, weight: Tensor, ignore_index: int, shift: int) -> Tensor:
    """The sum of the weights of the targets, the first ``shift`` of which are gone."""
    whole = (*target.shape[:-1], target.shape[-1] + shift) if target.dim() else ()
    if weight.shape != whole:
        raise ValueError(
            f"weights must have the shape of the targets, {whole}, got {tuple(weight.shape)}"
        )
    if shift:
        weight = weight[..., shift:]
    return torch.where(target != ignore_index, weight.detach().double(), 0.0).sum()


def accumulate_gradients(
    loss: Callable[[Any, Tensor], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    ignore_index: int = -100,
    *,
    shift: int = 0,
    group: Any = None,
) -> Tensor:
    """Runs forward and backward of all micro-batches of a step; the optimiser's step is yours.

    Args:
        loss: ``loss(batch, num_items)`` returns the micro-batch's sum over tokens divided by
            ``num_items``, e.g. by `llmloss_ext.cross_entropy`'s argument of that name.
        batches: Of each micro-batch, what ``loss`` takes, and its targets.
        ignore_index: Targets that take no part.
        shift: As in `count_items`.
        group: The process group over which data parallelism averages the gradients (as
            DistributedDataParallel does, which needs as many micro-batches on each rank): they are
            then those of one batch with all ranks' tokens.

    Returns:
        The mean loss over all tokens of the step, of all ranks, 0-d and detached; 0 without any.

    Raises:
        ValueError: There is no micro-batch.
    """
    step = list(batches)
    targets = (target for _, target in step)
    items = count_items(targets, ignore_index, shift=shift, group=group).clamp_min(1)
    ranks = 1
    if group is not None:
        ranks = torch.distributed.get_world_size(group)
        items = items / ranks  # the average over ranks divides by their number again
    total: Tensor | None = None
    for batch, _ in step:
        part = loss(batch, items)
        part.backward()  # type: ignore[no-untyped-call]
        total = part.detach() if total is None else total + part.detach()
    assert total is not None  # count_items has seen a micro-batch
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
        total = total / ranks
    return total


class LossMonitor:
    """Notices when the loss jumps.

    A spike is a loss above mean + spike_threshold * std of the recent history (std: of the
    population, the sum divided by its size), or one that is not finite. Where the history is flat
    (its std is rounding), it is a loss above mean + `least_jump` * |mean|, or above `least_jump` if
    the mean is 0. Spikes do not enter the history. The training loop decides what to do: skip the
    step, or lower the rate.

    Args:
        spike_threshold: > 0, in standard deviations.
        history_size: Losses that are remembered, at least 10.

    Raises:
        ValueError: An argument is out of range.
    """

    warm_up = 10
    """Losses that are only remembered."""
    least_jump = 1e-3
    """Of the mean: what a real jump is where the history is flat."""
    rounding = 1e-9
    """Of the mean: a history whose std is not above that is flat."""

    def __init__(self, spike_threshold: float = 2.0, history_size: int = 100) -> None:
        if not 0.0 < spike_threshold < math.inf:
            raise ValueError(f"spike_threshold must be a number > 0, got {spike_threshold}")
        if history_size < self.warm_up:
            raise ValueError(f"history_size must be at least {self.warm_up}, got {history_size}")
        self.spike_threshold = spike_threshold
        self.history: deque[float] = deque(maxlen=history_size)

    def check_spike(self, loss: float | Tensor) -> bool:
        """Whether the loss is a spike; if not, it enters the history.

        Args:
            loss: In any unit, the same at each call. A tensor is waited for.

        Returns:
            False for the first `warm_up` finite losses.
        """
        value = float(loss)
        if not math.isfinite(value):
            return True
        if len(self.history) >= self.warm_up and value > self.limit():
            return True
        self.history.append(value)
        return False

    def limit(self) -> float:
        """Above this a loss is a spike; inf while the history is short."""
        count = len(self.history)
        if count < self.warm_up:
            return math.inf
        # In units of the largest, so that no square and no sum overflows.
        unit = max(map(abs, self.history)) or 1.0
        values = [x / unit for x in self.history]
        mean = math.fsum(values) / count
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / count)
        is_flat = std <= self.rounding * abs(mean)
        jump = self.least_jump * (abs(mean) or 1.0) if is_flat else self.spike_threshold * std
        return (mean + jump) * unit

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers and lists."""
        return {
            "spike_threshold": self.spike_threshold,
            "history_size": self.history.maxlen,
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned, with its settings."""
        self.spike_threshold = state["spike_threshold"]
        self.history = deque(state["history"], maxlen=state["history_size"])
