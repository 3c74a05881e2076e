"""The path that a long row takes through a loop again and again, and what comes before it.

A loop over a row's vectors holds more than that path: unaligned rows and the last columns have
branches of their own. Of all paths through a loop, the hot one reads the most vectors whose
elements it all processes, and among those has the fewest instructions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .disassembly import Instruction, Kernel
from .program import Loop, Program, memory_bytes

GLOBAL_LOADS = ("LDG", "LD", "LDGSTS", "UBLKCP")
LOADS = ("LDG", "LD", "LDS")
GLOBAL_STORES = ("STG", "ST")
WAITED_FOR = ("LDG", "LD", "ATOM", "ATOMG")  # what brings a register from global memory
PACKED = ("FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "HFMA2")  # two results an instruction
MOST_VECTORS = 8  # of an iteration, that a path is looked for with


@dataclass(frozen=True)
class Work:
    """What a loop does for each element of the vectors that it reads."""

    opcode: str
    """Such as "MUFU.EX2"; it begins the opcode."""
    per_element: float
    stores: bool
    """Whether it writes a vector for each that it reads."""


@dataclass(frozen=True)
class HotPath:
    """One iteration of a loop, as the columns in the middle of an aligned row run through it."""

    program: Program
    loop: Loop
    blocks: tuple[int, ...]
    vectors: int
    """That it reads, of sixteen bytes."""

    @cached_property
    def code(self) -> list[Instruction]:
        """Its instructions, in the order of their execution."""
        return [i for block in self.blocks for i in self.program.code(block)]

    def count(self, *opcodes: str) -> int:
        """Instructions whose opcode begins so, word by word: "LDG" is not LDGSTS."""
        return sum(_is(i.opcode, opcode) for i in self.code for opcode in opcodes)

    def elements(self, element_bytes: int) -> int:
        """Columns of an iteration."""
        return self.vectors * 16 // element_bytes

    @property
    def mufu(self) -> dict[str, int]:
        """How many of each kind, such as EX2."""
        kinds = Counter(i.opcode.split(".")[1] for i in self.code if i.kind == "MUFU")
        return dict(kinds)

    @property
    def narrow(self) -> list[Instruction]:
        """Accesses to global memory of fewer than sixteen bytes."""
        kinds = (*GLOBAL_LOADS, *GLOBAL_STORES)
        return [i for i in self.code if i.kind in kinds and 0 < memory_bytes(i) < 16]

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        first = self.program.blocks[self.loop.header].begin * 16
        return f"the loop at 0x{first:x}"


def hot_path(program: Program, work: Work, element_bytes: int) -> HotPath | None:
    """The hot path of a kernel for that work; None if no loop reads vectors for it."""
    per_vector = work.per_element * 16 / element_bytes
    for innermost in (True, False):
        found = [
            path
            for loop in program.loops
            if loop.is_innermost == innermost
            and (path := _cheapest(program, loop, work, per_vector)) is not None
        ]
        if found:
            # A remainder's loop has one vector an iteration, and the same instructions for each.
            return min(found, key=lambda path: (len(path.code) / path.vectors, -path.vectors))
    return None


class State(NamedTuple):
    """What the paths to a place have in common; of those, the shortest counts."""

    vectors: int
    stores: int
    done: int
    """Instructions of the work's opcode."""


def _cheapest(program: Program, loop: Loop, work: Work, per_vector: float) -> HotPath | None:
    """The path from the header to a latch with the fewest instructions for each vector."""
    costs = {block: _cost(program.code(block), work) for block in loop.blocks}
    total = [sum(cost[i] for cost in costs.values()) for i in range(3)]
    if total[0] == 0 or total[2] < per_vector or (work.stores and total[1] == 0):
        return None
    shape = State(MOST_VECTORS, MOST_VECTORS * work.stores, int(MOST_VECTORS * per_vector))
    place = {block: i for i, block in enumerate(program.order) if block in loop.blocks}
    # The lengths of the shortest paths to the begin and to the end of a block, for each state.
    into = {block: np.full([n + 1 for n in shape], FAR) for block in loop.blocks}
    after: dict[int, Lengths] = {}
    into[loop.header][0, 0, 0] = 0
    for block in sorted(place, key=place.__getitem__):
        after[block] = _through(into[block], costs[block], len(program.code(block)))
        for following in program.blocks[block].next:
            if place.get(following, -1) > place[block]:  # in the loop, and not back to a header
                np.minimum(into[following], after[block], out=into[following])
    ends = [
        (int(length) / state.vectors, latch, state)
        for latch in loop.latches
        for at, length in np.ndenumerate(after[latch])
        if length < FAR
        and (state := State(*at)).vectors
        and state.done >= state.vectors * per_vector
        and (not work.stores or state.stores >= state.vectors)
    ]
    if not ends:
        return None
    _, block, end = min(ends)
    blocks, state = [block], end
    while block != loop.header:
        length = after[block][state] - len(program.code(block))
        state = next(
            before
            for at in np.argwhere(into[block] == length)
            if _sum(before := State(*map(int, at)), costs[block], shape) == state
        )
        block = next(
            b for b in program.before[block] if b in after and place[b] < place[block]
            and after[b][state] == length
        )  # fmt: skip
        blocks.append(block)
    return HotPath(program, loop, tuple(blocks[::-1]), end.vectors)


