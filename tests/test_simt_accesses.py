"""Every access of the emulated kernels is seen: bytes are counted, and races are found.

How, and what counts as a race, stands in tests/simt/accesses.h. Two types of logits have every kind
of misalignment between them, and both types of arithmetic.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("pybind11")
from oracle import Problem  # noqa: E402
from simt import build  # noqa: E402
from simt.compact import find_fault  # noqa: E402
from simt.harness import STATISTICS, Case, library  # noqa: E402
from simt.memory import GuardedMemory  # noqa: E402
from simt.places import with_lines  # noqa: E402

pytestmark = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")

SIZE = {"bfloat16": 2, "float64": 8}
DTYPES = list(SIZE)
PLAIN = ("log_prob", "lse")
BARRIERS = ("none", "shuffle", "relaxed", "warp", "block", "cluster")
ORDERS = ("write_read", "read_write", "write_write")


@pytest.fixture(scope="module")
def races() -> Any:
    return build.load(
        build.Library("simt_races", build.HERE / "races.cpp", build.SEEN, pybind=True)
    )


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    libraries = [library(dtype, build.SEEN, name=f"seen_{dtype}") for dtype in DTYPES]
    build.build_all(libraries)
    return {dtype: build.load(lib) for dtype, lib in zip(DTYPES, libraries, strict=True)}


@pytest.fixture(params=DTYPES)
def dtype(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def kernels(modules: dict[str, Any], dtype: str) -> Any:
    module = modules[dtype]
    module.set_schedule(0, 0)
    return module


# Threads that are so far apart need this barrier, or one of a larger group.
@pytest.mark.parametrize(("apart", "needed"), [(1, "warp"), (32, "block"), (64, "cluster")])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_orders_the_threads_of_its_group(
    races: Any, barrier: str, order: str, apart: int, needed: str
) -> None:
    number = BARRIERS.index(barrier)
    arguments = (number, ORDERS.index(order), apart, np.zeros(128, np.float32))
    if number >= BARRIERS.index(needed):
        races.meet(*arguments)
    else:
        with pytest.raises(RuntimeError, match="with no barrier between") as error:
            races.meet(*arguments)
        race, *_ = with_lines(str(error.value), races.__file__).split("; block")
        assert race.count("(races.cpp:") == 2


def test_nothing_orders_blocks_without_a_cluster(races: Any) -> None:
    out = np.zeros(1, np.float32)
    races.forget_all()
    races.watch("out", out.ctypes.data, out.nbytes)
    races.write_one(1, out)
    races.write_one(1, out)  # one launch after the other
    with pytest.raises(RuntimeError, match="block 1 writes byte 0 of out .* block 0 has written"):
        races.write_one(2, out)


# What is done with an asynchronous copy, and what is wrong with it.
USES = {
    "after_wait": None,
    "before_wait": "reads byte 0 of the shared memory .* a copy writes that was not waited for",
    "by_others": "thread 1 of block 0 reads .* a copy writes that was not waited for",
    "by_others_after_sync": None,
    "by_others_after_wait": None,
    "of_overwritten": "writes byte 0 of data .* of which a copy by thread 0 .* was used",
    "none_of_overwritten": None,
    "none_of_overwritten_element": None,
    "before_overwriting": "writes byte 0 of data .* of which a copy by thread 0 .* was used",
    "of_unwritten": "reads byte 0 of the shared memory of block 0 .* nobody has written",
}


@pytest.mark.parametrize("use", USES)
def test_a_copy_arrives_when_it_was_waited_for(races: Any, use: str) -> None:
    memory = GuardedMemory(32 * 4)  # which ends at a multiple of 16
    data, out = memory.bytes.view(np.float32), np.zeros(32, np.float32)
    races.forget_all()
    races.watch("data", data.ctypes.data, data.nbytes)
    number = list(USES).index(use)
    if USES[use] is None:
        races.copy(number, data, out)
    else:
        with pytest.raises(RuntimeError, match=USES[use]):
            races.copy(number, data, out)


def test_a_copy_of_what_was_overwritten_before_is_unknown(races: Any) -> None:
    memory = GuardedMemory(32 * 4)
    data, out = memory.bytes.view(np.float32), np.zeros(32, np.float32)
    races.forget_all()
    races.watch("data", data.ctypes.data, data.nbytes)
    races.set_schedule(1, 0)  # the highest lane first
    try:
        with pytest.raises(RuntimeError, match="a copy brought whose source was overwritten"):
            races.copy(list(USES).index("of_overwritten"), data, out)
        races.copy(list(USES).index("none_of_overwritten_element"), data, out)
    finally:
        races.set_schedule(0, 0)


@pytest.mark.parametrize(("dtype", "schedule"), [("bfloat16", "forward"), ("float64", "reverse")])
def test_no_kernel_races(kernels: Any, dtype: str, schedule: str) -> None:
    """Every kernel, task, cluster size, and way to share rows, over few and small shapes."""
    fault = find_fault(kernels, dtype, [schedule])
    assert fault is None, with_lines(fault, kernels.__file__)


def problem(columns: int, rows: int = 3, **options: Any) -> Problem:
    """Of more than one row, the second is ignored."""
    rng = np.random.default_rng(columns)
    target = rng.integers(0, columns, rows)
    target[1:2] = -100
    return Problem(rng.normal(0, 4, (rows, columns)), target, **options)


def pass_every_barrier(kernels: Any, dtype: str) -> str:
    """Of the kernels' sources; returns what the emulator says of it."""
    tile, weight = kernels.tile_columns, np.linspace(0.5, 3, 9)
    small_blocks = (1, 24 << 10, 1)
    try:
        Case(kernels, dtype, problem(61)).row_grad(grad_loss=np.ones(3))
        Case(kernels, dtype, problem(5 * tile)).row_grad(grad_loss=np.ones(3), with_scale=True)
        Case(kernels, dtype, problem(9, 70, weight=weight, z_loss=0.1)).loss("mean")
        Case(kernels, dtype, problem(9, 70, weight=weight, z_loss=0.1)).mean_loss()
        for skew in (0, 1):
            Case(kernels, dtype, problem(17 * tile + 5), skew, device=(1, 16 << 10, 8)).fused()
            Case(kernels, dtype, problem(5 * tile + 5), skew, device=small_blocks).fused()
    except RuntimeError as error:
        return str(error)
    return ""


