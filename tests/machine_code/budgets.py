"""What the machine code of each kernel may cost, in one table, and the checks against it.

A budget holds for the hot path of a kernel (see paths.py), on every architecture of the build
unless it names some. Numbers of instructions are for each element, rounded up from what nvcc 13.0
makes, so that a few instructions more are no failure and a lost unrolling is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from .arithmetic import arithmetic, opcodes, spelled
from .disassembly import Kernel
from .paths import HotPath, Work, before_bulk, hot_path, uses_local_memory
from .program import Program

ELEMENT_BYTES = {"BFloat16": 2, "Half": 2, "float": 4, "double": 8}
TYPES = "(?P<T>BFloat16|float)"
"""Of the logits. float16's kernels are bfloat16's but for the conversions; float64 is for checks,
and its exponential is a polynomial. Neither is read: disassembling takes long."""
NOT_READ = (b"4HalfE", b"row_stats_kernelId")

EXP = "MUFU.EX2"


@dataclass(frozen=True)
class Budget:
    kernel: str
    """A regular expression for the whole name, with a group T: the type of the logits."""
    work: Work
    vectors: int
    """Of sixteen bytes, that an iteration reads at least."""
    instructions: dict[int, float]
    """The most for each element, by the bytes of an element."""
    branches: int
    """The most in an iteration, with the one that goes back."""
    mufu: dict[str, tuple[float, dict[int, int]]] = field(default_factory=dict)
    """Exactly so many for each element, and besides in each iteration by the bytes of an element;
    by kind, and no other kind."""
    chain: int | None = None
    """The most loads, each with its address from the one before, up to the first bulk load."""
    waits: int | None = None
    """The most trips to memory that every warp must wait for before its first bulk load."""
    architectures: tuple[str, ...] = ()
    """None: all."""

    def holds_for(self, kernel: Kernel) -> bool:
        """Whether it says anything of this kernel."""
        known = not self.architectures or kernel.architecture in self.architectures
        return known and re.fullmatch(self.kernel, kernel.name) is not None

    @property
    def phase(self) -> str:
        """What the hot path does."""
        return "write" if self.work.stores else "reduce"


REDUCE = Work(EXP, 1, stores=False)
WRITE = Work(EXP, 1, stores=True)
MULTIPLY = Work("FMUL", 1, stores=True)
# The sums are moved to a new maximum; those of 16-bit logits are corrected for its rounding.
SUM_MUFU = {"EX2": (1.0, {2: 2, 4: 1})}
GRAD_MUFU = {"EX2": (1.0, {2: 0, 4: 0})}

# The numbers in a kernel's name are its tasks: csrc/cuda/kernels/tasks.cuh.
BUDGETS = (
    Budget(f"row_stats_kernel<{TYPES}, 0u>", REDUCE, vectors=4,
           instructions={2: 6.5, 4: 15.2}, branches=6, mufu=SUM_MUFU, chain=2, waits=0),
    Budget(f"row_stats_kernel<{TYPES}, 2u>", REDUCE, vectors=4,
           instructions={2: 7.7, 4: 16.0}, branches=6, mufu=SUM_MUFU, chain=2, waits=0),
    Budget(f"row_stats_kernel<{TYPES}, 6u>", REDUCE, vectors=4,
           instructions={2: 9.9, 4: 18.3}, branches=6, mufu=SUM_MUFU, chain=2, waits=0),
    Budget(f"row_stats_kernel<{TYPES}, 1u>", REDUCE, vectors=4,
           instructions={2: 7.8, 4: 15.5}, branches=8, mufu=SUM_MUFU, chain=2, waits=0),
    # The capped logits' branch has two MUFU more, the other none: these are not counted.
    Budget(f"row_stats_kernel<{TYPES}, 3u>", REDUCE, vectors=4,
           instructions={2: 8.9, 4: 17.2}, branches=8, chain=2, waits=0),
    Budget(f"row_stats_kernel<{TYPES}, 14u>", REDUCE, vectors=4,
           instructions={2: 14.5, 4: 23.5}, branches=10, mufu=SUM_MUFU, chain=2, waits=0),
    Budget(f"row_stats_kernel<{TYPES}, 15u>", REDUCE, vectors=4,
           instructions={2: 15.4, 4: 25.3}, branches=12, chain=3, waits=0),
    Budget(f"row_stats_kernel<{TYPES}, 31u>", REDUCE, vectors=4,
           instructions={2: 16.2, 4: 25.8}, branches=14, chain=2, waits=0),
    Budget(f"row_grad_kernel<{TYPES}, 0u>", WRITE, vectors=4,
           instructions={2: 5.8, 4: 12.8}, branches=2, mufu=GRAD_MUFU, chain=2, waits=1),
    # A capped logit that one thread reads again has MUFU of its own: these are not counted.
    Budget(f"row_grad_kernel<{TYPES}, 1u>", WRITE, vectors=4,
           instructions={2: 8.2, 4: 15.3}, branches=10, chain=3, waits=1),
    Budget(f"row_grad_kernel<{TYPES}, 31u>", WRITE, vectors=4,
           instructions={2: 18.5, 4: 34.8}, branches=65, chain=2, waits=1),
    Budget(f"row_grad_kernel<{TYPES}, 4u>", WRITE, vectors=4,
           instructions={2: 8.9, 4: 16.1}, branches=2, mufu=GRAD_MUFU, chain=2, waits=1),
    # What a fused kernel copies before it waits is not seen here: it is not loaded.
    Budget(f"fused_kernel<{TYPES}, true>", REDUCE, vectors=4,
           instructions={2: 5.9, 4: 14.1}, branches=3, mufu=SUM_MUFU, chain=2, waits=1),
    Budget(f"fused_kernel<{TYPES}, false>", REDUCE, vectors=4,
           instructions={2: 6.7, 4: 16.0}, branches=6, mufu=SUM_MUFU, chain=2, waits=1),
    Budget(f"fused_kernel<{TYPES}, (true|false)>", WRITE, vectors=4,
           instructions={2: 5.8, 4: 12.7}, branches=2, mufu=GRAD_MUFU),
    Budget(f"scale_kernel<{TYPES}>", MULTIPLY, vectors=1,
           instructions={2: 4.0, 4: 3.2}, branches=1, chain=1, waits=1),
)  # fmt: skip

# Kernels that give the same bits: the first, the second, and the work whose arithmetic is compared.
# They are of the same type and architecture.
EQUAL = (
    (f"row_stats_kernel<{TYPES}, 0u>", f"fused_kernel<{TYPES}, true>", REDUCE),
    (f"row_stats_kernel<{TYPES}, 0u>", f"fused_kernel<{TYPES}, false>", REDUCE),
    (f"row_grad_kernel<{TYPES}, 0u>", f"fused_kernel<{TYPES}, true>", WRITE),
    (f"row_grad_kernel<{TYPES}, 0u>", f"fused_kernel<{TYPES}, false>", WRITE),
)


@cache
def program_of(kernel: Kernel) -> Program:
    """Its control flow, found once."""
    return Program(kernel)


@cache
def path_of(kernel: Kernel, work: Work, element_bytes: int) -> HotPath | None:
    """Its hot path, found once."""
    return hot_path(program_of(kernel), work, element_bytes)


def element_bytes_of(kernel: Kernel) -> int | None:
    """By the type among a kernel's parameters."""
    found = re.search(rf"<({'|'.join(ELEMENT_BYTES)})\b", kernel.name)
    return None if found is None else ELEMENT_BYTES[found[1]]


