"""What the tests share: devices, dtypes, and the one table of tolerances."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmloss_ext.cli.info import ISAS
from llmloss_ext.tolerances import GRADIENT, VALUE

# A graph compiled for an earlier build of the operators must not be found again.
_CACHE = tempfile.TemporaryDirectory(prefix="llmloss-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
# Ranks are processes of this machine: they need not look up its name, which can take a minute.
if os.path.exists("/sys/class/net/lo"):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

__all__ = ["FLOATS", "GRADIENT", "VALUE", "Passed", "assert_close", "gradients"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


class Passed(torch.autograd.Function):
    """``Passed.apply(logits, anchor)``: the same memory, as if a model had computed it."""

    @staticmethod
    def forward(ctx, logits, anchor):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        return None, grad.new_zeros(())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """|actual - expected| <= tolerance max(1, |expected|); nan and inf must be in one place."""
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance,
        equal_nan=True,
    )  # fmt: skip


def gradients(loss: Callable[..., Tensor], *tensors: Tensor, upstream: Tensor | None = None):
    """The loss's value and its gradients for fresh leaves of ``tensors``."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    if upstream is None:
        upstream = torch.ones_like(value)
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))
