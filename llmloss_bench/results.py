"""The results of a run: all measurements, in one JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmloss_ext.cli import UserError
from llmloss_train.files import replace_file, writing

from .cases import Case

SCHEMA = 2
FILE = "results.json"


@dataclass
class Measurement:
    """The measurements of a contender in a case.

    Attributes:
        status: "ok", "wrong" (out of tolerance, and therefore not timed), "unsupported" or
            "failed".
        reason: Why the status is not "ok".
        seconds: The time of one call, in each measurement.
        peak_bytes: The peak memory beyond the inputs, gradients included.
        loss_error: The relative error against float64.
        gradient_error: The largest relative error of a sampled row, in the Euclidean norm.
        launches: The number of kernels in one call, on a GPU.
    """

    status: str = "ok"
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    launches: int | None = None

    @property
    def median(self) -> float | None:
        """The median time, or None if there is none."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """The interquartile range over the median."""
        if len(self.seconds) < 2:
            return None
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / middle


@dataclass
class Ceiling:
    """A limit of the machine, measured in the same rounds.

    Attributes:
        seconds: The time of one call, in each measurement.
        bytes: The bytes that a call moves, if the limit is a bandwidth.
        flops: The operations of a call, if the limit is a rate of arithmetic.
    """

    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    flops: int = 0

    @property
    def rate(self) -> float:
        """Bytes or FLOPs per second."""
        return (self.bytes or self.flops) / statistics.median(self.seconds)


@dataclass
class Row:
    """The measurements of a case: contenders and ceilings by name."""

    case: Case
    contenders: dict[str, Measurement] = field(default_factory=dict)
    ceilings: dict[str, Ceiling] = field(default_factory=dict)

    def times_faster(self, than: str, who: str = "llmloss") -> float | None:
        """The time of another contender over ours."""
        theirs, ours = self._median(than), self._median(who)
        return theirs / ours if theirs and ours else None

    def share_of_ceiling(self, who: str = "llmloss") -> float | None:
        """The time at the machine's limit over the measured time.

        From logits, the limit is the bandwidth of a copy, or for forward alone that of a read (on a
        GPU of a copy, where torch's read is slower than its copy). From hidden states, it is the
        rate of the matrix products at their best chunk size.
        """
        seconds, limit = self._median(who), self.limit_seconds
        return limit / seconds if seconds and limit else None

    def machine_seconds(self, who: str) -> float | None:
        """The time, as the bytes or FLOPs that the machine can do in it."""
        seconds, limit = self._median(who), self.limit_seconds
        work = self.case.flops if self.case.is_linear else self.case.bytes
        return seconds * work / limit if seconds and limit else None

    @property
    def limit_seconds(self) -> float | None:
        """The time of the case's work at the machine's limit."""
        if self.case.is_linear:
            rates = [c.rate for c in self.ceilings.values() if c.flops]
            return self.case.flops / max(rates) if rates else None
        if self.case.has_backward:
            names = ["copy"]
        else:
            names = ["read"] if self.case.device == "cpu" else ["read", "copy"]
        rates = [self.ceilings[name].rate for name in names if name in self.ceilings]
        return self.case.bytes / max(rates) if rates else None

    def _median(self, name: str) -> float | None:
        measurement = self.contenders.get(name)
        return measurement.median if measurement else None


@dataclass
class Results:
    """The results of a run.

    Attributes:
        machine: The facts from `machine`.
        settings: The suite, the rounds, and whether memory was measured.
        peers: The version of each peer, or why it is missing.
        rows: The measured cases, in the order of the suite.
        complete: Whether the run reached the end of the suite.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    peers: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    complete: bool = False

    def find(self, case: Case) -> Row | None:
        """The row of a case, if it was measured."""
        return next((row for row in self.rows if row.case == case), None)

    def option_cost(self, row: Row, who: str = "llmloss") -> float | None:
        """A case's time over the plain case's, both relative to the machine in their rounds."""
        same = replace(row.case, option="plain", ignored=0.0)
        plain = self.find(replace(same, figure="plain")) or self.find(replace(same, figure="peers"))
        times = [r and r.machine_seconds(who) for r in (row, plain)]
        return times[0] / times[1] if times[0] and times[1] else None

    def of_figure(self, *figures: str) -> Iterator[Row]:
        """The rows of the given figures."""
        return (row for row in self.rows if row.case.figure in figures)

    def save(self, path: Path) -> None:
        """Writes the file atomically.

        Raises:
            UserError: The file cannot be written.
        """
        rows = [
            {
                "case": row.case.to_json(),
                "contenders": {n: _short(asdict(m)) for n, m in row.contenders.items()},
                "ceilings": {n: _short(asdict(c)) for n, c in row.ceilings.items()},
            }
            for row in self.rows
        ]
        content = {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": self.settings,
            "peers": self.peers,
            "complete": self.complete,
        }
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda file: file.write(_text(content, rows).encode()))

    @staticmethod
    def load(path: Path) -> Results:
        """Reads a results file, or the one in a folder.

        Raises:
            UserError: There is none, or it is not a results file of this version.
        """
        path = path / FILE if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise UserError(f"{path} is not a result of this benchmark (schema {SCHEMA})")
        try:
            rows = [
                Row(
                    Case(**row["case"]),
                    {name: Measurement(**m) for name, m in row["contenders"].items()},
                    {name: Ceiling(**c) for name, c in row["ceilings"].items()},
                )
                for row in content["rows"]
            ]
            facts = {key: content[key] for key in ("machine", "settings", "peers", "complete")}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        return Results(rows=rows, **facts)


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Drops empty values, and rounds numbers to their significant digits."""
    kept = {name: value for name, value in values.items() if value not in (None, "", [], 0)}
    for name, value in kept.items():
        if isinstance(value, float):
            kept[name] = float(f"{value:.3g}")
        elif name == "seconds":
            kept[name] = [float(f"{v:.5g}") for v in value]
    return kept


def _text(content: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Formats the JSON for readers and diffs: one line per case."""
    head = json.dumps(content, indent=1).removesuffix("\n}")
    return head + ',\n "rows": [\n' + ",\n".join("  " + json.dumps(r) for r in rows) + "\n ]\n}\n"
