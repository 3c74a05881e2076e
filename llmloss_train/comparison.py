"""Compares the time and memory of the losses on one micro-batch, with the same weights."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmloss_ext.training import count_items

from .config import LOSSES
from .losses import TokenLoss, create_loss
from .memory import PeakMeter, peak_memory
from .windows import IGNORED

if TYPE_CHECKING:
    from .loop import Run

ROUNDS = 3


@dataclass
class Measurement:
    """The measurement of one loss.

    Attributes:
        kind: One of `LOSSES`.
        loss: The mean over the micro-batch, in nats.
        seconds: The median time in projection and loss, forward and backward.
        peak_bytes: The peak memory of the whole model's forward and backward, beyond the model and
            the optimiser; None if the system does not report it.

    Of several processes, time and memory are the first one's.
    """

    kind: str
    loss: float
    seconds: float
    peak_bytes: int | None


def compare(run: Run) -> list[Measurement]:
    """Runs the first micro-batch forward and backward with each loss; updates nothing.

    Every process calls it.
    """
    size = min(run.config.batch_size, len(run.training))
    inputs, targets = run.batch(run.training, list(range(size)))
    num_items = run.layout.divisor(count_items([targets], IGNORED, group=run.layout.group))
    measured = []
    for kind in LOSSES:
        loss = create_loss(kind, run.device, run.loss.objective)
        use = partial(_loss_of, loss, targets, num_items)
        seconds = []
        peak: int | None = None
        for _ in range(1 + ROUNDS):
            run.optimiser.zero_grad(set_to_none=True)
            meter = PeakMeter(run.device)
            with run.autocast():
                value = run.layout.forward(inputs, use)
            value.backward()
            seconds.append(loss.clock.take())
            peak = meter.peak()
        run.optimiser.zero_grad(set_to_none=True)
        (mean,) = run.world.mean([float(value.detach())])
        # The first round warms up.
        measured.append(Measurement(kind, mean, statistics.median(seconds[1:]), peak))
    return measured


def _loss_of(
    loss: TokenLoss, targets: Tensor, num_items: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    return loss.train(hidden, weight, targets, num_items, False)[0]


def summarise(run: Run) -> dict[str, Any]:
    """The figures of the run: losses before and after, speed, memory, and the comparison.

    Every process calls it; the records are the first one's.
    """
    totals = run.totals
    summary: dict[str, Any] = {"run": run.describe(), "steps": run.step}
    for kind in ("train", "validation"):
        losses = [r["loss"] for r in run.metrics.records if r["kind"] == kind]
        if losses:
            summary[f"{kind}_loss"] = [losses[0], losses[-1]]
    return summary | {
        "seconds": totals.seconds,
        "loss_seconds": totals.loss_seconds,
        "tokens_per_second": totals.tokens / totals.seconds,
        "peak_bytes": peak_memory(run.device),
        "micro_batch_tokens": run.config.batch_size * run.config.seq_len,
        "losses": [asdict(one) for one in compare(run)],
    }
