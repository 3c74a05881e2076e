"""What can be said of the CUDA build without a GPU: it loads, is registered, and spills nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import llmloss_ext
from llmloss_ext.chips import A100
from llmloss_ext.cli import info, main
from llmloss_ext.ops.library import LIBRARY

ROOT = Path(__file__).parents[1]
REPORT = Path(llmloss_ext.__file__).parent / "cuda_kernels.json"
REGISTERS = 65536  # of a multiprocessor
OPERATORS = (
    "token_stats",
    "token_stats_backward",
    "token_stats_backward_",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "cross_entropy_fused_",
    "merge_shards",
    "scale_",
)


def load_build() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels_in(library: Path) -> set[str]:
    """The CUDA kernels in a library, as the compiler's report names them."""
    mangled = set(re.findall(rb"_ZN7llmloss4cuda\w+_kernel\w+", library.read_bytes()))
    if not mangled:
        return set()
    done = subprocess.run(["c++filt"], input=b"\n".join(mangled), capture_output=True, check=True)
    names = re.findall(r"llmloss::cuda::(\w+_kernel(?:<.*?>)?)\(", done.stdout.decode())
    return {name.replace("llmloss::", "") for name in names}


build = load_build()
KERNELS = kernels_in(LIBRARY)
# What was built decides, not what is installed: nvcc may be here and LLMLOSS_CUDA=0 have been said.
needs_cuda_build = pytest.mark.skipif(
    not KERNELS, reason=f"{LIBRARY.name} was built without CUDA kernels"
)


@needs_cuda_build
@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernels_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"llmloss::{name}", "CUDA")


def planned_threads(kernel: str, architecture: str) -> int:
    """Threads of a multiprocessor that a kernel must leave registers for: chunks.cuh has them."""
    if kernel.startswith(("reduce_loss", "denominator", "mean_loss", "sum_")):
        return 1024
    name, *parameters = kernel.replace(">", "").replace("<", ", ").split(", ")
    if name in ("scale_kernel", "merge_rows_kernel"):
        return 4 * 256
    if name == "merge_shards_kernel":
        return 2 * 256
    if name not in ("row_stats_kernel", "row_grad_kernel", "fused_kernel"):
        return 0
    if name == "fused_kernel":
        if parameters[1] == "true":  # it holds tiles in registers
            return 640
        one = parameters[0] == "double" or (parameters[0], architecture) == ("float", "80")
        return 384 * (1 if one else 2)
    tasks = int(parameters[1].rstrip("u"))
    transformed, entropy, order, rest = 1, 4, 8, 16
    if parameters[0] == "double":
        return 256 * (1 if tasks else 2)
    if tasks & rest or (tasks & order and name == "row_stats_kernel"):
        return 256 * 2
    if name == "row_grad_kernel":
        fewer = (architecture == "120" and tasks) or (architecture == "80" and tasks != transformed)
        return 256 * (3 if fewer else 4)
    if tasks == 0:
        return 256 * (3 if architecture == "80" else 4)
    spills = architecture == "80" and tasks & entropy and parameters[0] == "Half"
    return 256 * (2 if spills else 3)


@needs_cuda_build
def test_the_report_is_of_this_build() -> None:
    """One that an earlier build has left says nothing of what will run."""
    named = {kernel["kernel"] for kernel in json.loads(REPORT.read_text())}
    assert named - {""} == KERNELS  # "": in an anonymous namespace


@needs_cuda_build
def test_no_kernel_spills_and_each_has_its_occupancy() -> None:
    report = json.loads(REPORT.read_text())
    per_architecture = dict.fromkeys(build.ARCHITECTURES, 0)
    for kernel in report:
        per_architecture[kernel["architecture"]] += 1
        assert kernel["stack_bytes"] == kernel["spill_bytes"] == 0, kernel
        # Registers are handed out in units of 8 a thread.
        assert (
            -(-kernel["registers"] // 8)
            * 8
            * planned_threads(kernel["kernel"], kernel["architecture"])
            <= REGISTERS
        ), kernel
    # Sixteen for each type of logits (but float64 has no tiles in registers), five for each
    # type of statistics, and one that asks how large a cluster may be.
    assert per_architecture == dict.fromkeys(build.ARCHITECTURES, 16 * 4 - 1 + 5 * 2 + 1)


def test_an_older_compiler_leaves_newer_devices_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(nvcc))
    monkeypatch.delenv("LLMLOSS_CUDA_ARCHS", raising=False)
    command = build._command()
    assert "arch=compute_90,code=compute_90" in command
    assert not any("100" in word for word in command)
    assert "sm_100 is left out" in capsys.readouterr().out
    monkeypatch.setenv("LLMLOSS_CUDA_ARCHS", "75")
    with pytest.raises(SystemExit, match="for none of 75"):
        build._command()


def test_what_has_no_code_of_its_own_runs_the_ptx_of_10_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "known_architectures", lambda nvcc: [])
    monkeypatch.delenv("LLMLOSS_CUDA_ARCHS", raising=False)
    codes = re.findall(r"code=(\w+)", " ".join(build._command()))
    assert codes == ["sm_80", "sm_90", "sm_100", "compute_100"]
    monkeypatch.setenv("LLMLOSS_CUDA_ARCHS", "120")
    codes = re.findall(r"code=(\w+)", " ".join(build._command()))
    assert codes == ["sm_120", "compute_120"]


