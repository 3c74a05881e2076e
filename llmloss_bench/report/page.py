"""The report: a self-contained page, a Markdown file and the plots."""

from __future__ import annotations

import hashlib
import statistics
from functools import partial
from pathlib import Path
from typing import BinaryIO

import jinja2

from llmloss_train.files import replace_file, writing

from ..cases import OPERATIONS
from ..results import FILE, Results
from .plots import plots
from .tables import missing, percent, tables

HTML, MARKDOWN = "report.html", "report.md"


def write_report(path: Path, folder: Path) -> list[Path]:
    """Writes ``report.html``, ``report.md`` and a file for each plot, replacing earlier ones.

    Args:
        path: A run's results, or their folder.
        folder: The folder for the report.

    Raises:
        UserError: The results cannot be read, or a file cannot be written.
    """
    results = Results.load(path)
    path = path / FILE if path.is_dir() else path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    drawn = plots(results)
    files = {HTML: _html(results, drawn, digest), MARKDOWN: _markdown(results, list(drawn))}
    files |= {f"{name}.svg": svg for name, svg in drawn.items()}
    written = []
    for name, text in files.items():
        target = folder / name
        with writing(target):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(target, partial(_write, text))
        written.append(target)
    return written


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _html(results: Results, drawn: dict[str, str], digest: str) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        machine=results.machine,
        title=results.machine.get("gpu") or results.machine["cpu"],
        settings=results.settings,
        complete=results.complete,
        cards=cards(results),
        plots=drawn,
        tables=tables(results),
        missing=missing(results),
        digest=digest,
    )


def _markdown(results: Results, drawn: list[str]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    parts = ["# llmloss_ext benchmark", facts]
    if not results.complete:
        parts.append("**This run was interrupted: cases are missing.**")
    parts += [f"![{name}]({name}.svg)" for name in drawn]
    for table in tables(results):
        parts += [f"## {table.title}", table.markdown()]
    lines = missing(results)
    if lines:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _step_cards(results: Results) -> list[dict[str, str]]:
    """Of each kind of step: time and memory of eager torch over ours, in its last case."""
    made = []
    for row in {r.case.operation: r for r in results.of_figure("steps")}.values():
        what = f"than torch: a {OPERATIONS[row.case.operation]} ({row.case.dtype})"
        ratio = row.times_faster("torch")
        if ratio:
            made.append({"figure": f"{ratio:.1f}x", "text": f"faster {what}"})
        peaks = [m and m.peak_bytes for m in map(row.contenders.get, ("torch", "llmloss"))]
        if peaks[0] and peaks[1]:
            made.append({"figure": f"{peaks[0] / peaks[1]:.1f}x", "text": f"less memory {what}"})
    return made


def cards(results: Results) -> list[dict[str, str]]:
    """The headline figures: medians over the cases that are compared with others."""
    made = _step_cards(results)
    rows = [r for r in results.of_figure("peers") if r.case.has_backward]
    for linear, what in ((False, "from logits"), (True, "from hidden states")):
        group = [r for r in rows if r.case.is_linear == linear]
        for name in ("torch", "compile", "liger", "quack", "cce"):
            ratios = [
                max(found)
                for row in group
                if (found := [f for who in ("llmloss", "llmloss inplace")
                              if (f := row.times_faster(name, who))])
            ]  # fmt: skip
            if ratios:
                text = f"faster than {name} {what}, forward and backward (median)"
                made.append({"figure": f"{statistics.median(ratios):.1f}x", "text": text})
        shares = [
            max(found)
            for row in group
            if (found := [s for who in ("llmloss", "llmloss inplace")
                          if (s := row.share_of_ceiling(who))])
        ]  # fmt: skip
        if shares:
            limit = "matrix products' rate" if linear else "copy bandwidth"
            text = f"of the {limit}, {what} (median)"
            made.append({"figure": percent(statistics.median(shares)), "text": text})
    return made
