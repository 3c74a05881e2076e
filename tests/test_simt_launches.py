"""What a public call launches on CUDA, and that the host never waits for it.

The package runs here with the CUDA operators, whose kernels the emulator runs (simt/operators.py).
docs/cuda.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simt import build
from simt.operators import Emulated

pytestmark = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")

# For these torch copies something to the host, and waits, where the tensors are on a device. (An
# index by a mask calls nonzero, and a condition on a tensor _local_scalar_dense.)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
         "bincount", "histc", "_linalg_check_errors")  # fmt: skip


def host_waits(run: Callable[[], Any]) -> list[str]:
    """What would make the host wait for a device, wherever it is called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    return [name for name in WAITS if any(f"aten::{name}" == e.name for e in seen.events())]


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return Emulated()


def logits(rows: int = 4, columns: int = 3000, **options: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=rng, requires_grad=True)
    target = torch.randint(0, columns, (rows,), generator=rng)
    return {"input": x, "target": target, **options}


def hidden(**options: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(6, 8, generator=rng, requires_grad=True)
    w = torch.randn(300, 8, generator=rng, requires_grad=True)
    target = torch.randint(0, 300, (6,), generator=rng)
    # On CUDA nothing is dropped by itself, which would take a wait.
    options = {"drop_ignored": False, **options}
    return {"input": h, "linear_weight": w, "target": target, **options}


def in_place(e: Emulated, **options: Any) -> Any:
    arguments = logits(**options)
    arguments["input"] = arguments["input"] * 1.0  # not a leaf, which cannot be overwritten
    return e.package.cross_entropy(**arguments, inplace=True)


def backward(e: Emulated, of: torch.Tensor) -> None:
    e.forget()
    of.backward()  # type: ignore[no-untyped-call]


# The table's rows. What is launched before a backward pass does not count as its own.
CALLS: dict[str, Callable[[Emulated], Any]] = {
    "`cross_entropy(x, y)`": lambda e: e.package.cross_entropy(**logits()),
    "the same of a few long rows": lambda e: e.package.cross_entropy(**logits(2, 40_000)),
    '`cross_entropy(x, y, reduction="sum")`': lambda e: e.package.cross_entropy(
        **logits(reduction="sum")
    ),
    '`cross_entropy(x, y, reduction="none")`': lambda e: e.package.cross_entropy(
        **logits(reduction="none")
    ),
    "its backward": lambda e: backward(e, e.package.cross_entropy(**logits())),
    "the same with a learned `logit_scale`": lambda e: backward(
        e, e.package.cross_entropy(**logits(logit_scale=torch.ones(()).requires_grad_()))
    ),
    "`cross_entropy(x, y, inplace=True)`": in_place,
    "the same with a softcap": lambda e: in_place(e, softcap=30.0),
    "its backward, in place": lambda e: backward(e, in_place(e)),
    "`token_stats(x, y)`": lambda e: e.package.token_stats(**logits()),
    "its gradient": lambda e: backward(e, e.package.token_stats(**logits()).log_prob.sum()),
    "`linear_cross_entropy(h, w, y)` of one chunk": lambda e: e.package.linear_cross_entropy(
        **hidden()
    ),
    "each of its further chunks": lambda e: e.package.linear_cross_entropy(
        **hidden(chunk_tokens=3)
    ),
    "its backward, for two gradients": lambda e: backward(
        e, e.package.linear_cross_entropy(**hidden())
    ),
}


def documented() -> dict[str, list[str]]:
    text = (build.ROOT / "docs" / "cuda.md").read_text()
    table = text.partition("## What a call launches")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (`.+`) \|$", table, re.M)
    return {call: re.findall(r"`(\w+)`", kernels) for call, kernels in rows}


def test_every_call_is_documented() -> None:
    assert list(documented()) == list(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_launches_what_is_documented(emulated: Emulated, call: str) -> None:
    emulated.forget()
    CALLS[call](emulated)
    launched = emulated.launches()
    if call == "each of its further chunks":
        emulated.forget()
        CALLS["`linear_cross_entropy(h, w, y)` of one chunk"](emulated)
        first = emulated.launches()
        assert launched[: len(first)] == first
        launched = launched[len(first) :]
    assert launched == documented()[call]


@pytest.mark.parametrize("call", CALLS)
def test_the_host_never_waits(emulated: Emulated, call: str) -> None:
    assert host_waits(lambda: CALLS[call](emulated)) == []


def test_a_wait_would_be_seen(emulated: Emulated) -> None:
    arguments = hidden(drop_ignored=True)
    arguments["target"][0] = -100
    assert "nonzero" in host_waits(lambda: emulated.package.linear_cross_entropy(**arguments))


def test_nothing_below_the_operators_waits() -> None:
    """But for the check of the targets that a variable asks for."""
    sources = [*(build.ROOT / "csrc" / "cuda").rglob("*.cu*"), build.ROOT / "csrc/ops/cuda_ops.cpp"]
    text = "\n".join(path.read_text() for path in sources)
    assert not re.findall(r"cuda\w*Synchronize|cudaMemcpy\w*|cudaStreamQuery|cudaMalloc\w*", text)
    assert text.count("DeviceType::CPU") == 1


def test_the_emulated_operators_compute_the_loss(emulated: Emulated) -> None:
    arguments = logits()
    x, target = arguments["input"], arguments["target"]
    loss = emulated.package.cross_entropy(**arguments)
    (grad,) = torch.autograd.grad(loss, x)
    expected = torch.nn.functional.cross_entropy(x, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])
