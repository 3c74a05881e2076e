"""A kernel's instructions as basic blocks, with the loops among them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache, cached_property

from .disassembly import INSTRUCTION_BYTES, Instruction, Kernel

ENDS = ("EXIT", "RET", "JMX", "BRX", "JMP")  # and BRA, if it has no condition


@dataclass
class Block:
    """Instructions that are run one after the other."""

    begin: int
    end: int
    """Of the kernel's instructions: the first, and the one behind the last."""
    next: list[int] = field(default_factory=list)
    """Where it may go on: places in Program.blocks."""


@dataclass(frozen=True)
class Loop:
    """A natural loop: every path into it goes through its header."""

    header: int
    blocks: frozenset[int]
    latches: frozenset[int]
    """The blocks that go back to the header."""
    is_innermost: bool


class Program:
    """The control flow of one kernel. A called function counts as one instruction, the call."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        code = kernel.instructions
        starts = {0}
        for at, instruction in enumerate(code):
            if (target := branch_target(instruction)) is not None:
                starts.add(target)
            if ends_block(instruction):
                starts.add(at + 1)
        cuts = sorted(start for start in starts if start < len(code))
        self.blocks = [Block(b, e) for b, e in zip(cuts, [*cuts[1:], len(code)], strict=True)]
        place = {block.begin: i for i, block in enumerate(self.blocks)}
        for i, block in enumerate(self.blocks):
            last = code[block.end - 1]
            target = branch_target(last)
            if target is not None:
                block.next.append(place[target])
            is_certain = last.predicate in ("", "@PT") and not _has_condition(last)
            if not (is_certain and (last.kind == "BRA" or last.kind in ENDS)) and i + 1 < len(
                self.blocks
            ):
                block.next.append(i + 1)

    def code(self, block: int) -> tuple[Instruction, ...]:
        """The instructions of a block."""
        b = self.blocks[block]
        return self.kernel.instructions[b.begin : b.end]

    def effects(self, instruction: Instruction) -> tuple[list[str], list[str]]:
        """What an instruction writes, and what it reads; of a call, what the function does."""
        if instruction.kind == "CALL":
            return self._functions.get(instruction.operands[0], ([], []))
        return registers(instruction)

    @cached_property
    def _functions(self) -> dict[str, tuple[list[str], list[str]]]:
        """By name, the registers of the functions behind the kernel, such as a 64-bit division.

        They stand in the order of the number in their name, each up to its RET."""
        calls = {i.operands[0] for i in self.kernel.instructions if i.kind == "CALL"}
        numbers = {name: int(n[1]) for name in calls if (n := re.search(r"internal_(\d+)", name))}
        found, written, read = [], dict[str, None](), dict[str, None]()
        for block in sorted(set(range(len(self.blocks))) - set(self.order)):
            for instruction in self.code(block):
                into, of = registers(instruction)
                read |= dict.fromkeys(name for name in of if name not in written)
                written |= dict.fromkeys(into)
                if instruction.kind == "RET":
                    found.append((list(written), list(read)))
                    written, read = {}, {}
        return dict(zip(sorted(numbers, key=numbers.__getitem__), found, strict=True))

    @cached_property
    def order(self) -> list[int]:
        """The blocks that can be reached: each before those that follow it, but for loops."""
        seen, post = {0}, []
        stack = [(0, iter(self.blocks[0].next))]
        while stack:
            block, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                post.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].next)))
        return post[::-1]

    @cached_property
    def before(self) -> dict[int, list[int]]:
        """The blocks that a block can be reached from."""
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in self.blocks[block].next:
                before[following].append(block)
        return before

    @cached_property
    def _dominators(self) -> dict[int, int]:
        """The last block that every path to a block goes through (Cooper, Harvey and Kennedy)."""
        place = {block: i for i, block in enumerate(self.order)}
        above = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [b for b in self.before[block] if b in above]
                found = known[0]
                for other in known[1:]:
                    while found != other:
                        if place[found] > place[other]:
                            found = above[found]
                        else:
                            other = above[other]
                if above.get(block) != found:
                    above[block], changed = found, True
        return above

    def dominates(self, block: int, other: int) -> bool:
        """Whether every path to `other` goes through `block`."""
        while other != block and other != 0:
            other = self._dominators[other]
        return other == block

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, by the place of their header."""
        bodies: dict[int, tuple[set[int], set[int]]] = {}
        for latch in self.order:
            for header in self.blocks[latch].next:
                if not self.dominates(header, latch):
                    continue
                blocks, latches = bodies.setdefault(header, ({header}, set()))
                latches.add(latch)
                todo = [latch]
                while todo:
                    block = todo.pop()
                    if block not in blocks:
                        blocks.add(block)
                        todo += self.before[block]
        return [
            Loop(header, frozenset(blocks), frozenset(latches),
                 not any(h != header and h in blocks for h in bodies))
            for header, (blocks, latches) in sorted(bodies.items())
        ]  # fmt: skip