def over_budget(kernel: Kernel, budget: Budget, element_bytes: int | None = None) -> list[str]:
    """One line for each limit that a kernel is over: which loop, what was found, and allowed."""
    size = element_bytes or element_bytes_of(kernel)
    assert size is not None, kernel.name
    where = f"{kernel}, {budget.phase}"
    path = path_of(kernel, budget.work, size)
    if path is None:
        return [
            f"{where}: no loop moves 16 bytes an instruction with {budget.work.opcode} for each "
            f"element, found {_loads(kernel)}"
        ]
    elements = path.elements(size)
    where += f", {path.place}"
    wrong = []

    def limit(what: str, found: float, allowed: float) -> None:
        if found > allowed:
            wrong.append(f"{where}: {found:g} {what}, allowed {allowed:g}")

    if path.vectors < budget.vectors:
        wrong.append(f"{where}: {path.vectors} vectors an iteration, wanted {budget.vectors}")
    limit("instructions an element", round(len(path.code) / elements, 2), budget.instructions[size])
    limit("branches an iteration", path.count("BRA"), budget.branches)
    if path.narrow:
        wrong.append(f"{where}: {path.narrow[0]} accesses fewer than 16 bytes, allowed none")
    if before_wanted := {
        kind: round(each * elements) + besides[size]
        for kind, (each, besides) in budget.mufu.items()
    }:
        for kind in sorted(before_wanted.keys() | path.mufu.keys()):
            found, wanted = path.mufu.get(kind, 0), before_wanted.get(kind, 0)
            if found != wanted:
                wrong.append(f"{where}: {found} MUFU.{kind} for {elements} elements, not {wanted}")
    before = before_bulk(program_of(kernel))
    if before is not None:
        if budget.chain is not None:
            limit("loads in a chain before the first bulk load", before.chain, budget.chain)
        if budget.waits is not None:
            limit("waits for memory before the first bulk load", before.waits, budget.waits)
    return wrong


