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
PREFERENCE = Case(
    "preference", "forward+backward", 48, 700, "float32", features=24, figure="steps", sequences=4
)
TRAINING = Case(
    "training_step", "forward+backward", 32, 300, "float32", features=16, figure="steps",
    sequences=2,
)  # fmt: skip
LINEAR = Case("linear_cross_entropy", "forward+backward", 40, 700, "float32", features=24)


_OURS = {name: contenders["llmloss"].loss for name, contenders in table.TABLES.items()}


def measured(folder: Path, cases: list[Case], rounds: int = 3, **options: Any) -> Results:
    """Everybody but torch.compile, which takes its time."""
    everybody = set(table.NAMES) - {"compile"}
    runner = Runner("quick", rounds, folder, everybody, with_memory=False, **options)
    return runner.run(cases)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, loss: Any) -> None:
    """Puts a contender's work in the place of another's, in all tables."""
    for names in table.TABLES.values():
        if name in names:
            monkeypatch.setitem(names, name, replace(names[name], loss=loss))


def scaled(value: float, gradient: float) -> Callable[[Case], Any]:
    """This library's loss, with the loss and its gradient off by a factor."""

    def make(case: Case) -> Any:
        right = _OURS[case.operation](case)

        def loss(*tensors: Any) -> Tensor:
            exact = right(*tensors)
            return exact.detach() * value + (exact - exact.detach()) * gradient

        return loss

    return make