def branch_target(instruction: Instruction) -> int | None:
    """The place of the instruction that a branch goes to."""
    if instruction.kind != "BRA" or not instruction.operands:
        return None
    found = re.fullmatch(r"\(?(0x[0-9a-f]+)\)?", instruction.operands[-1].strip())
    return None if found is None else int(found[1], 16) // INSTRUCTION_BYTES


def ends_block(instruction: Instruction) -> bool:
    """Whether the next instruction may not be the next that runs."""
    return instruction.kind == "BRA" or instruction.kind in ENDS


def _has_condition(instruction: Instruction) -> bool:
    """Of a branch: a uniform predicate or a divergent mask among its operands."""
    return instruction.kind == "BRA" and len(instruction.operands) > 1


@cache
def registers(instruction: Instruction) -> tuple[list[str], list[str]]:
    """What an instruction writes, and what it reads: "R4", "UR4", "P0", each of 32 bits or one."""
    written: list[str] = []
    operands = list(instruction.operands)
    if instruction.kind not in NO_RESULT:
        # Predicates may stand before or behind the one result that is no predicate.
        has_result = False
        while operands:
            if re.fullmatch(r"U?P(\d|T)", operands[0]):
                written += REGISTER.findall(operands.pop(0))
            elif not has_result and (not written or instruction.kind in PREDICATE_FIRST):
                has_result = True
                written += _wide(REGISTER.findall(operands.pop(0)), _result_words(instruction))
            else:
                break
    read = REGISTER.findall(instruction.predicate)
    for operand in operands:
        names = REGISTER.findall(operand)
        wide = ".64" in operand or instruction.kind in DOUBLE
        if instruction.kind in STORES and operand is operands[-1]:
            read += _wide(names, memory_bytes(instruction) // 4 or 1)
        else:
            read += _wide(names, 2 if wide else 1)
    return written, read


@cache
def memory_bytes(instruction: Instruction) -> int:
    """Of each lane, for loads and stores."""
    words = instruction.opcode.split(".")[1:]
    for word in words:
        if word in WIDTHS:
            return WIDTHS[word]
    return 4


REGISTER = re.compile(r"\b(U?R\d+|U?P\d)\b")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "BF16": 2}
STORES = ("STG", "ST", "STS", "STL", "STAS")
NO_RESULT = (*STORES, "BRA", "EXIT", "BAR", "BSSY", "BSYNC", "RET", "CALL", "NOP", "RED", "MEMBAR",
             "LDGSTS", "UBLKCP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "ERRBAR", "CCTL")  # fmt: skip
PREDICATE_FIRST = ("SHFL", "LOP3", "ULOP3", "MATCH")
DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP")


def _result_words(instruction: Instruction) -> int:
    if instruction.kind.startswith(("LD", "ULD")) and instruction.kind != "LDSM":
        return max(memory_bytes(instruction) // 4, 1)
    wide = (".WIDE", ".64", ".F64.")
    is_wide = instruction.kind in DOUBLE or any(w in f"{instruction.opcode}." for w in wide)
    return 2 if is_wide else 1


def _wide(names: list[str], words: int) -> list[str]:
    """Registers, each with those behind it that belong to the same value."""
    result = []
    for name in names:
        letters = name.rstrip("0123456789")
        count = 1 if letters.endswith("P") else words
        result += [f"{letters}{int(name[len(letters) :]) + i}" for i in range(count)]
    return result
