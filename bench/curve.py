"""The loss curve of `make demo`: what is kept of a run, and its plot."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from llmloss_train.files import replace_file, writing

DATA, PLOT = "curve.json", "curve.svg"


def keep(records: Sequence[dict[str, Any]], title: str, folder: Path) -> None:
    """Stores the losses of a run and their plot.

    Args:
        records: Those of the run's metrics.jsonl.
        title: Of the plot.
        folder: Where both files go.
    """
    points = [[r["kind"], r["step"], r["loss"]] for r in records if "loss" in r]
    text = json.dumps({"title": title, "points": points}) + "\n"
    for name, content in ((DATA, text), (PLOT, draw(text))):
        with writing(folder / name):
            replace_file(folder / name, partial(_write, content))


def draw(text: str) -> str:
    """The plot of what `keep` has stored, as SVG; it names the digest of its data."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kept = json.loads(text)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmloss_ext"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for kind, style in (("train", {"linewidth": 1.2}), ("validation", {"marker": "o"})):
            points = [(step, loss) for k, step, loss in kept["points"] if k == kind]
            if points:
                axes.plot(*zip(*points, strict=True), label=kind, **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.set_title(kept["title"], fontsize=9, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    return svg.rstrip() + f"\n<!-- {digest(text)} -->\n"


def digest(text: str) -> str:
    """Of the data, by which a test knows that a plot is theirs."""
    return hashlib.sha256(text.encode()).hexdigest()


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())
