"""The figures of `make demo` that README quotes, stored with the facts of their machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench import curve
from llmloss_bench.machine import machine
from llmloss_bench.report.tables import Table, mebibytes, milliseconds
from llmloss_ext.cli import UserError
from llmloss_train.files import replace_file, writing
from llmloss_train.report import Reference

KEPT = Path(__file__).parent / "results" / "demo" / "summary.json"


def keep(folder: Path) -> Path:
    """Stores a run of ``llmloss train``: its summary with this machine's facts, and its curve.

    Args:
        folder: The run's.

    Raises:
        UserError: There is no summary or no metrics, or they cannot be read.
    """
    summary = _load(folder / "summary.json") | {"machine": machine()}
    records = Reference.of(folder).records
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with writing(KEPT):
        replace_file(KEPT, lambda file: file.write((json.dumps(summary, indent=1) + "\n").encode()))
    title = f"{summary['run']} ({summary['machine']['date']})"
    curve.keep(records, title, KEPT.parent)
    return KEPT


def render() -> str:
    """Renders a sentence on the run, and its table of losses."""
    summary = _load(KEPT)
    facts = summary["machine"]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    before, after = summary["validation_loss"]
    text = (
        f"`make demo` on {facts['threads']} cores of {facts['cpu']} ({facts['date']}): "
        f"{summary['steps']} steps in {minutes}:{seconds:02} minutes, validation loss from "
        f"{before:.2f} to {after:.2f} (perplexity {math.exp(before):,.0f} to "
        f"{math.exp(after):,.0f}), "
        f"{mebibytes(summary['peak_bytes'])} MiB at the peak.\nIts closing table, one micro-batch "
        f"of {summary['micro_batch_tokens']:,} tokens forward and backward with the same weights:"
    )
    rows = [
        [f"`{one['kind']}`", f"{one['loss']:.5f}", f"{milliseconds(one['seconds'])} ms",
         f"{mebibytes(one['peak_bytes'])} MiB"]
        for one in summary["losses"]
    ]  # fmt: skip
    columns = ["`--loss`", "loss", "time in head and loss", "peak memory of the step"]
    return f"{text}\n\n{Table('', columns, rows).markdown()}"


def _load(path: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not the summary of a training run ({error}); make demo writes one"
        ) from error
    return summary
