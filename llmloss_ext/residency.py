"""How many blocks of the plain kernels a multiprocessor holds, from a launch plan and registers.

A block needs threads, registers and shared memory; what runs out first limits how many are there
at once, and with them the loads that are on their way while others compute.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .chips import Chip

REGISTERS = 65536
"""Of a multiprocessor of every chip here. A warp takes a multiple of 256 of them."""
RESERVED_SHARED = 1024
"""Bytes of a block, for the system."""
MOST_BLOCKS = {"80": 32, "90": 32, "100": 32, "120": 24}
TYPES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "float", "float64": "double"}
HOLDING_THREADS = 640
"""Of a block of the fused kernel that keeps a part of its row in registers."""


class Residency(NamedTuple):
    """Of a kernel on a chip."""

    chip: str
    kernel: str
    cluster: int
    """Blocks that share a row and its memory; 1 where they need not run at once."""
    threads: int
    """Of a block."""
    shared_bytes: int
    """Of a block."""
    registers: int
    """Of a thread."""
    blocks: int
    """Of a multiprocessor at once."""
    limit: str
    """What there is no more of: threads, registers, shared memory, or blocks."""


def residency(chip: Chip, plan: str, dtype: str, report: list[dict[str, Any]]) -> list[Residency]:
    """What a multiprocessor holds of row_stats, row_grad and fused, for plain options.

    Args:
        chip: The GPU.
        plan: Of the operator launch_plan for its limits.
        dtype: Of the logits.
        report: The compiler's, as in cuda_kernels.json. Kernels that were not built for the chip
            are left out.
    """
    known = {k["kernel"]: k for k in report if k["architecture"] == chip.architecture}
    lines = dict(line.split(": ", 1) for line in plan.splitlines())
    found = []
    for name in ("row_stats", "row_grad", "fused"):
        launch = re.search(r"blocks of (\d+) threads; (\d+) bytes of dynamic", lines[name])
        if launch is None:  # not fused
            continue
        threads, dynamic = int(launch[1]), int(launch[2])
        holds = "true" if threads >= HOLDING_THREADS else "false"
        tasks = holds if name == "fused" else "0u"
        kernel = known.get(f"{name}_kernel<{TYPES[dtype]}, {tasks}>")
        if kernel is None:
            continue
        cluster = re.search(r"a cluster of (\d+)", lines[name])
        warps = threads // 32
        shared = dynamic + kernel["shared_bytes"]
        of_warp = -(-kernel["registers"] * 32 // 256) * 256
        room = {
            "shared memory": chip.shared_per_multiprocessor // (shared + RESERVED_SHARED),
            "registers": REGISTERS // of_warp // warps,
            "threads": chip.max_threads // threads,
            "blocks": MOST_BLOCKS[chip.architecture],
        }
        limit = min(room, key=room.__getitem__)
        found.append(
            Residency(chip.name, name, int(cluster[1]) if cluster else 1, threads, shared,
                      kernel["registers"], room[limit], limit)
        )  # fmt: skip
    return found


def table(rows: list[Residency]) -> list[str]:
    """A table in Markdown, which people can read as it is: a line for each kernel and chip."""
    head = ("GPU", "kernel", "cluster", "threads", "shared", "registers", "blocks", "limited by")
    cells = [(*(str(field) for field in row),) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    is_text = [i in (0, 1, 7) for i in range(8)]

    def line(row: tuple[str, ...]) -> str:
        padded = [c.ljust(w) if text else c.rjust(w)
                  for c, w, text in zip(row, widths, is_text, strict=True)]  # fmt: skip
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if text else "-" * (w - 1) + ":"
            for w, text in zip(widths, is_text, strict=True)]  # fmt: skip
    return [line(head), f"| {' | '.join(rule)} |", *map(line, cells)]
