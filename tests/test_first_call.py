"""The first call of a process: within a graph's capture, or with a driver that is too old.

The sources that ask CUDA's run-time library run here with another one in its place, which has no
device and tells what was asked (tests/fake_runtime). tests/test_cuda.py captures a first call.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from test_cuda_build import ROOT, build

FAKE = Path(__file__).parent / "fake_runtime"
OUT_OF_MEMORY, INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE, UNSUPPORTED_PTX = 2, 35, 209, 222


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("first_call")
    command = [nvcc, "-std=c++20", "-O0", "-arch=sm_90", "--expt-relaxed-constexpr", "-cudart=none"]
    sources = [ROOT / "csrc/cuda/launch/device.cu", FAKE / "first_call.cu", FAKE / "runtime.cpp"]
    made = folder / "first_call"
    subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(made)], check=True
    )
    return made


def told(program: Path, *arguments: object, fails_with: int = 0) -> list[str]:
    environment = os.environ | {"FAKE_ERROR": str(fails_with)}
    done = subprocess.run([str(program), *map(str, arguments)], env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_first_call_asks_nothing_that_a_capture_forbids(program: Path) -> None:
    """Kernels are loaded when they are first asked for, and memory is allocated for them."""
    *lines, control = told(program)
    assert "limits: error 0, 132 multiprocessors, clusters of 16" in lines
    assert lines.count("launch: error 0") == 3
    asked = [line for line in lines if line.startswith("cuda")]
    assert {line.partition(":")[0] for line in asked} == {
        "cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters", "cudaLaunchKernelExC",
    }  # fmt: skip
    assert not [line for line in asked if not line.endswith(": allowed")]
    # Afterwards a thread is as careful as before.
    assert control == "by itself: cudaFuncSetAttribute: breaks a capture"


def test_nothing_is_launched_where_the_device_cannot_be_asked(program: Path) -> None:
    (line,) = told(program, fails_with=INSUFFICIENT_DRIVER)
    assert line.startswith("limits: error 35")


@pytest.mark.parametrize("error", [INSUFFICIENT_DRIVER, UNSUPPORTED_PTX])
def test_a_driver_that_is_too_old_is_told(program: Path, error: int) -> None:
    (line,) = told(program, "error", error)
    needed = re.escape(build.toolkit_version())
    assert re.search(rf"needs a driver for CUDA {needed}, and this one is for 12\.4", line)
    assert "update the driver" in line


def test_a_device_without_code_is_told(program: Path) -> None:
    (line,) = told(program, "error", NO_KERNEL_IMAGE)
    assert "LLMLOSS_CUDA_ARCHS=93 " in line


def test_other_errors_are_left_to_their_meaning(program: Path) -> None:
    assert told(program, "error", OUT_OF_MEMORY) == ["(meaning 2)"]
