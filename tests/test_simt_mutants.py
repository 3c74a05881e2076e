"""The emulated tests can fail: every mutant of the kernels is caught.

A barrier whose removal nobody notices is either not needed, or not tested.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("pybind11")
from simt import build  # noqa: E402
from simt.compact import find_fault  # noqa: E402
from simt.harness import library  # noqa: E402

pytestmark = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")

DTYPE = "bfloat16"  # eight columns a vector, and every kind of misalignment
# A file of csrc/cuda, a text that it holds once, and what takes its place.
MUTANTS = {
    "a skewed load without its second half": (
        "device/vector.cuh",
        "simt::load_words(aligned + vector_bytes)",
        "low",
    ),
    "no tail": ("device/vector.cuh", "singles = head + (count - tail);", "singles = head;"),
    "no head": ("device/vector.cuh", "i < head ? i :", "i < head ? tail :"),
    "a vector too many": (
        "device/vector.cuh",
        "vectors = (count - head) / Vector<T>::size;",
        "vectors = (count - head) / Vector<T>::size + 1;",
    ),
    "a batch read beyond the end": (
        "kernels/chunks.cuh",
        "if (batch + batch_columns<T> <= end &&",
        "if (batch < end &&",
    ),
    "a vector counted beyond the end": (
        "device/vector.cuh",
        "if (column + V::size <= to &&",
        "if (column < to &&",
    ),
    "the last column not counted": (
        "device/vector.cuh",
        "if (column + i < to) elements",
        "if (column + i < to - 1) elements",
    ),
    "a missing column asked for": (
        "kernels/chunks.cuh",
        "return column < end;",
        "return true;",
    ),
    "no order among equal logits": (
        "kernels/chunks.cuh",
        "const bool is_before = column + i < target;",
        "const bool is_before = false;",
    ),
    "sums not moved to a new maximum": (
        "kernels/chunks.cuh",
        "return factor;",
        "return Real(1);",
    ),
    "the target's column with another thread": (
        "device/vector.cuh",
        "return int(unsigned(unit) % unsigned(threads));",
        "return int(unsigned(unit + 1) % unsigned(threads));",
    ),
    "the last chunk not merged": ("kernels/chunks.cuh", "i < count;", "i < count - 1;"),
    "the last chunk not reduced": (
        "kernels/row_stats.cuh",
        "chunk < chunks.count; chunk += share.warps()",
        "chunk < chunks.count - 1; chunk += share.warps()",
    ),
    "rows beyond the last": (
        "kernels/row_stats.cuh",
        "if (row >= in.rows) return;  // a warp",
        "// a warp",
    ),
    "the target's column as any other": (
        "kernels/gradient.cuh",
        "if (has_target) from_real",
        "if (false) from_real",
    ),
    "no zeros behind the vocabulary": (
        "kernels/fused.cuh",
        "if (rank == blocks - 1) write_zeros",
        "if (rank == blocks) write_zeros",
    ),
    "states for the own block only": (
        "kernels/fused.cuh",
        "if (simt::lane() < blocks) *simt::peer_shared",
        "if (simt::lane() == rank) *simt::peer_shared",
    ),
    "a row of losses too many": (
        "kernels/reduce.cuh",
        "if (row < rows.rows) loss[row]",
        "if (row <= rows.rows) loss[row]",
    ),
    "a chunk too few": (
        "launch/plan.h",
        "return {columns, int(ceil_div(vocab_size, columns))};",
        "return {columns, int(std::max<int64_t>(vocab_size / columns, 1))};",
    ),
}


@pytest.fixture(scope="module")
def kernels() -> Any:
    return build.load(library(DTYPE))


def test_the_kernels_themselves_have_no_fault(kernels: Any) -> None:
    assert find_fault(kernels, DTYPE) is None


def test_every_barrier_and_shuffle_is_needed_and_tested(kernels: Any) -> None:
    """Each wait in the source is taken away in turn, each shuffle returns the own value."""
    assert find_fault(kernels, DTYPE) is None
    sites = kernels.sites()
    kinds = {kind for kind, *_ in sites}
    assert kinds == {"block_sync", "cluster_sync", "cluster_arrive", "cluster_wait", "shuffle_xor",
                     "wait_for_copies"}  # fmt: skip
    not_caught = []
    for kind, *place in sites:
        kernels.set_mutation(*place)
        if find_fault(kernels, DTYPE) is None:
            not_caught.append((kind, *place))
    kernels.set_mutation("", 0, 0)
    assert not not_caught
    assert len(sites) >= 20


def mutant(name: str, folder: Path) -> build.Library:
    file, text, other = MUTANTS[name]
    root = folder / name.replace(" ", "-").replace("'", "")
    shutil.copytree(build.ROOT / "csrc", root / "csrc", ignore=shutil.ignore_patterns("*.py"))
    path = root / "csrc" / "cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file} holds the text {source.count(text)} times: {text}"
    path.write_text(source.replace(text, other))
    # No need of speed, nor of tidiness.
    number = list(MUTANTS).index(name)
    return library(DTYPE, ("-O1", "-w"), root, f"simt_mutant_{number}")


def test_every_mutant_is_caught(tmp_path: Path) -> None:
    libraries = [mutant(name, tmp_path) for name in MUTANTS]
    build.build_all(libraries)
    not_caught = [name for name, lib in zip(MUTANTS, libraries, strict=True)
                  if find_fault_aside(lib) is None]  # fmt: skip
    assert not not_caught


def find_fault_aside(lib: build.Library) -> str | None:
    """In a process of its own: a mutant may break more than its launch."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        fault = find_fault(build.load(lib), DTYPE)
        os.write(writer, b"" if fault is None else b"!")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return None if told == b"" and status == 0 else "caught"
