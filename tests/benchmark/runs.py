"""Two small cases, and a run of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import contenders as table
from bench.cases import Case
from bench.results import Results
from bench.run import Runner

DENSE = Case("cross_entropy", "forward+backward", 48, 2000, "float32")
LINEAR = Case("linear_cross_entropy", "forward+backward", 40, 700, "float32", features=24)


def measured(folder: Path, cases: list[Case], rounds: int = 3, **options) -> Results:
    """Everybody but torch.compile, which takes its time."""
    everybody = set(table.NAMES) - {"compile"}
    runner = Runner("quick", rounds, folder, everybody, with_memory=False, **options)
    return runner.run(cases)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, loss) -> None:
    """Puts a contender's work in the place of another's, in both tables."""
    for names in (table.DENSE, table.LINEAR):
        if name in names:
            monkeypatch.setitem(names, name, replace(names[name], loss=loss))


def scaled(value: float, gradient: float):
    """This library's loss, with the loss and its gradient off by a factor."""

    def make(case: Case):
        right = table.ours(case)

        def loss(*tensors):
            exact = right(*tensors)
            return exact.detach() * value + (exact - exact.detach()) * gradient

        return loss

    return make
