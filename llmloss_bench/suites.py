"""The suites, which are lists of cases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from .cases import FROM_HIDDEN, OPTIONS, PASSES, Case

SUITES = ("smoke", "quick", "cpu", "steps", "gpu", "full")

_HALVES = ("float32", "bfloat16")
_CURVE_V = (1024, 4096, 16384, 65536, 262144)
_CURVE_N = (1, 16, 256, 4096)
_CURVE_D = (64, 256, 1024)
_SMALL_ROWS = (1, 16, 128)
_OPTIONS = tuple(name for name in OPTIONS if name not in ("plain", *FROM_HIDDEN))


def suite(name: str, has_gpu: bool) -> list[Case]:
    """The cases of a suite.

    Args:
        name: ``smoke`` (whether it works, within half a minute), ``quick`` (under two minutes on
            two cores), ``steps`` (a preference and a training step, float32 logits, small calls; on
            the GPU if there is one), ``cpu`` (what the README quotes), ``gpu``, or ``full``:
            a denser grid on the GPU if there is one, else on the CPU.
        has_gpu: Whether there is a CUDA device.

    Raises:
        ValueError: The name is unknown, or it is ``gpu`` and there is no CUDA device.
    """
    if name == "smoke":
        return list(_smoke("cuda" if has_gpu else "cpu"))
    if name == "quick":
        return list(_quick("cuda" if has_gpu else "cpu"))
    if name == "cpu":
        return list(_cpu())
    if name == "steps":
        return list(_steps_on_gpu() if has_gpu else _steps_on_cpu())
    if name in ("gpu", "full") and has_gpu:
        return list(_gpu()) + (list(_grid("cuda", 8192)) if name == "full" else [])
    if name == "full":
        return list(dict.fromkeys([*_cpu(), *_steps_on_cpu(), *_grid("cpu", 512)]))
    if name == "gpu":
        raise ValueError("the suite gpu needs a CUDA device, and torch sees none")
    raise ValueError(f"unknown suite {name}: {', '.join(SUITES)}")


def _smoke(device: str) -> Iterator[Case]:
    yield from _both_passes(64, 32000, "bfloat16", device)
    yield _linear(64, 128, 32000, "float32", device)
    yield _ignored(64, 32000, "bfloat16", 0.5, device)
    yield from _small(device)


def _quick(device: str) -> Iterator[Case]:
    for dtype in _HALVES:
        yield from _both_passes(256, 32000, dtype, device)
    for option in _OPTIONS:
        yield _option(256, 32000, "float32", option, device)
    yield _ignored(256, 32000, "float32", 0.5, device)
    yield _linear(512, 256, 32000, "float32", device)
    for option in ("plain", *FROM_HIDDEN):
        yield _linear(512, 256, 32000, "bfloat16", device, option=option)
    yield from _small(device)
    yield _preference(2, 64, 256, 32000, "float32", device)
    yield _training(2, 64, 64, 32000, "float32", device)
    yield from _curves("float32", device, (1024, 32000, 131072), (1, 128), 1 << 22)


def _cpu() -> Iterator[Case]:
    for rows, columns in ((2048, 32000), (1024, 128256)):
        for dtype in _HALVES:
            yield from _both_passes(rows, columns, dtype, "cpu")
    # Small enough that the gradient reuses memory: fresh pages, which larger cases need, cost more
    # than an option does, and their cost varies.
    yield Case("cross_entropy", "forward+backward", 128, 32000, "float32", figure="plain")
    for option in _OPTIONS:
        yield _option(128, 32000, "float32", option, "cpu")
    for passes in PASSES:
        yield _ignored(1024, 128256, "float32", 0.5, "cpu", passes)
    for dtype in _HALVES:
        yield _linear(2048, 768, 50257, dtype, "cpu")
        yield _linear(2048, 768, 50257, dtype, "cpu", ignored=0.75)
    yield from _small("cpu")
    yield from _curves("float32", "cpu", _CURVE_V, _CURVE_N, 1 << 24)
    for features in _CURVE_D:
        yield _linear(1024, features, 32000, "float32", "cpu", figure="D")


def _gpu() -> Iterator[Case]:
    # The most important cases come first, because time on a GPU machine may run out.
    yield from _both_passes(8192, 128256, "bfloat16", "cuda")
    for option in ("plain", *FROM_HIDDEN):
        yield _linear(8192, 4096, 128256, "bfloat16", "cuda", option=option)
    for dtype in ("bfloat16", "float32"):
        for columns in (32000, 50257, 128256, 262144):
            if (columns, dtype) != (128256, "bfloat16"):
                yield from _both_passes(8192, columns, dtype, "cuda")
        # With few rows, each row is split over the device.
        for rows in (1, 16, 128):
            yield from _both_passes(rows, 128256, dtype, "cuda")
    for option in _OPTIONS:
        yield _option(8192, 128256, "bfloat16", option, "cuda")
    for passes in PASSES:
        yield _ignored(8192, 128256, "bfloat16", 0.5, "cuda", passes)
    yield from _small("cuda")
    yield from _steps_on_gpu()


def _steps_on_cpu() -> Iterator[Case]:
    """Yields what the suite cpu does not have, whose committed results are older."""
    for dtype in _HALVES:
        yield _preference(2, 512, 768, 128256, dtype, "cpu")
    yield _training(1, 512, 256, 131072, "float32", "cpu")
    for option in ("plain", *FROM_HIDDEN):
        yield _linear(2048, 768, 50257, "bfloat16", "cpu", option=option)
    yield from _small("cpu", rows=_SMALL_ROWS)


def _steps_on_gpu() -> Iterator[Case]:
    yield _preference(2, 512, 768, 128256, "bfloat16", "cuda")
    yield _preference(8, 1024, 4096, 128256, "bfloat16", "cuda")
    yield _training(4, 2048, 1024, 128256, "bfloat16", "cuda")
    yield from _small("cuda", rows=_SMALL_ROWS)


def _preference(
    sequences: int, length: int, features: int, columns: int, dtype: str, device: str
) -> Case:
    return Case("preference", "forward+backward", sequences * length, columns, dtype, features,
                device=device, figure="steps", sequences=sequences)  # fmt: skip


def _training(
    sequences: int, length: int, features: int, columns: int, dtype: str, device: str
) -> Case:
    return Case("training_step", "forward+backward", sequences * length, columns, dtype, features,
                device=device, figure="steps", sequences=sequences)  # fmt: skip


def _grid(device: str, rows: int) -> Iterator[Case]:
    """Yields every option with every dtype and size."""
    for columns in (32000, 50257, 128256):
        for dtype in ("float32", "bfloat16", "float16"):
            for option in ("plain", *_OPTIONS):
                yield _option(rows, columns, dtype, option, device)
            for share in (0.25, 0.75):
                yield _ignored(rows, columns, dtype, share, device)
    for features in _CURVE_D:
        for dtype in _HALVES:
            for share in (0.0, 0.75):
                yield _linear(rows, features, 50257, dtype, device, ignored=share, figure="D")
    yield from _curves("bfloat16", device, _CURVE_V, _CURVE_N, rows * 32768)


def _both_passes(rows: int, columns: int, dtype: str, device: str) -> Iterator[Case]:
    for passes in PASSES:
        yield Case("cross_entropy", passes, rows, columns, dtype, device=device)


def _option(rows: int, columns: int, dtype: str, option: str, device: str) -> Case:
    where: dict[str, Any] = {"device": device, "figure": "options"}
    return Case("cross_entropy", "forward+backward", rows, columns, dtype, option=option, **where)


def _ignored(
    rows: int, columns: int, dtype: str, share: float, device: str, passes: str = "forward"
) -> Case:
    where: dict[str, Any] = {"device": device, "figure": "ignored"}
    return Case("cross_entropy", passes, rows, columns, dtype, ignored=share, **where)


def _linear(
    rows: int, features: int, columns: int, dtype: str, device: str,
    ignored: float = 0.0, figure: str = "peers", option: str = "plain",
) -> Case:  # fmt: skip
    size = (rows, columns, dtype, features)
    figure = "ignored" if ignored and figure == "peers" else figure
    return Case("linear_cross_entropy", "forward+backward", *size, ignored=ignored, device=device,
                figure=figure, option=option)  # fmt: skip


def _small(device: str, rows: tuple[int, ...] = (8,)) -> Iterator[Case]:
    """Yields small calls, whose cost is overhead."""
    for n in rows:
        for passes in PASSES:
            yield Case("cross_entropy", passes, n, 1000, "float32", device=device, warm=True,
                       figure="small")  # fmt: skip


def _curves(
    dtype: str, device: str, columns: tuple[int, ...], rows: tuple[int, ...], elements: int
) -> Iterator[Case]:
    """Yields curves over V (with about ``elements`` logits), N and the CPU's threads."""

    def curve(n: int, v: int, figure: str, threads: int = 0) -> Case:
        return Case("cross_entropy", "forward+backward", n, v, dtype, device=device,
                    threads=threads, figure=figure)  # fmt: skip

    for v in columns:
        yield curve(max(elements // v, 1), v, "V")
    for n in rows:
        yield curve(n, 32000, "N")
    if device == "cpu":
        for threads in _thread_counts():
            yield curve(max(elements // 32000, 1), 32000, "threads", threads)


def _thread_counts() -> list[int]:
    """The powers of 2 below the number of cores, and that number."""
    cores = len(os.sched_getaffinity(0))
    powers = [2**k for k in range(cores.bit_length())]
    return sorted({n for n in powers if n < cores} | {cores})
