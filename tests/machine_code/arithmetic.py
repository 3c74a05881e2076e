"""The shape of a path's floating-point arithmetic: what is added to what, in which order.

Two kernels that promise equal bits must do the same operations in the same order; how their
numbers reach the registers may differ. So a shape knows operations and what they take from each
other, and nothing of addresses, registers, moves and constants. The largest of some numbers is
exact in any order, and counts as a number that was loaded. A product of two such numbers counts
once: where registers are scarce, the compiler computes it again and does not keep it.
"""

from __future__ import annotations

import re
from collections import Counter

from .disassembly import Instruction
from .paths import HotPath
from .program import registers

ARITHMETIC = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "DADD", "DMUL", "DFMA", "HADD2",
              "HMUL2", "HFMA2", "MUFU", "F2FP", "F2F")  # fmt: skip
EXACT = ("FMNMX", "FMNMX3", "HMNMX2", "VHMNMX", "HSETP2", "FSETP", "FSEL")
OF_INTEGERS = ("I2F", "I2FP")  # a number that no arithmetic of this path has made
NUMBER = "x"
PRODUCT = f"FMUL({NUMBER}, {NUMBER})"


def arithmetic(path: HotPath) -> Counter[str]:
    """How often each shape is computed in an iteration, such as "FADD(MUFU.EX2(x), x)"."""
    shapes: dict[str, str] = {}
    found: Counter[str] = Counter()
    for instruction in path.code:
        written, _ = registers(instruction)
        if not written or _moves_by_half(instruction):
            continue
        shape = _shape(instruction, shapes)
        if instruction.kind in ARITHMETIC:
            found[shape] += 1
        shapes.update(dict.fromkeys(written, shape))
    if PRODUCT in found:
        found[PRODUCT] = 1
    return found


def opcodes(path: HotPath) -> Counter[str]:
    """The arithmetic by opcode alone, for messages."""
    return Counter(_name(i) for i in path.code if i.kind in ARITHMETIC and not _moves_by_half(i))


def _shape(instruction: Instruction, shapes: dict[str, str]) -> str:
    if instruction.kind in (*EXACT, *OF_INTEGERS):
        return NUMBER
    taken = [_of_operand(operand, shapes) for operand in _sources(instruction)]
    if instruction.kind in ARITHMETIC:
        if "FMA" in instruction.kind:  # a * b is b * a
            taken[:2] = sorted(taken[:2])
        else:
            taken.sort()
        return _short(f"{_name(instruction)}({', '.join(taken)})")
    # A move, or the bits of a number: of what was computed, the same.
    computed = sorted({shape for shape in taken if shape != NUMBER})
    return NUMBER if not computed else _short("|".join(computed))


def _sources(instruction: Instruction) -> list[str]:
    """The operands behind the results."""
    operands = list(instruction.operands)
    while operands and re.fullmatch(r"U?P(\d|T)", operands[0]):
        operands.pop(0)
    return [o for o in operands[1:] if not re.fullmatch(r"!?U?P(\d|T)", o)]


def _of_operand(operand: str, shapes: dict[str, str]) -> str:
    found = re.search(r"\b(U?R\d+)\b", operand)
    return NUMBER if found is None else shapes.get(found[1], NUMBER)


def _name(instruction: Instruction) -> str:
    """The opcode, with what decides the result's bits."""
    return instruction.opcode.replace(".FTZ", "")


def _moves_by_half(instruction: Instruction) -> bool:
    """HFMA2.MMA R1, -RZ, RZ, 0, 0 loads a constant."""
    return instruction.kind == "HFMA2" and all(
        "RZ" in operand for operand in instruction.operands[1:3]
    )


SHAPES: dict[str, str] = {}
LONGEST = 60  # letters of a shape, beyond which it gets a name of its own


def _short(shape: str) -> str:
    """The same name for the same shape, in all kernels of this process."""
    if len(shape) <= LONGEST:
        return shape
    return SHAPES.setdefault(shape, f"#{len(SHAPES)}")


def spelled(shape: str) -> str:
    """A shape with the names of its parts resolved once."""
    by_name = {name: long for long, name in SHAPES.items()}
    return by_name.get(shape, shape)
