"""The peak memory of a contender beyond its inputs, and the number of kernels it launches."""

from __future__ import annotations

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.context import BaseContext
from typing import Any

import torch

from llmloss_train.memory import PeakMeter

from .cases import Case
from .contenders import TABLES, Step, make_inputs

_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 64 << 10
_PRELOADED = ["llmloss_bench.memory", "torch._dynamo", "torch._inductor"]


def peak_bytes(case: Case, name: str) -> int | None:
    """The peak memory of one call beyond its inputs, gradients included.

    On a GPU it is that of torch's allocator. On a CPU it is that of the resident set of a child
    process that does nothing else, so that neither other contenders nor memory that the allocator
    still holds count.

    Returns:
        Bytes, or None if the system does not report them or the child process died.
    """
    if case.device != "cpu":
        return _peak(case, name)
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=_fork_server()) as pool:
            return pool.submit(_peak, case, name).result()
    except BrokenProcessPool:
        return None


@lru_cache(maxsize=1)
def _fork_server() -> BaseContext:
    """A server whose children start with everything imported, but nothing run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _peak(case: Case, name: str) -> int | None:
    if case.device == "cpu":
        _give_pages_back()
    if case.threads:
        torch.set_num_threads(case.threads)
    step = _step(case, name)
    peak = None
    # The first call also allocates what libraries keep for later calls.
    for _ in range(2):
        arguments = step.prepare()
        meter = PeakMeter(torch.device(case.device))
        result = step.run(*arguments)
        peak = meter.peak()
        del arguments, result
    return peak


def _give_pages_back() -> None:
    """Makes malloc return freed pages at once; reused pages would not count."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _step(case: Case, name: str) -> Step:
    return Step(case, TABLES[case.operation][name], make_inputs(case))


def launches(step: Step) -> int | None:
    """The kernels, copies and fills that a call queues on the GPU; None if none is traced."""
    arguments = step.prepare()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step.run(*arguments)
        torch.cuda.synchronize()
    events: Any = profiler.events()
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    return sum(e.device_type == cuda for e in events) or None
