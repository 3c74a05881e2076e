"""How many rounds a measurement takes, and how often a short call is repeated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmloss_bench import timing


class Clock:
    """A clock that stands still but while something runs: no other work on the machine counts."""

    def __init__(self) -> None:
        self.now = 0.0

    def runs(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (7.0, 4), (9.0, 5), (60.0, 6)])
def test_what_takes_long_gets_fewer_rounds(clock, seconds, rounds):
    slow = timing.Timed(lambda: clock.runs(1.0), repeatable=False)
    timing.measure([slow], 6, False, seconds=seconds)  # a round: one untimed run, one timed
    assert slow.seconds == [1.0] * rounds


def test_a_short_call_is_repeated_until_the_clock_can_tell(clock):
    short = timing.Timed(lambda: clock.runs(1e-4))
    short.warm_up(False)
    assert short.repeats == 20
    timing.measure([short], 3, False)
    assert short.seconds == pytest.approx([1e-4] * 3)
