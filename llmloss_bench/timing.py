"""Interleaved timing: each round measures every contender once, so that noise hits all alike."""

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
"""The least duration of a measurement on a CPU: short calls are repeated."""
_MOST_REPEATS = 500
_CASE_SECONDS = 60.0
"""After this time a case gets no more rounds, once it has had `_LEAST_ROUNDS`."""
_LEAST_ROUNDS = 3


@dataclass
class Timed:
    """A call to time.

    Attributes:
        run: The timed call; takes the arguments that ``prepare`` returns.
        prepare: Makes fresh arguments, and is not timed.
        repeatable: Whether several sets of arguments may be prepared before they are used.
        seconds: The measured times of a call.
        repeats: The number of calls in a measurement.
    """

    run: Callable[..., object]
    prepare: Callable[[], Sequence[object]] = field(default=lambda: ())
    repeatable: bool = True
    seconds: list[float] = field(default_factory=list)
    repeats: int = 1

    def warm_up(self, on_gpu: bool) -> None:
        """Runs two calls, then chooses the number of repeats."""
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
    del result  # freeing it is not timed
    return seconds


def _gpu_seconds(run: Callable[..., object], arguments: list[Sequence[object]]) -> float:
    """Times with CUDA events, after the L2 cache is flushed.

    By reading: what is written would be written back to memory within the timed region. It also
    gives the host time to queue all launches, so that only the device's work counts.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _flush_buffer().sum()
    start.record()
    for each in arguments:
        result = run(*each)
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3


@lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(1 << 28, device="cuda")


def measure(
    timed: Sequence[Timed],
    rounds: int,
    on_gpu: bool,
    after_each: Callable[[], None] = lambda: None,
    seconds: float = _CASE_SECONDS,
) -> None:
    """Times every contender once per round; they have been warmed up before.

    Each round has another random order, and slow cases get fewer rounds. On a CPU, an untimed run
    of the same contender precedes each measurement, as in a training loop. So no contender pays for
    what the previous one left behind: memory to clean up, caches, and pages that were given back.
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
