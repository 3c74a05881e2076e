"""The results as tables of text, for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..contenders import NAMES
from ..peers import is_missing
from ..results import Measurement, Results, Row

MIB = 2**20


@dataclass
class Table:
    """A table of text. All columns but the first hold numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Formats the table as Markdown."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(results: Results) -> list[Table]:
    """The tables of all measurements."""
    rows = results.rows
    made = [
        _by_contender("Time per call, and relative to llmloss", rows, _time),
        _by_contender(
            "Peak memory beyond the inputs, gradients included (MiB)",
            [r for r in rows if any(m.peak_bytes for m in r.contenders.values())],
            lambda row, m: mebibytes(m.peak_bytes),
        ),
        _by_contender("Error against float64: loss / gradient", rows, _error),
    ]
    steps = [row for row in rows if row.case.operation == "training_step"]
    if steps:
        made.append(
            _by_contender("Tokens per second of a training step", steps,
                          lambda row, m: f"{row.case.rows / m.median:,.0f}" if m.median else "")
        )  # fmt: skip
    if any(m.launches for row in rows for m in row.contenders.values()):
        made.append(
            _by_contender("Kernels, copies and fills per call", rows,
                          lambda row, m: str(m.launches or ""))
        )  # fmt: skip
    return [*made, limits(rows)]


def missing(results: Results) -> list[str]:
    """A line for each contender that was not timed in a case, with the reason."""
    lines = [f"{name}: {state}" for name, state in results.peers.items() if is_missing(state)]
    return lines + [
        f"{name}: {m.status} in {row.case.label}: {m.reason}"
        for row in results.rows
        for name, m in row.contenders.items()
        if m.status != "ok"
    ]


def limits(rows: Iterable[Row]) -> Table:
    """The machine's limits, and the share of them that was reached."""
    cells = []
    for row in rows:
        if not row.ceilings:
            continue
        rate = max(
            (c.rate for c in row.ceilings.values() if bool(c.flops) == row.case.is_linear),
            default=0.0,
        )
        shares = [percent(row.share_of_ceiling(name)) for name in ("llmloss", "llmloss inplace")]
        unit = "GFLOP/s" if row.case.is_linear else "GB/s"
        work = row.case.flops if row.case.is_linear else row.case.bytes
        cells.append([row.case.label, f"{work / 1e9:.2f}", f"{rate / 1e9:,.1f} {unit}", *shares])
    columns = ["case", "GB or GFLOP", "the machine's limit", "llmloss", "llmloss inplace"]
    return Table("Share of the machine's limit, measured in the same rounds", columns, cells)


def _by_contender(
    title: str, rows: Iterable[Row], cell: Callable[[Row, Measurement], str]
) -> Table:
    rows = list(rows)
    names = [name for name in NAMES if any(name in row.contenders for row in rows)]
    body = []
    for row in rows:
        cells = []
        for name in names:
            m = row.contenders.get(name)
            cells.append("" if m is None else cell(row, m) if m.status == "ok" else m.status)
        body.append([row.case.label, *cells])
    return Table(title, ["case", *names], body)


def _time(row: Row, m: Measurement) -> str:
    if m.median is None:
        return ""
    text = f"{milliseconds(m.median)} ms"
    ours = row.contenders["llmloss"]
    if m is ours or ours.median is None:
        return text
    return f"{text} ({m.median / ours.median:.2f}x)"


def _error(row: Row, m: Measurement) -> str:
    figures = [m.loss_error, m.gradient_error]
    return " / ".join(f"{f:.0e}" for f in figures if f is not None)


def milliseconds(seconds: float) -> str:
    """Formats a time in milliseconds with three digits."""
    value = seconds * 1e3
    return (
        f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.3g}"
    )


def mebibytes(size: int | None) -> str:
    """Formats a size in MiB, with a decimal below 10 MiB."""
    if size is None:
        return ""
    return f"{size / MIB:,.0f}" if size >= 10 * MIB else f"{size / MIB:.1f}"


def percent(share: float | None) -> str:
    """Formats a fraction in percent."""
    return "" if share is None else f"{share:.0%}"
