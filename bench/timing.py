"""Interleaved timing: every contender once a round, so that a slow minute hits them all."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

Setup = Callable[[], tuple[object, ...]]


@dataclass
class Contender:
    """One way to do a case's work.

    Attributes:
        name: Shown in the table.
        run: The timed work; gets what ``setup`` returned.
        setup: Makes fresh inputs outside the clock, where the work overwrites them.
        seconds: The times measured so far.
    """

    name: str
    run: Callable[..., object]
    setup: Setup = field(default=lambda: ())
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def time(self) -> None:
        """Adds one measurement."""
        arguments = self.setup()
        seconds = _time_on_gpu if torch.cuda.is_available() else _time
        self.seconds.append(seconds(lambda: self.run(*arguments)))


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], object]) -> float:
    """By events, with the L2 cache full of something else.

    Filling it also gives the host the time to queue all launches: only the device's work counts.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _flush_buffer().zero_()
    start.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


@lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def measure(contenders: list[Contender], rounds: int) -> None:
    """Warms up, then times every contender once a round.

    The order is another one each round, and each measurement follows an untimed run of the same
    contender, as a training loop has it: what others leave behind (gigabytes for the system to
    clean up, caches, pages given back) is not the next one's cost.
    """
    for contender in contenders:
        for _ in range(2):
            contender.time()
        contender.seconds.clear()
    gc.collect()
    gc.disable()
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    try:
        for _ in range(rounds):
            shuffle(order)
            for contender in order:
                contender.run(*contender.setup())
                contender.time()
    finally:
        gc.enable()