def test_the_report_is_read_as_ptxas_writes_it() -> None:
    text = (
        "ptxas info    : Compiling entry function '_Z1kIfLb1EEvT_' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kIfLb1EEvT_\n"
        "    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 80 registers, used 1 barriers, 512 bytes smem\n"
    )
    assert build.read_report(text) == [
        {
            "kernel": "k<float, true>",
            "architecture": "90",
            "registers": 80,
            "shared_bytes": 512,
            "stack_bytes": 16,
            "spill_bytes": 32,
        }
    ]


@needs_cuda_build
def test_info_lists_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "fused_kernel<BFloat16, true>" in out
    assert all(f"sm_{arch}" in out for arch in build.ARCHITECTURES)


def plan(rows: int, vocab_size: int, element_bytes: int, device: Any = info.H100) -> dict[str, str]:
    text = torch.ops.llmloss.launch_plan(rows, vocab_size, element_bytes, *device)
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_plans_of_common_sizes() -> None:
    large = plan(8192, 128256, 2)
    assert large["row_stats"].startswith("1 block of 4 warps for each row")
    assert large["fused"].startswith("one block")
    assert "8 of 63 chunks stay in registers" in large["fused"]
    assert "a cluster of 4" in plan(8192, 262144, 4)["fused"]
    assert large["vectors"].startswith("16 bytes, 8 columns")
    assert all("dynamic shared memory" in large[k] for k in ("row_stats", "row_grad", "fused"))
    # A factor of 1 need not start a block for each row.
    assert "528 blocks of 256 threads" in large["scale"]
    assert plan(100_000, 300, 2)["row_stats"].startswith("a warp for each row")


NO_CLUSTERS = A100.limits


@pytest.mark.parametrize(
    ("vocab_size", "element_bytes", "blocks"),
    [
        (4096, 2, 0),  # 8 KB: a warp
        (16384, 2, 1),
        (32767, 2, 1),
        (32768, 2, 2),  # 64 KB
        (128256, 2, 7),
        (128256, 4, 15),
        (262144, 4, 32),
    ],
)
def test_a_block_writes_at_least_32_kb_of_a_gradient(
    vocab_size: int, element_bytes: int, blocks: int
) -> None:
    share = plan(8192, vocab_size, element_bytes)["row_grad"]
    words = "a warp" if blocks == 0 else f"{blocks} block{'s' if blocks > 1 else ''} of"
    assert share.startswith(words)
    if blocks > 1:
        assert f"; {8192 * blocks} blocks of 256 threads" in share


@pytest.mark.parametrize(
    ("vocab_size", "element_bytes", "device", "cluster", "threads", "rest"),
    [
        # Three blocks of 256 threads fit in a multiprocessor, or two of 384.
        (32000, 2, info.H100, "one block", 256, "the row is kept there"),
        (50257, 2, info.H100, "one block", 384, "the row is kept there"),
        (128256, 2, info.H100, "one block", 640, "8 of 63 chunks stay in registers"),
        (1000, 2, info.H100, "one block", 32, "the row is kept there"),
        # Too little for a multiprocessor of its own.
        (65536, 2, info.H100, "a cluster of 2 blocks", 256, "the row is kept there"),
        (90112, 2, info.H100, "one block", 640, "the row is kept there"),
        (32000, 2, NO_CLUSTERS, "one block", 384, "the row is kept there"),
        (128256, 2, NO_CLUSTERS, "one block", 384, "23 of 63 chunks are read twice"),
        (262144, 4, NO_CLUSTERS, "one block", 384, "218 of 256 chunks are read twice"),
    ],
)
def test_blocks_that_keep_a_row_in_shared_memory(
    vocab_size: int, element_bytes: int, device: Any, cluster: str, threads: int, rest: str
) -> None:
    fused = plan(8192, vocab_size, element_bytes, device)["fused"].split("; ")
    assert fused[0] == f"{cluster} for each row"
    assert fused[1].endswith(f" blocks of {threads} threads")
    assert fused[3] == rest
    bytes_of_block = int(fused[2].split()[0])
    _, of_block, of_multiprocessor, _ = device
    assert bytes_of_block <= of_block
    if "kept" in rest and threads < 640:
        resident = 3 if threads < 384 else 2
        assert resident * (bytes_of_block + 1024) <= of_multiprocessor


def test_few_rows_do_not_run_on_one_multiprocessor() -> None:
    for vocab_size in (32000, 262144):
        few = plan(1, vocab_size, 2)
        assert not few["row_stats"].startswith("1 block")
        assert "second kernel" in few["row_stats"]
        assert not few["row_grad"].startswith("1 block")
    assert plan(1, 128256, 2)["fused"].startswith("a cluster of 16 blocks")
    assert plan(4, 32000, 2)["fused"].startswith("a cluster of 8 blocks")
    assert plan(1, 32000, 2, NO_CLUSTERS)["fused"] == "row_stats, then row_grad in place"
    assert plan(1, 262144, 2, NO_CLUSTERS)["fused"] == "row_stats, then row_grad in place"


def test_a_rows_chunks_do_not_depend_on_the_number_of_rows() -> None:
    for vocab_size in (1, 4096, 50257, 1 << 20):
        assert len({plan(n, vocab_size, 2)["chunks"] for n in (1, 7, 1000, 1 << 20)}) == 1
