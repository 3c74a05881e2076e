"""Helpers for training loops."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .shard import process_group

__all__ = ["LossMonitor", "accumulate_gradients", "count_items"]


def count_items(
    targets: Iterable[Tensor],
    ignore_index: int = -100,
    *,
    shift: int = 0,
    weights: Iterable[Tensor] | None = None,
    group: Any = None,
) -> Tensor:
    """Counts the tokens of a step that have a loss: the divisor for every micro-batch's sum.

    Passed as ``num_items``, it makes the accumulated gradient of k micro-batches equal to that of
    one large batch, even if their numbers of tokens differ. The mean of the micro-batches' means
    does not have this property.

    Args:
        targets: The targets of each micro-batch of the step; of padded or packed sequences, what
            `llmloss_ext.losses.next_token_targets` makes of them, without a ``shift``.
        ignore_index: Targets with this value are not counted.
        shift: As in `llmloss_ext.linear_cross_entropy`: the first ``shift`` targets (..., S) of
            each sequence are not predicted, and not counted.
        weights: The token weights of each micro-batch, shaped like its targets. If given, the sum
            of the counted tokens' weights is returned instead of their number.
        group: A process group of torch.distributed, or a `DeviceMesh` of one dimension, whose
            ranks' counts are added. Where data parallelism averages the gradients over these ranks,
            divide the result by the number of ranks.

    Returns:
        0-d int64, or float64 with ``weights``, on the targets' device. The host does not wait for
        the device.

    Raises:
        ValueError: There is no micro-batch, the weights do not match the targets in number or
            shape, or ``shift`` is negative.
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
        torch.distributed.all_reduce(total, group=process_group(group))
    return total


def _weight_of(target: Tensor, weight: Tensor, ignore_index: int, shift: int) -> Tensor:
    """Sums the weights of targets whose first ``shift`` columns have been cut off."""
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
    """Runs forward and backward of all micro-batches of a step, but not the optimiser.

    Args:
        loss: ``loss(batch, num_items)`` returns the sum of the micro-batch's token losses divided
            by ``num_items``, e.g. `llmloss_ext.cross_entropy` with the argument of that name.
        batches: For each micro-batch, the first argument of ``loss`` and the targets.
        ignore_index: Targets with this value are not counted.
        shift: As in `count_items`.
        group: The process group, or `DeviceMesh` of one dimension, over which data parallelism
            averages the gradients, as DistributedDataParallel does (it needs the same number of
            micro-batches on each rank). The gradients are then those of one batch with the tokens
            of all ranks.

    Returns:
        The mean loss over the tokens of the step on all ranks, 0-d and detached; 0 if there are no
        tokens.

    Raises:
        ValueError: There is no micro-batch.
    """
    step = list(batches)
    targets = (target for _, target in step)
    items = count_items(targets, ignore_index, shift=shift, group=group).clamp_min(1)
    ranks, group = 1, process_group(group)
    if group is not None:
        ranks = torch.distributed.get_world_size(group)
        items = items / ranks  # the average over ranks divides by their number again
    total: Tensor | None = None
    for batch, _ in step:
        part = loss(batch, items)
        part.backward()  # type: ignore[no-untyped-call]
        total = part.detach() if total is None else total + part.detach()
    assert total is not None  # count_items requires a micro-batch
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
        total = total / ranks
    return total


class LossMonitor:
    """Detects spikes of the training loss.

    A spike is a loss that is not finite, or that exceeds mean + spike_threshold * std of the recent
    losses (std is the population standard deviation). If the recent losses are equal up to
    rounding, the limit is mean + `least_jump` * |mean|, or `least_jump` if the mean is 0. Spikes
    are not added to the history. The training loop decides how to react: it can skip the step, or
    lower the learning rate.

    Args:
        spike_threshold: In standard deviations, above 0.
        history_size: The number of recent losses to keep, at least 10.

    Raises:
        ValueError: An argument is out of range.
    """

    warm_up = 10
    """The number of losses to record before any finite loss is called a spike."""
    least_jump = 1e-3
    """The smallest jump that is a spike after equal losses, relative to their mean."""
    rounding = 1e-9
    """Losses are equal if their std is at most this, relative to their mean."""

    def __init__(self, spike_threshold: float = 2.0, history_size: int = 100) -> None:
        if not 0.0 < spike_threshold < math.inf:
            raise ValueError(f"spike_threshold must be a number > 0, got {spike_threshold}")
        if history_size < self.warm_up:
            raise ValueError(f"history_size must be at least {self.warm_up}, got {history_size}")
        self.spike_threshold = spike_threshold
        self.history: deque[float] = deque(maxlen=history_size)

    def check_spike(self, loss: float | Tensor) -> bool:
        """Tests whether a loss is a spike, and adds it to the history if it is not.

        Args:
            loss: In any unit that stays the same. Reading a tensor waits for its device.

        Returns:
            Whether it is a spike. Never true for the first `warm_up` finite losses.
        """
        value = float(loss)
        if not math.isfinite(value):
            return True
        if len(self.history) >= self.warm_up and value > self.limit():
            return True
        self.history.append(value)
        return False

    def limit(self) -> float:
        """The largest loss that is not a spike; inf during warm-up."""
        count = len(self.history)
        if count < self.warm_up:
            return math.inf
        # Scaled by the largest value, so that neither squares nor sums overflow.
        unit = max(map(abs, self.history)) or 1.0
        values = [x / unit for x in self.history]
        mean = math.fsum(values) / count
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / count)
        is_flat = std <= self.rounding * abs(mean)
        jump = self.least_jump * (abs(mean) or 1.0) if is_flat else self.spike_threshold * std
        return (mean + jump) * unit

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: numbers and lists."""
        return {
            "spike_threshold": self.spike_threshold,
            "history_size": self.history.maxlen,
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state and the settings that `state_dict` returned."""
        self.spike_threshold = state["spike_threshold"]
        self.history = deque(state["history"], maxlen=state["history_size"])
