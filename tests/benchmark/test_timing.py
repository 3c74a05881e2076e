"""How many rounds a measurement takes."""

from __future__ import annotations

import time

from bench import timing


def test_what_takes_long_gets_fewer_rounds():
    def rounds_of(seconds: float) -> int:
        slow = timing.Timed(lambda: time.sleep(0.01), repeatable=False)
        timing.measure([slow], 6, False, seconds=seconds)
        return len(slow.seconds)

    assert rounds_of(0.0) == 3
    assert rounds_of(60.0) == 6
