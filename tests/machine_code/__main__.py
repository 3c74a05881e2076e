"""Prints what the hot paths of this build's kernels cost; further arguments are other binaries."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmloss_ext.ops.library import LIBRARY

from . import disassembly
from .budgets import (
    MULTIPLY,
    REDUCE,
    WRITE,
    element_bytes_of,
    path_of,
    program_of,
)
from .paths import before_bulk

HEAD = ("kernel", "sm", "registers", "path", "instructions", "MUFU", "vectors", "branches", "trips")
NOTE = """
Of the hot path: instructions and MUFU operations for each element, 16-byte vectors and branches an
iteration. Trips: loads that every warp waits for, one after the other, before its first bulk load,
and the longest chain of loads of which each has its address from the one before."""


def registers() -> dict[tuple[str, str], int]:
    """Of each kernel and architecture, by the compiler's report."""
    report = LIBRARY.parent / "cuda_kernels.json"
    kernels = json.loads(report.read_text()) if report.exists() else []
    return {(k["kernel"], k["architecture"]): k["registers"] for k in kernels}


def table(binaries: list[Path]) -> list[tuple[str, ...]]:
    """One row for each hot path."""
    known = registers()
    rows: list[tuple[str, ...]] = []
    kernels = {kernel[:2]: kernel for binary in binaries for kernel in disassembly.read(binary)}
    for kernel in sorted(kernels.values(), key=lambda k: (k.name, int(k.architecture))):
        size = element_bytes_of(kernel)
        if size is None or size == 8:
            continue
        works = (MULTIPLY,) if kernel.name.startswith("scale") else (REDUCE, WRITE)
        for work in works:
            path = path_of(kernel, work, size)
            if path is None:
                continue
            elements = path.elements(size)
            before = before_bulk(program_of(kernel))
            rows.append((
                kernel.name,
                kernel.architecture,
                str(known.get(kernel[:2], "-")),
                "write" if work.stores else "reduce",
                f"{len(path.code) / elements:.2f}",
                f"{path.count('MUFU') / elements:.2f}",
                str(path.vectors),
                str(path.count("BRA")),
                "-" if before is None else f"{before.waits} {before.chain}",
            ))  # fmt: skip
    return rows


def main() -> int:
    """Prints the table."""
    if reason := disassembly.missing():
        print(reason, file=sys.stderr)
        return 1
    rows = [HEAD, *table([Path(name) for name in sys.argv[1:]] or [LIBRARY])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells))
    print(NOTE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
