"""The plots of a report, as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..cases import Case
from ..contenders import NAMES
from ..results import Results, Row

_COLOURS = {
    "llmloss": "#1d4ed8", "llmloss inplace": "#60a5fa", "torch": "#9ca3af", "compile": "#f59e0b",
    "torch chunked": "#57534e", "llmloss logits": "#0ea5e9", "flash-attn": "#b91c1c",
    "apex": "#a16207", "liger": "#16a34a", "cce": "#db2777", "quack": "#7c3aed",
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
    # Text stays text, and the same results give the same file.
    "svg.fonttype": "none", "svg.hashsalt": "llmloss_ext", "font.family": "sans-serif",
}  # fmt: skip
_WIDTH = 5.4  # inches: still legible on a phone
Place = Literal["outside lower left", "upper left"]


def plots(results: Results) -> dict[str, str]:
    """The plots as SVG, by name. A plot without measurements is left out."""
    makers: dict[str, Callable[[Results], Figure | None]] = {
        "peers": _peers,
        "limit": _limit,
        "steps": _steps,
        "memory": _memory,
        "options": _options,
        "scaling-v": lambda r: _curve(r, "V", "vocabulary V", lambda row: row.case.columns),
        "scaling-n": lambda r: _curve(r, "N", "tokens N", lambda row: row.case.rows),
        "scaling-d": lambda r: _curve(r, "D", "features D", lambda row: row.case.features),
        "scaling-threads": lambda r: _curve(r, "threads", "threads", lambda row: row.case.threads),
    }
    made = {}
    with mpl.rc_context(_STYLE):
        for name, make in makers.items():
            figure = make(results)
            if figure is not None:
                made[name] = _svg(figure)
                plt.close(figure)
    return made


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # The prologue and the metadata contain links, so they are cut.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)


def _axes(height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(_WIDTH, height), layout="constrained")
    return figure, axes


def _peers(results: Results) -> Figure | None:
    rows = [r for r in results.of_figure("peers") if r.case.has_backward]
    rows = [r for r in rows if _best(r)]
    names = [n for n in NAMES if any(_median(r, n) for r in rows) and not n.startswith("llmloss")]
    if not rows or not names:
        return None
    height = 0.8 / len(names)
    figure, axes = _axes(1.6 + 0.28 * len(rows) * max(len(names), 2))
    for k, name in enumerate(names):
        for j, row in enumerate(rows):
            median, best = _median(row, name), _best(row)
            if not median or not best:
                continue
            place = j + k * height
            axes.barh(place, median / best, height * 0.9, color=_COLOURS[name],
                      label=name if j == 0 else None)  # fmt: skip
            axes.text(median / best, place, f" {median / best:.1f}", va="center", fontsize=8)
    _unique_legend(axes, "outside lower left", columns=4)
    axes.axvline(1, color=_COLOURS["llmloss"], linewidth=2)
    labels = [_short(r.case) for r in rows]
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(rows))], labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to llmloss (blue line)", loc="right")
    _title(figure, "Forward and backward: time of others")
    axes.margins(x=0.12, y=0.02)
    return figure


def _limit(results: Results) -> Figure | None:
    """A line for each case, which has its name, and a point for each contender."""
    rows = [r for r in results.of_figure("peers") if any(map(r.share_of_ceiling, r.contenders))]
    if not rows:
        return None
    figure, axes = _axes(1.6 + 0.26 * len(rows))
    for name in reversed(NAMES):
        points = [(100 * s, k) for k, r in enumerate(rows) if (s := r.share_of_ceiling(name))]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=5, color=_COLOURS[name],
                      label=name)  # fmt: skip
    axes.axvline(100, color="#111827", linewidth=1)
    axes.set_yticks(range(len(rows)), [_short(r.case) for r in rows], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the machine's limit (black line)", loc="right")
    _title(figure, "How close to the machine's limit: a copy, a read, or the products")
    _unique_legend(axes, "outside lower left", columns=3)
    return figure


def _steps(results: Results) -> Figure | None:
    """Time and peak memory of whole steps, over those of this library."""
    lines = []
    for row in results.of_figure("steps"):
        ours = row.contenders.get("llmloss")
        for name in NAMES:
            ratio, other = row.times_faster(name), row.contenders.get(name)
            if name != "llmloss" and ratio and ours and other:
                memory = other.peak_bytes and ours.peak_bytes and other.peak_bytes / ours.peak_bytes
                lines.append((f"{row.case.label}\n{name}", ratio, memory or 0.0, _COLOURS[name]))
    if not lines:
        return None
    figure, both = plt.subplots(
        1, 2, figsize=(_WIDTH, 1.0 + 0.4 * len(lines)), sharey=True, layout="constrained"
    )
    for k, (axes, what) in enumerate(zip(both, ("time", "peak memory"), strict=True), 1):
        for j, line in enumerate(lines):
            axes.barh(j, line[k], 0.6, color=line[3])
            axes.text(line[k], j, f" {line[k]:.1f}" if line[k] else " not measured", va="center",
                      fontsize=8)  # fmt: skip
        axes.axvline(1, color=_COLOURS["llmloss"], linewidth=2)
        axes.margins(x=0.2)
        axes.set_xlabel(what)
    both[0].set_yticks(range(len(lines)), [line[0] for line in lines], fontsize=7.5)
    both[0].invert_yaxis()
    _title(figure, "Whole steps: others, relative to llmloss (blue line)")
    return figure


def _memory(results: Results) -> Figure | None:
    figure, axes = _axes(3.7)
    drawn = False
    for name in NAMES:
        for linear, marker in ((False, "o"), (True, "s")):
            points = sorted(
                (row.case.logits_bytes / 2**20, max(m.peak_bytes / 2**20, 0.1))
                for row in results.rows
                if row.case.has_backward and row.case.is_linear == linear and not row.case.is_step
                and (m := row.contenders.get(name)) and m.peak_bytes is not None
            )  # fmt: skip
            if points:
                drawn = True
                label = f"{name}, linear" if linear else name
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=4.5, linewidth=0,
                          color=_COLOURS[name], label=label,
                          markerfacecolor="none" if linear else None)  # fmt: skip
    if not drawn:
        plt.close(figure)
        return None
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="#111827", linewidth=0.8, linestyle=":",
              label="as large as the logits")  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("N x V logits (MiB)")
    axes.set_ylabel("peak beyond the inputs (MiB)")
    _title(figure, "Memory of forward and backward")
    _unique_legend(axes, "upper left", columns=2)
    return figure


def _options(results: Results) -> Figure | None:
    costs = []
    for row in results.of_figure("options", "ignored"):
        cost = results.option_cost(row)
        if cost is not None and not row.case.is_linear:
            label = (
                row.case.option
                if row.case.option != "plain"
                else (f"{row.case.ignored:.0%} ignored, {row.case.passes}")
            )
            costs.append((label, row.case.dtype, cost))
    if not costs:
        return None
    dtypes = sorted({dtype for _, dtype, _ in costs})
    if len(dtypes) > 1:
        costs = [(f"{label} ({dtype})", dtype, cost) for label, dtype, cost in costs]
    figure, axes = _axes(1.2 + 0.32 * len(costs))
    axes.barh([c[0] for c in costs], [c[-1] for c in costs], color=_COLOURS["llmloss"])
    for j, (_, _, cost) in enumerate(costs):
        axes.text(cost, j, f" {cost:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="#111827", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time over plain cross entropy's", loc="right")
    _title(figure, f"Cost of the options ({', '.join(dtypes)})")
    return figure


def _curve(
    results: Results, figure_name: str, label: str, size: Callable[[Row], int]
) -> Figure | None:
    rows = sorted(results.of_figure(figure_name), key=size)
    if len(rows) < 2:
        return None
    figure, axes = _axes(3.4)
    linear = rows[0].case.is_linear

    def rate(row: Row, seconds: float) -> float:
        return (row.case.flops if linear else row.case.bytes) / seconds / 1e9

    for name in NAMES:
        points = [(size(r), rate(r, m)) for r in rows if (m := _median(r, name))]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=_COLOURS[name],
                      label=name)  # fmt: skip
    limit = [(size(r), rate(r, s)) for r in rows if (s := r.limit_seconds)]
    if limit:
        axes.plot(*zip(*limit, strict=True), color="#111827", linewidth=1, linestyle="--",
                  label="the machine's limit, measured at each size")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([size(r) for r in rows], [f"{size(r):,}" for r in rows], fontsize=8.5)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("GFLOP/s" if linear else "GB/s of minimum traffic")
    _title(figure, f"Forward and backward over {label}")
    _unique_legend(axes, "outside lower left", columns=2)
    return figure


def _short(case: Case) -> str:
    """A case's label in little room."""
    return case.label.replace("forward+backward, ", "").replace("linear, ", "linear ")


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5)


def _unique_legend(axes: Axes, place: Place, columns: int = 1) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    order = sorted(first, key=lambda name: (_rank(name), name))
    where: Any = axes.figure if place.startswith("outside") else axes
    where.legend([first[n] for n in order], order, loc=place, ncols=columns)


def _rank(label: str) -> float:
    name = label.removesuffix(", linear")
    return NAMES.index(name) if name in NAMES else math.inf


def _median(row: Row, name: str) -> float | None:
    measurement = row.contenders.get(name)
    return measurement.median if measurement else None


def _best(row: Row) -> float | None:
    times = [t for n in ("llmloss", "llmloss inplace") if (t := _median(row, n))]
    return min(times, default=None)
