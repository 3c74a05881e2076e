"""Two small cases, and a run of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llmloss_bench import contenders as table
from llmloss_bench.cases import Case
from llmloss_bench.results import Results
from llmloss_bench.run import Runner

DENSE = Case("cross_entropy", "forward+backward", 48, 2000, "float32")
LINEAR = Case("linear_cross_entropy", "forward+backward", 40, 700, "float32", features=24)


def measured(folder: Path, cases: list[Case], rounds: int = 3, **options: Any) -> Results:
    """Everybody but torch.compile, which takes its time."""
    everybody = set(table.NAMES) - {"compile"}
    runner = Runner("quick", rounds, folder, everybody, with_memory=False, **options)
    return runner.run(cases)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, loss: Any) -> None:
    """Puts a contender's work in the place of another's, in both tables."""
    for names in (table.DENSE, table.LINEAR):
        if name in names:
            monkeypatch.setitem(names, name, replace(names[name], loss=loss))


def scaled(value: float, gradient: float) -> Callable[[Case], Any]:
    """This library's loss, with the loss and its gradient off by a factor."""

    def make(case: Case) -> Any:
        right = table.ours(case)

        def loss(*tensors: Tensor) -> Tensor:
            exact = right(*tensors)
            return exact.detach() * value + (exact - exact.detach()) * gradient

        return loss

    return make