FAR = 1 << 30
Lengths = npt.NDArray[np.int64]


def _through(into: Lengths, cost: State, length: int) -> Lengths:
    """The lengths behind a block, from those before it. The last place of `done` is "or more"."""
    out = np.full_like(into, FAR)
    if any(c >= n for c, n in zip(cost[:2], into.shape[:2], strict=True)):
        return out
    kept = into[: into.shape[0] - cost.vectors, : into.shape[1] - cost.stores]
    there = out[cost.vectors :, cost.stores :]
    last = into.shape[2] - 1
    done = min(cost.done, last)
    there[..., done:] = kept[..., : last + 1 - done]
    there[..., last] = kept[..., last - done :].min(axis=-1)
    return np.minimum(out + length, FAR)


def _sum(before: State, cost: State, shape: State) -> State:
    return State(
        before.vectors + cost.vectors,
        before.stores + cost.stores,
        min(before.done + cost.done, shape.done),
    )


def _cost(code: tuple[Instruction, ...], work: Work) -> State:
    wide = [i.kind for i in code if memory_bytes(i) == 16]
    return State(
        sum(kind in LOADS for kind in wide),
        sum(kind in GLOBAL_STORES for kind in wide),
        sum((2 if i.kind in PACKED else 1) * _is(i.opcode, work.opcode) for i in code),
    )


def is_bulk(instruction: Instruction) -> bool:
    """Whether it loads from global memory at full width."""
    return instruction.kind == "UBLKCP" or (
        instruction.kind in GLOBAL_LOADS and memory_bytes(instruction) == 16
    )


class BeforeBulk(NamedTuple):
    """What comes before the first bulk load of a warp."""

    waits: int
    """Trips to memory, one after the other, that the warp waits for on every path. Instructions are
    issued in order: one that reads what a load has not yet brought stops all behind it."""
    chain: int
    """Loads of which each has its address from the one before, on some path."""


def before_bulk(program: Program) -> BeforeBulk | None:
    """None if there is no bulk load."""
    waits = _first_bulk(program, in_order=True)
    chain = _first_bulk(program, in_order=False)
    return None if not waits else BeforeBulk(min(waits), max(chain))


def _first_bulk(program: Program, in_order: bool) -> list[int]:
    """For each bulk load that may be the first: the loads that come before it.

    Args:
        program: Of the kernel.
        in_order: Whether an instruction waits for all before it, and of the paths to an
            instruction the one that waits least counts. Otherwise it waits for what it reads
            only, and the longest chain counts.
    """
    join = min if in_order else max
    place = {block: i for i, block in enumerate(program.order)}
    # At a block's begin: the trips so far, and those until a register has its value.
    at: dict[int, tuple[int, dict[str, int]]] = {0: (0, {})}
    found = []
    for block in program.order:
        if block not in at:
            continue  # behind a bulk load on all paths
        trips, known = at[block][0], dict(at[block][1])
        for instruction in program.code(block):
            written, read = program.effects(instruction)
            if not in_order:  # of addresses: no predicates
                read = [name for name in read if "P" not in name]
            ready = max((known.get(name, 0) for name in read), default=0)
            if in_order:
                trips = ready = max(trips, ready)
            if is_bulk(instruction):
                found.append(max(trips, ready))
                break
            if instruction.kind in WAITED_FOR:
                ready += 1
                trips = trips if in_order else max(trips, ready)
            known.update(dict.fromkeys(written, ready))
        else:
            for following in program.blocks[block].next:
                if place[following] <= place[block]:
                    continue
                if following in at:
                    before, names = at[following]
                    both = {k: join(names.get(k, 0), known.get(k, 0)) for k in names | known}
                    at[following] = (join(before, trips), both)
                else:
                    at[following] = (trips, known)
    return found


def uses_local_memory(kernel: Kernel) -> list[Instruction]:
    """Accesses to local memory: an array that is not in registers, or a spill."""
    return [i for i in kernel.instructions if i.kind in ("LDL", "STL")]


def _is(opcode: str, beginning: str) -> bool:
    return opcode == beginning or opcode.startswith(f"{beginning}.")
