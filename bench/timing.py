"""Interleaved timing: every contender once a round, so that a slow minute hits them all."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

_SAMPLE_SECONDS = 2e-3
"""A CPU's measurement lasts at least so long: short calls are repeated."""
_MOST_REPEATS = 500
_CASE_SECONDS = 60.0
"""After so long a case gets no more rounds, but `_LEAST_ROUNDS` it always gets."""
_LEAST_ROUNDS = 3


@dataclass
class Timed:
    """Something to be timed.

    Attributes:
        run: The timed work; gets what ``prepare`` returned.
        prepare: Makes fresh arguments outside the clock.
        repeatable: Whether many arguments may be prepared before they are used.
        seconds: Of a call, measured so far.
    """

    run: Callable[..., object]
    prepare: Callable[[], Sequence[object]] = field(default=lambda: ())
    repeatable: bool = True
    seconds: list[float] = field(default_factory=list)
    repeats: int = 1

    def warm_up(self, on_gpu: bool) -> None:
        """Two calls; then the number of repeats is chosen."""
        for _ in range(2):
            seconds = self._once(on_gpu)
        if self.repeatable and not on_gpu:
            self.repeats = min(max(math.ceil(_SAMPLE_SECONDS / seconds), 1), _MOST_REPEATS)

    def measure(self, on_gpu: bool) -> None:
        """Adds one measurement."""
        self.seconds.append(self._once(on_gpu))

    def _once(self, on_gpu: bool) -> float:
        arguments = [self.prepare() for _ in range(self.repeats)]
        clock = _gpu_seconds if on_gpu else _seconds
        return clock(self.run, arguments) / self.repeats


def _seconds(run: Callable[..., object], arguments: list[Sequence[object]]) -> float:
    start = time.perf_counter()
    for each in arguments:
        result = run(*each)
    seconds = time.perf_counter() - start
    del result  # freed outside the clock
    return seconds


def _gpu_seconds(run: Callable[..., object], arguments: list[Sequence[object]]) -> float:
    """By events, with the L2 cache full of something else.

    Filling it also gives the host the time to queue all launches: only the device's work counts.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _flush_buffer().zero_()
    start.record()
    for each in arguments:
        result = run(*each)
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3


@lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def measure(
    timed: Sequence[Timed],
    rounds: int,
    on_gpu: bool,
    after_each: Callable[[], None] = lambda: None,
    seconds: float = _CASE_SECONDS,
) -> None:
    """Times every contender, warmed up before, once a round: fewer rounds where they take long.

    The order is another one each round, and on a CPU each measurement follows an untimed run of the
    same contender, as a training loop has it: what others leave behind (gigabytes for the system to
    clean up, caches, pages given back) is not the next one's cost.
    """
    gc.collect()
    gc.disable()
    order = list(timed)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for contender in order:
                if not on_gpu:
                    contender.run(*contender.prepare())
                contender.measure(on_gpu)
                after_each()
    finally:
        gc.enable()
