"""A model of how long the dense CUDA kernels take, from a chip's record and the launch plan.

A kernel is as slow as the slowest of three: its bytes at the memory's bandwidth, its instructions
at four warps a cycle and multiprocessor, its exponentials (MUFU) at sixteen. Before a row's bytes
flow, its block has started and waited for what it reads first; the rows that share a place on a
multiprocessor do so one after the other. And each kernel is launched.

What comes out is a prediction. It is within a twelfth of the times on one H200 that its
constants were fitted to (tests/test_roofline.py has them); of other chips it has not been held to
anything.
The constants are of the present kernels: tests/test_machine_code.py holds those that machine code
shows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .chips import Chip

MUFU_RATE = 16  # operations a cycle and multiprocessor
ISSUE_RATE = 4 * 32  # instructions of a thread, likewise


class Cost(NamedTuple):
    """What a kernel does for each element: instructions, and of those on the MUFU unit."""

    instructions: float
    mufu: float


# By the bytes of an element. The hot paths of the plain kernels, the most over the architectures.
REDUCE = {2: Cost(6.6, 1.07), 4: Cost(15.9, 1.07)}
WRITE = {2: Cost(5.8, 1.0), 4: Cost(12.6, 1.0)}


class Calibration(NamedTuple):
    """What no data sheet says, measured on one H200."""

    read_over_copy: float = 1.05
    """Bandwidth of reading alone, in that of copying."""
    kernel_seconds: float = 2.5e-6
    """A kernel that does nothing, besides the launch."""
    stats_row_seconds: float = 1.55e-6
    """From a block's start to its row's first bytes, and from the last to its end."""
    grad_row_seconds: float = 0.7e-6
    stats_unaligned: float = 1.03
    """As many times the seconds of rows that begin at a multiple of 16 bytes."""
    grad_over_copy: float = 1.018
    """Reading and writing, in the bandwidth of a copy."""
    fused_seconds: float = 1.185
    """As many times the seconds of a copy; a row is read, then written, and its blocks wait."""
    cluster_seconds: float = 0.0168
    """More of those for each doubling of the blocks that share a row."""
    fused_unaligned: float = 1.084
    threads: int = 768
    """Of a multiprocessor that run at once."""


CALIBRATION = Calibration()
LAUNCHES = {"forward": 2, "backward": 1, "fused": 3}
"""Kernels of a call, with those that sum the losses and the items. Rows that blocks share take one
more in forward."""


class Prediction(NamedTuple):
    """Of one call."""

    name: str
    """forward, backward (of another tensor) or fused (loss and gradient in place)."""
    seconds: float
    fraction: float
    """Of a copy's bandwidth, by the bytes that must be read and written."""
    limit: str
    """What takes longest: memory, issue, MUFU, or starting."""


def predict(chip: Chip, plan: str, rows: int, columns: int, element_bytes: int) -> list[Prediction]:
    """Predicts forward, backward, and both in one kernel, for plain options.

    Args:
        chip: The GPU.
        plan: Of the operator launch_plan for its limits.
        rows: Tokens.
        columns: Vocabulary size.
        element_bytes: 2 or 4.
    """
    lines = dict(line.split(": ", 1) for line in plan.splitlines())
    c = CALIBRATION
    size = rows * columns * element_bytes
    is_aligned = columns * element_bytes % 16 == 0
    elements = rows * columns
    read = size / (chip.copy_bandwidth * c.read_over_copy)
    copied = 2 * size / chip.copy_bandwidth
    is_split = "second kernel" in lines["row_stats"]

    def prediction(
        name: str, memory: float, costs: list[Cost], row_seconds: float, launches: int, moved: int
    ) -> Prediction:
        cycles = chip.multiprocessors * chip.clock
        parts = {
            "memory": memory,
            "issue": elements * sum(k.instructions for k in costs) / (cycles * ISSUE_RATE),
            "MUFU": elements * sum(k.mufu for k in costs) / (cycles * MUFU_RATE),
        }
        starting = row_seconds + launches * (chip.launch_seconds + c.kernel_seconds)
        seconds = max(parts.values()) + starting
        parts["starting"] = starting
        limit = max(parts, key=parts.__getitem__)
        return Prediction(name, seconds, moved / chip.copy_bandwidth / seconds, limit)

    stats = prediction(
        "forward",
        read * (1.0 if is_aligned else c.stats_unaligned),
        [REDUCE[element_bytes]],
        c.stats_row_seconds * _turns(chip, lines["row_stats"], rows),
        LAUNCHES["forward"] + is_split,
        size,
    )
    grad = prediction(
        "backward",
        copied / c.grad_over_copy,
        [WRITE[element_bytes]],
        c.grad_row_seconds * _turns(chip, lines["row_grad"], rows),
        LAUNCHES["backward"],
        2 * size,
    )
    if not re.search("kept there|stay in registers", lines["fused"]):  # the row is read twice
        seconds = stats.seconds + grad.seconds
        fraction = 2 * size / chip.copy_bandwidth / seconds
        return [stats, grad, Prediction("fused", seconds, fraction, grad.limit)]
    found = re.search(r"a cluster of (\d+)", lines["fused"])
    doublings = int(found[1]).bit_length() - 1 if found else 0
    slower = c.fused_seconds + c.cluster_seconds * doublings
    fused = prediction(
        "fused",
        copied * slower * (1.0 if is_aligned else c.fused_unaligned),
        [REDUCE[element_bytes], WRITE[element_bytes]],
        c.stats_row_seconds if rows < chip.multiprocessors else 0.0,  # else others run meanwhile
        LAUNCHES["fused"],
        2 * size,
    )
    return [stats, grad, fused]


def _turns(chip: Chip, share: str, rows: int) -> float:
    """How many rows, one after the other, a place on a multiprocessor has; at least one."""
    found = re.search(r"(\d+) blocks? of (\d+) warps? for each row", share)
    warps = int(found[1]) * int(found[2]) if found else 1
    at_once = chip.multiprocessors * CALIBRATION.threads / (32 * warps)
    return max(1.0, rows / at_once)


def lines(predicted: dict[str, list[Prediction]]) -> list[str]:
    """A table for people: a line for each chip.

    Args:
        predicted: By the chip's name.
    """
    first = next(iter(predicted.values()))
    text = ["prediction, in ms and in percent of a copy's bandwidth"]
    text.append(f"{'':<22}" + "".join(f"{p.name:>22}" for p in first))
    for name, predictions in predicted.items():
        cells = [f"{p.seconds * 1e3:.4f} {p.fraction:4.0%} {p.limit}" for p in predictions]
        text.append(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells))
    return text
