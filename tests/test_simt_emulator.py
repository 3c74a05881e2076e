"""The emulator of tests/simt itself: right kernels pass, wrong ones are caught."""

from __future__ import annotations

from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("pybind11")
from simt import build  # noqa: E402
from simt.memory import GuardedMemory  # noqa: E402

pytestmark = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")

SCHEDULES = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "random again": (2, 2)}


@pytest.fixture(scope="module")
def module() -> Any:
    library = build.Library("simt_selftest", build.HERE / "selftest.cpp", pybind=True)
    return build.load(library)


@pytest.fixture
def kernels(module: Any) -> Any:
    module.set_schedule(*SCHEDULES["forward"])
    return module


def under_every_schedule(kernels: Any, run: Any) -> list[Any]:
    results = []
    for schedule, seed in SCHEDULES.values():
        kernels.set_schedule(schedule, seed)
        results.append(run())
    return results


def block_sums(kernels: Any, first: bool, second: bool) -> tuple[list[np.ndarray], float]:
    numbers = np.arange(1, 1 + 3 * 128, dtype=np.float32)

    def run() -> np.ndarray:
        out = np.zeros(2, np.float32)
        kernels.block_sum(first, second, 128, numbers, out)
        return out

    return under_every_schedule(kernels, run), float(numbers.sum())


def test_a_reduction_with_its_barriers_is_right(kernels: Any) -> None:
    results, expected = block_sums(kernels, True, True)
    assert all((result == expected).all() for result in results)


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_a_missing_block_barrier_gives_a_wrong_sum(kernels: Any, first: bool, second: bool) -> None:
    results, expected = block_sums(kernels, first, second)
    assert any((result != expected).any() for result in results)


@pytest.mark.parametrize("sync", [True, False])
def test_warp_barrier(kernels: Any, sync: bool) -> None:
    lanes = np.arange(64).reshape(2, 32)

    def run() -> np.ndarray:
        out = np.zeros(64, np.float32)
        kernels.warp_rotate(sync, out)
        return out

    results = under_every_schedule(kernels, run)
    right = [np.array_equal(out, np.roll(lanes, -1, 1).ravel()) for out in results]
    assert all(right) if sync else not all(right)


def test_shuffles(kernels: Any) -> None:
    lane = np.arange(64)
    base = lane // 32 * 32
    down = np.where(lane % 32 + 3 < 32, lane + 3, lane)
    expected = np.stack([lane ^ 5, down, base + 7])

    def run() -> np.ndarray:
        out = np.zeros((3, 64), np.uint32)
        kernels.shuffles(out)
        return out

    for out in under_every_schedule(kernels, run):
        np.testing.assert_array_equal(out, expected)


def cluster_sums(kernels: Any, name: str, *syncs: bool) -> tuple[list[Any], np.ndarray]:
    def run() -> Any:
        out = np.zeros(8, np.float32)
        try:
            getattr(kernels, name)(*syncs, 4, out)
        except RuntimeError:
            return None
        return out

    return under_every_schedule(kernels, run), np.repeat([10.0, 26.0], 4)


@pytest.mark.parametrize(
    ("name", "syncs"),
    [("cluster_push", (True, True)), ("cluster_split", (True, True)), ("cluster_pull", (True,))],
)
def test_a_cluster_exchanges_through_shared_memory(kernels: Any, name: str, syncs: Any) -> None:
    results, expected = cluster_sums(kernels, name, *syncs)
    assert all(np.array_equal(out, expected) for out in results)


@pytest.mark.parametrize(
    ("name", "syncs"),
    [("cluster_push", (False, True)), ("cluster_push", (True, False)), ("cluster_pull", (False,)),
     ("cluster_split", (False, True)), ("cluster_split", (True, False))],
)  # fmt: skip
def test_a_missing_cluster_barrier_is_seen(kernels: Any, name: str, syncs: Any) -> None:
    results, expected = cluster_sums(kernels, name, *syncs)
    assert not all(out is not None and np.array_equal(out, expected) for out in results)


def test_a_deadlock_names_who_waits_where(kernels: Any) -> None:
    def run() -> np.ndarray:
        with pytest.raises(RuntimeError) as error:
            kernels.half_syncs()
        message = str(error.value)
        assert "threads 0-31 wait in block_sync (selftest.cpp:" in message
        assert "threads 32-95 have returned" in message
        return np.zeros(0)

    under_every_schedule(kernels, run)


def test_threads_must_meet_at_one_place(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="different places"):
        kernels.meet_apart()


def test_a_shuffle_needs_the_whole_warp(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="threads 0-2 wait in shuffle_xor .* have returned"):
        kernels.lane_missing(np.zeros(1, np.float32))


def test_shared_memory_ends_where_it_ends(kernels: Any) -> None:
    kernels.write_shared_at(39)
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernels.write_shared_at(40)


def test_unreadable_memory_ends_the_launch_and_not_the_process(kernels: Any) -> None:
    memory = GuardedMemory(100)
    out = np.zeros(1, np.uint8)
    memory.bytes[-1] = 7
    end = memory.bytes.ctypes.data + 100
    kernels.read_at(end - 1, out)
    assert out[0] == 7
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unreadable memory .* threads 0-0 at work"):
            kernels.read_at(end, out)


def test_vector_loads_must_be_aligned(kernels: Any) -> None:
    kernels.load_vector(64)
    with pytest.raises(RuntimeError, match="not aligned"):
        kernels.load_vector(72)
