"""How many blocks a multiprocessor holds, by arithmetic, and the table of docs/gpu-model.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cuda_build import KERNELS, build

from llmloss_ext.chips import A100, B200, CHIPS, H100, RTX_5090, Chip
from llmloss_ext.cli import info
from llmloss_ext.residency import residency

DOCS = Path(__file__).parents[1] / "docs" / "gpu-model.md"


def kernel(name: str, architecture: str, registers: int) -> dict[str, Any]:
    return {"kernel": name, "architecture": architecture, "registers": registers,
            "shared_bytes": 0}  # fmt: skip


def report(registers: dict[str, int]) -> list[dict[str, Any]]:
    return [
        kernel(name, chip.architecture, count)
        for chip in (A100, H100, B200, RTX_5090)
        for name, count in registers.items()
    ]


def held(chip: Chip, registers: dict[str, int], rows: int = 8192, columns: int = 32000) -> Any:
    plan = torch.ops.llmloss.launch_plan(rows, columns, 2, *chip.limits)
    return {r.kernel: r for r in residency(chip, plan, "bfloat16", report(registers))}


STATS, GRAD = "row_stats_kernel<BFloat16, 0u>", "row_grad_kernel<BFloat16, 0u>"
FUSED, HOLDING = "fused_kernel<BFloat16, false>", "fused_kernel<BFloat16, true>"


@pytest.mark.parametrize(
    ("registers", "blocks", "limit"),
    [
        (64, 65536 // (64 * 256), "registers"),
        (65, 65536 // (72 * 256), "registers"),  # in units of 8 a thread
        (80, 3, "registers"),
        (128, 2, "registers"),
        (24, 2048 // 256, "threads"),
    ],
)
def test_registers_limit_blocks(registers: int, blocks: int, limit: str) -> None:
    found = held(H100, {GRAD: registers})["row_grad"]
    assert (found.threads, found.blocks, found.limit) == (256, blocks, limit)


def test_fewer_threads_fit_on_12_0() -> None:
    assert held(RTX_5090, {GRAD: 24})["row_grad"].blocks == 1536 // 256


def test_shared_memory_limits_the_fused_kernel() -> None:
    found = held(H100, {FUSED: 64})["fused"]
    assert found.limit == "shared memory"
    assert found.blocks == 228 * 1024 // (found.shared_bytes + 1024) == 3


def test_a_block_that_holds_tiles_is_alone() -> None:
    for chip, cluster in ((H100, 1), (RTX_5090, 2)):
        found = held(chip, {FUSED: 80, HOLDING: 96}, columns=128256)["fused"]
        assert (found.registers, found.threads) == (96, 640)
        assert (found.blocks, found.cluster) == (1, cluster)


def test_every_chip_runs_the_plain_kernels() -> None:
    """With the most registers that the launch bounds leave."""
    registers = {STATS: 64, GRAD: 64, FUSED: 80, HOLDING: 96}
    for chip in CHIPS.values():
        for columns in (1000, 32000, 50257, 128256, 262144):
            found = held(chip, registers, columns=columns)
            assert {r.blocks > 0 for r in found.values()} == {True}, (chip.name, columns)


def test_a_kernel_that_was_not_built_is_left_out() -> None:
    assert held(H100, {}) == {}


@pytest.mark.skipif(not KERNELS, reason="no CUDA kernels in this build")
def test_the_table_of_the_docs_is_what_info_prints() -> None:
    built = {k["architecture"] for k in info._report()}
    if built != set(build.ARCHITECTURES):
        pytest.skip(f"built for {sorted(built)} only")
    _, *lines = info.residency_table(8192, 128256, "bfloat16")
    assert len(lines) == 2 + 3 * len(build.ARCHITECTURES)
    for line in lines:
        assert line in DOCS.read_text().splitlines()
