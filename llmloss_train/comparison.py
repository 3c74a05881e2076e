"""The kinds of loss side by side: the same micro-batch and weights, time and memory of each."""

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
    """One kind of loss.

    Attributes:
        kind: One of `LOSSES`.
        loss: The mean over the micro-batch, in nats.
        seconds: In projection and loss, forward and backward: the median.
        peak_bytes: Of forward and backward of the whole model, beyond model and optimiser.
    """

    kind: str
    loss: float
    seconds: float
    peak_bytes: int | None


def compare(run: Run) -> list[Measurement]:
    """Runs forward and backward of the first micro-batch with every kind, and changes nothing."""
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
    """The run in figures: losses before and after, speed, memory, and the kinds side by side."""
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