def local_memory(kernel: Kernel) -> list[str]:
    """A line if a kernel has an array or a spilled register in local memory."""
    found = uses_local_memory(kernel)
    if not found:
        return []
    return [f"{kernel}: {len(found)} accesses to local memory, allowed none: {found[0]}"]


def unequal(
    first: Kernel, second: Kernel, work: Work, element_bytes: int | None = None
) -> list[str]:
    """A line if the arithmetic of two hot paths is not the same, vector by vector."""
    size = element_bytes or element_bytes_of(first)
    assert size is not None, first.name
    paths = path_of(first, work, size), path_of(second, work, size)
    if paths[0] is None or paths[1] is None:
        return [
            f"{k}: no hot path" for k, path in zip((first, second), paths, strict=True) if not path
        ]
    shapes = [{s: n / p.vectors for s, n in arithmetic(p).items()} for p in paths if p]
    if shapes[0] == shapes[1]:
        return []
    only = [sorted(s for s in a if a[s] != b.get(s)) for a, b in (shapes, shapes[::-1])]
    told = " against ".join(spelled(shape[0]) if shape else "nothing" for shape in only)
    counts = " and ".join(f"{dict(sorted(opcodes(p).items()))}" for p in paths if p)
    return [
        f"{first} and {second.name}, {'write' if work.stores else 'reduce'}: not the same "
        f"arithmetic: {told}; in all {counts}"
    ]


def pairs(kernels: Iterable[Kernel]) -> list[tuple[Kernel, Kernel, Work]]:
    """The kernels that EQUAL names, by type and architecture."""
    by_key: dict[tuple[str, str, str], Kernel] = {}
    kernels = list(kernels)
    for pattern in {pattern for entry in EQUAL for pattern in entry[:2]}:
        for kernel in kernels:
            if found := re.fullmatch(pattern, kernel.name):
                by_key[pattern, found["T"], kernel.architecture] = kernel
    return [
        (kernel, by_key[second, logits, architecture], work)
        for first, second, work in EQUAL
        for (pattern, logits, architecture), kernel in sorted(by_key.items())
        if pattern == first and (second, logits, architecture) in by_key
    ]


def _loads(kernel: Kernel) -> str:
    """The widths of the loads in its loops, for a message."""
    program = program_of(kernel)
    loops = [i for loop in program.loops for block in loop.blocks for i in program.code(block)]
    return ", ".join(sorted({i.opcode for i in loops if i.kind in ("LDG", "LD", "LDS")})) or "none"
