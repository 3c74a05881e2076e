"""Compares two runs, and takes the noise of both into account."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from llmloss_ext.cli import UserError

from .machine import IDENTITY
from .results import Measurement, Results, Row

TOLERANCE = 0.1
"""Relative changes up to this are noise: identical runs differ by as much."""
_RESAMPLES = 500
_CONFIDENCE = 0.95
_MORE_BYTES, _MORE_SHARE = 1 << 20, 0.05
_LESS_EXACT = 1.5


@dataclass(frozen=True)
class Change:
    """The change of one of this library's contenders in one case.

    Attributes:
        case: The label of the case.
        name: The contender.
        verdict: "same", "faster", "slower", "more memory", "less memory", "less exact", "broken"
            (measured in the first run, failed in the second) or "gone" (not in the second run).
        ratio: The second run's value over the first's: times, each relative to the machine's limit
            in its own run, or bytes, or errors.
        interval: The 95 % confidence interval of the ratio of times.
    """

    case: str
    name: str
    verdict: str
    ratio: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the change is for the worse."""
        return self.verdict in ("slower", "more memory", "less exact", "broken")


def compare(
    before: Results, after: Results, tolerance: float = TOLERANCE, other_machine: bool = False
) -> list[Change]:
    """Looks up every case of the first run in the second, and compares them.

    Args:
        before: The first run.
        after: The second run.
        tolerance: The relative change of a time that does not count.
        other_machine: Whether the runs may come from different machines.

    Raises:
        UserError: The runs come from different machines, or have no case in common.
    """
    differing = [k for k in IDENTITY if before.machine.get(k) != after.machine.get(k)]
    if differing and not other_machine:
        details = "; ".join(
            f"{k}: {before.machine.get(k)} and {after.machine.get(k)}" for k in differing
        )
        raise UserError(
            f"the runs come from different machines ({details}): --other-machine allows it"
        )
    changes = [
        change for row in before.rows for change in _of_row(row, after.find(row.case), tolerance)
    ]
    if all(change.verdict == "gone" for change in changes):
        raise UserError("the runs have no case in common")
    return changes


def _of_row(before: Row, after: Row | None, tolerance: float) -> Iterator[Change]:
    for name, old in before.contenders.items():
        if not name.startswith("llmloss") or old.status != "ok":
            continue
        new = after.contenders.get(name) if after else None
        label = before.case.label
        if after is None or new is None:
            yield Change(label, name, "gone")
        elif new.status != "ok":
            yield Change(label, name, "broken")
        else:
            yield _times(before, after, name, tolerance)
            yield from _others(label, name, old, new)


def _times(before: Row, after: Row, name: str, tolerance: float) -> Change:
    samples = [
        before.contenders[name].seconds, _control(before), after.contenders[name].seconds,
        _control(after),
    ]  # fmt: skip
    generator = random.Random(0)

    def ratio(lists: list[list[float]]) -> float:
        old, old_control, new, new_control = map(statistics.median, lists)
        return (new / new_control) / (old / old_control)

    drawn = sorted(
        ratio([generator.choices(values, k=len(values)) for values in samples])
        for _ in range(_RESAMPLES)
    )
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    low, high = drawn[tail], drawn[-1 - tail]
    verdict = "same"
    if low > 1 + tolerance:
        verdict = "slower"
    elif high < 1 / (1 + tolerance):
        verdict = "faster"
    return Change(before.case.label, name, verdict, ratio(samples), (low, high))


def _control(row: Row) -> list[float]:
    """What shows that the whole machine was slow: its limit, or else eager torch."""
    if row.case.is_linear and row.ceilings:
        return min((c.seconds for c in row.ceilings.values()), key=statistics.median)
    name = "copy" if row.case.has_backward else "read"
    if name in row.ceilings:
        return row.ceilings[name].seconds
    torch = row.contenders.get("torch")
    return torch.seconds if torch and torch.seconds else [1.0]


def _others(label: str, name: str, old: Measurement, new: Measurement) -> Iterator[Change]:
    if old.peak_bytes and new.peak_bytes:
        ratio = new.peak_bytes / old.peak_bytes
        for verdict, less, more in (
            ("more memory", old.peak_bytes, new.peak_bytes),
            ("less memory", new.peak_bytes, old.peak_bytes),
        ):
            if more > less * (1 + _MORE_SHARE) + _MORE_BYTES:
                yield Change(label, name, verdict, ratio)
    for before, after in (
        (old.loss_error, new.loss_error),
        (old.gradient_error, new.gradient_error),
    ):
        # Below 1e-7, float32 errors are random.
        if before is not None and after is not None and after > max(before, 1e-7) * _LESS_EXACT:
            yield Change(label, name, "less exact", after / max(before, 1e-7))
