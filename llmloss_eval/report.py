"""What an evaluation prints and writes: a table, JSON, and a reliability diagram."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llmloss_ext.cli import UserError
from llmloss_train.files import replace_file, writing

from .ranking import SCORES


def require_new(path: Path, option: str, *, overwrite: bool) -> None:
    """Checks where a file is to be written, before the work.

    Raises:
        UserError: It is there and may not be replaced, or is no file, or has no folder.
    """
    if path.exists() or path.is_symlink():
        if not path.is_file():
            raise UserError(f"{option} {path} is not a file")
        if not overwrite:
            raise UserError(
                f"{option} {path} exists: name another file, or replace it with --overwrite"
            )
    elif not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")


def save_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the result; numbers that are not finite become null, as JSON has no others."""
    content = json.dumps(_finite(result), indent=1, allow_nan=False).encode() + b"\n"
    with writing(path):
        replace_file(path, lambda file: file.write(content))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_plot(path: Path, result: dict[str, Any]) -> None:
    """Draws the accuracy over the confidence, and below it how many tokens have it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["reliability"]
    width = 1 / len(rows)
    held = [(i * width, row) for i, row in enumerate(rows) if row["tokens"]]
    left = [x for x, _ in held]
    figure, (above, below) = plt.subplots(
        2, figsize=(5, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    bars = {"width": width, "align": "edge", "edgecolor": "white"}
    above.bar(left, [row["accuracy"] for _, row in held], label="accuracy", **bars)
    above.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
    means = [row["confidence"] for _, row in held]
    above.plot(means, [row["accuracy"] for _, row in held], "o", color="C1", markersize=4,
               label="at the mean confidence")  # fmt: skip
    above.set_ylabel("accuracy")
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    above.legend(loc="upper left")
    error = result["expected_calibration_error"]
    above.set_title(
        f"{result['model']}: expected calibration error {error:.2%}", fontsize=9, wrap=True
    )
    below.bar(left, [row["tokens"] / result["tokens"] for _, row in held], color="0.6", **bars)
    below.set_xlabel("confidence: p of the likeliest token")
    below.set_ylabel("share of tokens")
    suffix = path.suffix[1:].lower()
    kind = suffix if suffix in ("svg", "pdf") else "png"
    with writing(path), mpl.rc_context({"svg.fonttype": "none"}):  # text stays text
        replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=120))
    plt.close(figure)


def print_table(result: dict[str, Any], seconds: float | None) -> None:
    """The metrics, one a row."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"llmloss eval: {escape(result['model'])} on {escape(result['input'])}"
    table = Table(title=title, show_header=False)
    rows = _of_text(result) if result["kind"] == "text" else _of_ranking(result)
    for name, value in rows:
        table.add_row(name, value)
    if seconds is not None:
        table.add_row("time", f"{seconds:.1f} s")
    Console().print(table)


def _of_text(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("tokens scored", f"{result['tokens']:,} of {result['bytes']:,} bytes"),
        ("loss", f"{result['loss']:.4f} nats a token"),
        ("perplexity", f"{result['perplexity']:,.2f}"),
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
        *((f"top-{k} accuracy", f"{x:.2%}") for k, x in result["top_k_accuracy"].items()),
        ("expected calibration error", f"{result['expected_calibration_error']:.2%}"),
    ]


def _of_ranking(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("questions", f"{result['questions']:,} with {result['choices']:,} choices")]
    names = dict(zip(SCORES, ("sum", "mean", f"sum / length^{result['alpha']:g}"), strict=True))
    for name, accuracy in result.get("accuracy", {}).items():
        rows.append((f"accuracy by {names[name]}", f"{accuracy:.2%} of {result['labelled']:,}"))
    return rows
