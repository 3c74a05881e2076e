"""Processes of one group, kept for many tests: each rank runs the function that a test sends."""

from __future__ import annotations

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_WAIT = 300  # seconds for a function on a busy machine; the first also imports torch


class Ranks:
    """``run(function, *args)`` calls ``function(rank, ranks, *args)`` on every rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned; a rank's failure is the test's."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + _WAIT
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = set(wait(list(waiting), max(deadline - time.monotonic(), 0)))
            for rank in [rank for pipe, rank in waiting.items() if pipe in ready]:
                try:
                    is_well, answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    is_well, answers[rank] = False, "has died"
                if not is_well:  # the first to fail: the others may only wait for it
                    self.stop()
                    raise AssertionError(f"rank {rank}: {answers[rank]}")
            if not ready:
                self.stop()
                raise AssertionError(f"of {self.size} ranks, only {sorted(answers)} have answered")
        return [answers[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context: Any = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="llmloss-ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, f"file://{self._folder.name}/rendezvous")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection, rank: int, ranks: int, where: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=_WAIT)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timeout)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)  # the same numbers on every rank
        try:
            pipe.send((True, function(rank, ranks, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def same_on_every_rank(tensor: Tensor) -> None:
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.detach())
    for other in every:
        assert torch.equal(other.nan_to_num(77), tensor.nan_to_num(77))
