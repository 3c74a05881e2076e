"""Compares the time and memory of the losses on one micro-batch, with the same weights."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .config import LOSSES
from .losses import create_loss
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
    """

    kind: str
    loss: float
    seconds: float
    peak_bytes: int | None


def compare(run: Run) -> list[Measurement]:
    """Runs the first micro-batch forward and backward with each loss; updates nothing."""
    size = min(run.config.batch_size, len(run.training))
    inputs, targets = run.batch(run.training, list(range(size)))
    items = max(int((targets != IGNORED).sum()), 1)
    measured = []
    for kind in LOSSES:
        loss = create_loss(kind, run.device, run.loss.objective)
        seconds = []
        peak: int | None = None
        for _ in range(1 + ROUNDS):
            run.optimiser.zero_grad(set_to_none=True)
            meter = PeakMeter(run.device)
            with run.autocast():
                hidden = run.model.hidden(inputs)
                value, _ = loss.train(hidden, run.model.head.weight, targets, items, False)
            value.backward()  # type: ignore[no-untyped-call]
            seconds.append(loss.clock.take())
            peak = meter.peak()
        run.optimiser.zero_grad(set_to_none=True)
        # The first round warms up.
        measured.append(
            Measurement(kind, float(value.detach()), statistics.median(seconds[1:]), peak)
        )
    return measured


def summarise(run: Run) -> dict[str, Any]:
    """The figures of the run: losses before and after, speed, memory, and the comparison."""
    totals = run.totals
    summary: dict[str, Any] = {"run": run.config.describe(), "steps": run.step}
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