KINDS = ("block_sync", "warp_sync", "cluster_sync", "wait_for")
"""The two halves of the cluster's barrier order no memory: without them, other tests fail."""


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_every_barrier_taken_away_is_a_race(kernels: Any, dtype: str) -> None:
    assert pass_every_barrier(kernels, dtype) == ""
    sites = [site for site in kernels.sites() if site[0] in KINDS]
    in_sources = [
        (kind, path.name, number)
        for path in (build.ROOT / "csrc" / "cuda" / "kernels").glob("*.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for kind in KINDS
        if f"simt::{kind}(" in line
    ]
    assert sorted(in_sources) == sorted((kind, file, line) for kind, file, line, _ in sites)
    not_found = []
    for kind, *place in sites:
        kernels.set_mutation(*place)
        fault = pass_every_barrier(kernels, dtype)
        if not re.search(
            "no barrier|not waited for|have arrived|nobody has written|not been started", fault
        ):
            not_found.append((kind, *place, fault))
    kernels.set_mutation("", 0, 0)
    assert not not_found


# What is read and written, in bytes. Only L1 is asked twice: it has what a lane of the same warp
# has read a moment ago, which `fetched` leaves out. A skewed vector is made of two aligned ones, of
# which the second is the next lane's first.


def logits_of(case: Case, launch: dict[str, Any]) -> list[dict[str, int]]:
    return [launch[f"logits {row}"] for row in range(case.problem.rows)]


SHAPES = [(61, (1, 227 << 10, 1)), (9, (4, 227 << 10, 1)), (-9, (1, 1, 1)), (-9, (4, 227 << 10, 1))]


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("wanted", [PLAIN, STATISTICS])
@pytest.mark.parametrize(("columns", "device"), SHAPES)
def test_statistics_read_each_row_once(
    kernels: Any, dtype: str, columns: int, device: Any, wanted: Any, skew: int
) -> None:
    columns = columns if columns > 0 else -columns * kernels.tile_columns + 5
    case = Case(kernels, dtype, problem(columns), skew, device=device)
    case.row_stats(wanted)
    first, *merges = kernels.launches()
    row, size = columns * SIZE[dtype], SIZE[dtype]
    # Again: the vector on either side of a chunk's end; the target's logit, by each warp, of which
    # one has it in its chunk.
    warps = case.told["warps_per_row"] * case.told["blocks_per_row"]
    again = 16 * case.told["chunks"] + (warps + 1) * size
    for number, traffic in enumerate(logits_of(case, first)):
        read = 0 if number == 1 else row
        assert traffic["distinct_read"] == read
        assert read <= traffic["fetched"] <= read + (again if read else 0)
        assert traffic["read"] <= 2 * read + 32 * warps * size
        assert traffic["written"] == 0
    # A second kernel merges split rows, and reads no more of them than the target.
    assert len(merges) == (case.told["blocks_per_row"] > 1)
    for merge in merges:
        assert [t["distinct_read"] for t in logits_of(case, merge)] == [size, 0, size]


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("elsewhere", [None, 0, 1])
@pytest.mark.parametrize(("columns", "device"), SHAPES)
def test_a_gradient_reads_each_row_once_and_writes_it_once(
    kernels: Any, dtype: str, columns: int, device: Any, elsewhere: int | None, skew: int
) -> None:
    columns = columns if columns > 0 else -columns * kernels.tile_columns + 5
    case = Case(kernels, dtype, problem(columns, 4), skew, device=device)
    case.row_grad(grad_loss=np.array([1.0, 1.0, 0.0, 0.5]), skew=elsewhere)  # rows 1, 2: none
    launch = kernels.launches()[-1]
    row, size = columns * SIZE[dtype], SIZE[dtype]
    for number, traffic in enumerate(logits_of(case, launch)):
        read = 0 if number in (1, 2) else row
        if elsewhere is None:
            # The target's logit may be read once more, by the thread that writes its gradient.
            assert traffic["distinct_read"] == read
            assert read <= traffic["fetched"] <= traffic["read"] <= (read + size if read else 0)
        else:
            # The last skewed vector of a row may have a few bytes of the next row. And there is the
            # vector that the last lane of one warp and the first of another need.
            assert read <= traffic["distinct_read"] < read + 16
            assert traffic["read"] < 2 * read + 16
            assert traffic["fetched"] < read + 16 * (read // (32 * 16) + 2)
        name = f"logits {number}" if elsewhere is None else f"grad {number}"
        assert launch[name]["distinct_written"] == row
        # The target's column is written like any other first.
        assert launch[name]["written"] == row + (size if read else 0)


DEVICES = {"whole": (1, 227 << 10, 1), "cluster": (1, 16 << 10, 8), "part": (1, 24 << 10, 1)}


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("staged", DEVICES)
def test_fused_reads_what_it_keeps_once(kernels: Any, dtype: str, staged: str, skew: int) -> None:
    columns = 17 * kernels.tile_columns
    token_weight = np.array([1.0, 1.0, 0.0, 1.0])
    p = dataclasses.replace(problem(columns, 4), token_weight=token_weight)  # rows 1, 2: none
    case = Case(kernels, dtype, p, skew, device=DEVICES[staged])
    case.fused()
    (launch,) = kernels.launches()
    row, size = columns * SIZE[dtype], SIZE[dtype]
    kept = min(case.told["staged_columns"] * case.told["cluster"], columns) * size
    if case.told["holds"]:  # the rest, in registers
        kept = row
    assert case.told["holds"] == (dtype == "bfloat16" and skew == 0 and staged != "whole")
    assert (kept == row) == (staged != "part" or case.told["holds"])
    warps = case.told["threads"] // 32 * case.told["cluster"]
    # What is not kept is read as statistics and gradients are. Each warp reads the target's logit,
    # and so does the thread that writes its gradient.
    again = (warps + 2) * size + (0 if kept == row else 16 * 17)
    for number, traffic in enumerate(logits_of(case, launch)):
        assert traffic["distinct_written"] == row
        if number in (1, 2):  # one chunk by each warp, before it knows, of whole vectors
            assert traffic["fetched"] < warps * (case.told["chunk_columns"] * size + 16)
            assert traffic["written"] == row
            continue
        assert traffic["distinct_read"] == row
        assert 2 * row - kept <= traffic["fetched"] <= 2 * row - kept + again
        assert traffic["written"] == row + size


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scaling_by_one_touches_no_row(kernels: Any, dtype: str, factor: float) -> None:
    case = Case(kernels, dtype, problem(5 * kernels.tile_columns + 3))
    case.scaled(factor)
    row = 0 if factor == 1 else (5 * kernels.tile_columns + 3) * SIZE[dtype]
    for traffic in logits_of(case, kernels.launches()[0]):
        assert (traffic["read"], traffic["written"]) == (row, row)


def test_a_loss_reads_numbers_and_no_row(kernels: Any, dtype: str) -> None:
    case = Case(kernels, dtype, problem(9, 1200))
    case.loss("mean")
    (reduce_loss,) = kernels.launches()
    real = 8 if dtype == "float64" else 4
    assert reduce_loss["logits"]["read"] == 0
    assert reduce_loss["log_prob"]["distinct_read"] <= 1200 * real
    assert reduce_loss["log_prob"]["read"] == reduce_loss["log_prob"]["distinct_read"]
    assert reduce_loss["loss"]["written"] == real
