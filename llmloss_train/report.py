"""The files that a run writes: metrics as JSON lines, a summary and a loss curve."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmloss_ext.cli import UserError
from llmloss_ext.metrics import perplexity

from .files import replace_file, writing

METRICS = "metrics.jsonl"
CURVE = "loss.png"
SUMMARY = "summary.json"


class Metrics:
    """The metrics file: JSON lines, each on disk as soon as it is added."""

    def __init__(self, folder: Path | None, resume_at: int | None) -> None:
        """Makes the folder and opens the file.

        Args:
            folder: The run's output folder; None in a process that writes nothing.
            resume_at: The step to resume at: records of later steps are dropped. None: starts
                an empty file.
        """
        self.records: list[dict[str, Any]] = []
        self._path, self._file = Path(), None
        if folder is None:
            return
        self._path = folder / METRICS
        if resume_at is not None and self._path.exists():
            self.records = [r for r in read_metrics(folder) if r["step"] <= resume_at]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with writing(self._path):
            replace_file(self._path, self._write_all)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record, which has at least ``step`` and ``kind``."""
        self.records.append(record)
        if self._file is not None:
            with writing(self._path):
                self._file.write(_line(record))
                self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with writing(self._path):
                self._file.close()

    def _write_all(self, file: BinaryIO) -> None:
        file.write("".join(map(_line, self.records)).encode())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads a run's records, up to a line that a crash has cut short or a disk has damaged."""
    records: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            break
        records.append(record)
    return records


@dataclass(frozen=True)
class Reference:
    """Another run, whose losses a run is compared with.

    Attributes:
        folder: Its output folder.
        records: Its metrics.
    """

    folder: Path
    records: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Reference:
        """Reads a run's metrics.

        Raises:
            UserError: There are none.
        """
        try:
            records = read_metrics(folder)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot read {folder / METRICS}: {reason}") from error
        return cls(folder, [r for r in records if isinstance(r.get("loss"), float)])

    def difference(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """How far losses are from those of the same steps here, for the summary."""
        losses = {(r.get("kind"), r["step"]): r["loss"] for r in self.records}
        pairs = [(r["loss"], losses.get((r["kind"], r["step"]))) for r in records]
        distances = [abs(one - other) for one, other in pairs if other is not None]
        return {
            "compared_to": str(self.folder),
            "compared_losses": len(distances),
            # Where a loss is no number, the runs are not alike.
            "largest_difference": max((math.inf if d != d else d for d in distances), default=None),
        }


def _mark_spikes(axes: Any, records: list[dict[str, Any]]) -> None:
    """Marks spikes by crosses, and by vertical lines where the loss is not finite."""
    spikes = [(r["step"], r["loss"]) for r in records if r.get("spike") or r.get("skipped")]
    finite = [(step, loss) for step, loss in spikes if math.isfinite(loss)]
    if finite:
        axes.plot(*zip(*finite, strict=True), "rx", label="spike")
    others = [step for step, loss in spikes if not math.isfinite(loss)]
    for i, step in enumerate(others):
        label = None if i else "loss not finite"
        axes.axvline(step, color="red", linestyle=":", linewidth=1, label=label)


def _draw(
    axes: Any,
    records: list[dict[str, Any]],
    train: dict[str, Any],
    validation: dict[str, Any],
    of_what: str,
) -> None:
    for kind, style in (("train", train), ("validation", validation)):
        points = [(r["step"], r["loss"]) for r in records if r.get("kind") == kind]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind + of_what, **style)


def save_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes the figures of the closing table as JSON."""
    path = folder / SUMMARY
    with writing(path):
        replace_file(path, lambda file: file.write((json.dumps(summary, indent=1) + "\n").encode()))
    return path


def save_curve(
    folder: Path, records: list[dict[str, Any]], title: str, reference: Reference | None
) -> Path:
    """Draws training and validation loss over the steps, over those of the reference."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path = folder / CURVE
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if reference is not None:
        beside = {"color": "0.6", "linewidth": 4}
        _draw(axes, reference.records, beside, beside, f" of {reference.folder}")
    _draw(axes, records, {"linewidth": 1.2}, {"marker": "o"}, "")
    _mark_spikes(axes, records)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize=9)
    second = axes.secondary_yaxis("right", functions=(lambda y: y, lambda y: y))
    second.yaxis.set_major_formatter(lambda loss, _: f"{perplexity(loss):,.0f}")
    second.set_ylabel("perplexity")
    with writing(path):
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
    return path
