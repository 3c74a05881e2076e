"""The comparison of two runs sees a change through noise, and no change in noise."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llmloss_bench import compare as comparison
from llmloss_bench import contenders as table
from llmloss_bench import timing
from llmloss_bench.cases import Case
from llmloss_bench.results import Ceiling, Measurement, Results, Row
from llmloss_bench.run import Runner
from llmloss_ext.cli.errors import UserError
from llmloss_ext.cli.main import main

from .runs import DENSE, replaced


def made_up(scale: float = 1.0, noise: float = 0.01, seed: int = 0, **changes) -> Results:
    """A run in which this library takes ``scale`` milliseconds, and a copy one."""
    generator = random.Random(seed)

    def times(middle: float) -> list[float]:
        return [middle * generator.gauss(1.0, noise) for _ in range(9)]

    ours = Measurement(seconds=times(1e-3 * scale), peak_bytes=50 << 20, loss_error=1e-6,
                       gradient_error=1e-6)  # fmt: skip
    for name, value in changes.items():
        setattr(ours, name, value)
    ceilings = {"copy": Ceiling(times(1e-3), bytes=1000), "read": Ceiling(times(5e-4), bytes=500)}
    row = Row(DENSE, {"llmloss": ours, "torch": Measurement(seconds=times(4e-3))}, ceilings)
    return Results({"cpu": "x", "threads": 2}, {}, {}, [row], True)


def verdicts(before: Results, after: Results, **options) -> list[str]:
    return [change.verdict for change in comparison.compare(before, after, **options)]


def test_noise_is_not_a_change():
    for seed in range(1, 20):
        assert verdicts(made_up(noise=0.05), made_up(noise=0.05, seed=seed)) == ["same"]


def test_slower_and_faster_are_seen_through_noise():
    assert verdicts(made_up(), made_up(1.3, seed=1)) == ["slower"]
    assert verdicts(made_up(), made_up(0.7, seed=1)) == ["faster"]
    assert verdicts(made_up(), made_up(1.3, seed=1), tolerance=0.5) == ["same"]
    assert verdicts(made_up(noise=0.5), made_up(1.1, noise=0.5, seed=3)) == ["same"]


def test_a_slow_hour_is_not_a_slow_kernel():
    """Everything takes twice as long, the copy too."""
    slow = made_up(2.0, seed=1)
    slow.rows[0].ceilings["copy"].seconds = [2e-3 + 1e-6 * k for k in range(9)]
    assert verdicts(made_up(), slow) == ["same"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"peak_bytes": 60 << 20}, "more memory"),
        ({"peak_bytes": 40 << 20}, "less memory"),
        ({"gradient_error": 1e-5}, "less exact"),
        ({"loss_error": 1e-5}, "less exact"),
    ],
)
def test_memory_and_errors_are_compared(change, verdict):
    assert verdicts(made_up(), made_up(seed=1, **change)) == ["same", verdict]


def test_what_is_gone_or_broken():
    wrong = made_up()
    wrong.rows[0].contenders["llmloss"] = Measurement("wrong", "error of the loss")
    assert verdicts(made_up(), wrong) == ["broken"]
    empty = made_up()
    empty.rows = []
    with pytest.raises(UserError, match="no case in common"):
        comparison.compare(made_up(), empty)


def test_another_machine_is_refused_unless_asked_for():
    other = made_up()
    other.machine["cpu"] = "y"
    with pytest.raises(UserError, match="cpu: x and y"):
        comparison.compare(made_up(), other)
    assert verdicts(made_up(), other, other_machine=True) == ["same"]


def test_a_slowed_kernel_is_flagged(tmp_path, monkeypatch, capsys):
    """Measured, not made up: the loss is computed ten times, on one thread.

    The clock is that of the processor's work, which nothing else on the machine adds to.
    """
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=time.process_time))
    case = replace(DENSE, rows=64, columns=8000, threads=1)

    def runs(name: str) -> str:
        runner = Runner("quick", 9, tmp_path / name, wanted=set(), with_memory=False)
        (row,) = runner.run([case]).rows
        assert row.contenders["llmloss"].status == "ok"
        return str(tmp_path / name)

    def slow(case: Case):
        right = table.ours(case)

        def loss(*tensors):
            for _ in range(9):
                right(*tensors).backward()
            tensors[0].grad = None
            return right(*tensors)

        return loss

    before = runs("before")
    replaced(monkeypatch, "llmloss", slow)
    after = runs("after")
    assert main(["bench", "compare", before, after]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "compare", before, before]) == 0
    assert main(["bench", "compare", after, before]) == 0  # faster is no regression
