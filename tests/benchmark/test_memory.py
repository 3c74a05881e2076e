"""Peak memory, in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmloss_bench import memory
from llmloss_bench.cases import Case

from .runs import DENSE


def test_peak_memory_of_a_process_of_its_own():
    case = replace(DENSE, rows=512, columns=16000)  # 31 MiB of logits
    peaks = {name: memory.peak_bytes(case, name) for name in ("llmloss", "llmloss inplace")}
    assert peaks["llmloss"] == pytest.approx(case.logits_bytes, rel=0.15)
    assert peaks["llmloss inplace"] < case.logits_bytes / 8


def test_a_child_that_dies_is_no_figure(monkeypatch):
    def broken(case: Case, name: str) -> int:
        raise memory.BrokenProcessPool

    class Pool:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            raise memory.BrokenProcessPool

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Pool)
    assert memory.peak_bytes(DENSE, "llmloss") is None
