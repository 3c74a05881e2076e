"""What every test runs under: a seed, and the devices and instruction sets at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks

from llmloss_ext.cli.info import ISAS

# A graph compiled for an earlier build of the operators must not be found again.
_CACHE = tempfile.TemporaryDirectory(prefix="llmloss-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
# Ranks are processes of this machine: they need not look up its name, which can take a minute.
if os.path.exists("/sys/class/net/lo"):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device at hand."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor."""
    monkeypatch.setenv("LLMLOSS_CPU_ISA", request.param)
    if ISAS[torch.ops.llmloss.cpu_isa()] != request.param:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def groups() -> Iterator[dict[int, Ranks]]:
    """Two processes of a group, or more; they start when a test first sends them something."""
    every = {size: Ranks(size) for size in (2, 3, 4)}
    yield every
    for group in every.values():
        group.stop()


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest, groups: dict[int, Ranks]) -> Ranks:
    """Two ranks, then three."""
    return groups[request.param]


@pytest.fixture
def four(groups: dict[int, Ranks]) -> Ranks:
    """Four ranks: for a mesh of two dimensions."""
    return groups[4]


@pytest.fixture
def two(groups: dict[int, Ranks]) -> Ranks:
    """Two ranks."""
    return groups[2]
