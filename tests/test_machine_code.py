"""The machine code of the kernels costs what it may, without a GPU: see tests/machine_code.

Each check is seen to fail on the faults planted in tests/machine_code/planted.cu.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy")
from machine_code import budgets, disassembly, program
from test_cuda_build import KERNELS, build, needs_cuda_build

from llmloss_ext import roofline
from llmloss_ext.ops.library import LIBRARY

MISSING = disassembly.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
PLANTED = Path(disassembly.__file__).parent / "planted.cu"


@pytest.fixture(scope="module")
def kernels() -> list[disassembly.Kernel]:
    return disassembly.read(LIBRARY, without=budgets.NOT_READ)


@needs_cuda_build
def test_all_kernels_of_the_build_are_read(kernels: list[disassembly.Kernel]) -> None:
    """By the names that the compiler's report has."""
    read = {name for name in KERNELS if not re.search("Half|(row|fused|scale).*double", name)}
    assert {kernel.name for kernel in kernels} >= read
    assert {kernel.architecture for kernel in kernels} <= set(build.ARCHITECTURES)


@needs_cuda_build
def test_every_budget_is_of_a_kernel(kernels: list[disassembly.Kernel]) -> None:
    """A kernel that gets another name must take its budget along."""
    for architecture in {kernel.architecture for kernel in kernels}:
        here = [kernel for kernel in kernels if kernel.architecture == architecture]
        for budget in budgets.BUDGETS:
            known = not budget.architectures or architecture in budget.architectures
            assert not known or any(map(budget.holds_for, here)), budget.kernel
        for pattern in {pattern for entry in budgets.EQUAL for pattern in entry[:2]}:
            assert any(re.fullmatch(pattern, kernel.name) for kernel in here), pattern


@needs_cuda_build
@pytest.mark.parametrize("budget", budgets.BUDGETS, ids=lambda b: f"{b.kernel[:16]} {b.phase}")
def test_kernels_are_within_their_budgets(
    kernels: list[disassembly.Kernel], budget: budgets.Budget
) -> None:
    held = [kernel for kernel in kernels if budget.holds_for(kernel)]
    wrong = [line for kernel in held for line in budgets.over_budget(kernel, budget)]
    assert not wrong, "\n".join(["over budget:", *wrong])


@needs_cuda_build
def test_no_kernel_uses_local_memory(kernels: list[disassembly.Kernel]) -> None:
    wrong = [line for kernel in kernels for line in budgets.local_memory(kernel)]
    assert not wrong, "\n".join(["local memory:", *wrong])


@needs_cuda_build
def test_equal_bits_come_from_equal_arithmetic(kernels: list[disassembly.Kernel]) -> None:
    """Of the fused kernel and the separate ones, in each type and architecture."""
    pairs = budgets.pairs(kernels)
    assert len(pairs) >= len(budgets.EQUAL)
    wrong = [line for pair in pairs for line in budgets.unequal(*pair)]
    assert not wrong, "\n".join(["not the same arithmetic:", *wrong])


@needs_cuda_build
def test_the_roofline_counts_what_the_machine_code_has(kernels: list[disassembly.Kernel]) -> None:
    """Its costs are the largest of the plain kernels, and not more than a tenth above them."""
    for table, work in ((roofline.REDUCE, budgets.REDUCE), (roofline.WRITE, budgets.WRITE)):
        for size, cost in table.items():
            paths = [
                path
                for kernel in kernels
                if budgets.element_bytes_of(kernel) == size
                and re.search(r"<\w+, (0u|true|false)>", kernel.name)
                and any(b.work == work and b.holds_for(kernel) for b in budgets.BUDGETS)
                and (path := budgets.path_of(kernel, work, size)) is not None
            ]
            assert paths
            found = roofline.Cost(
                max(len(path.code) / path.elements(size) for path in paths),
                max(path.count("MUFU") / path.elements(size) for path in paths),
            )
            assert found.instructions <= cost.instructions <= found.instructions * 1.1, found
            assert found.mufu <= cost.mufu <= found.mufu * 1.1, found


SUM = budgets.Budget(
    "", budgets.REDUCE, vectors=4, instructions={4: 5.0}, branches=1,
    mufu={"EX2": (1.0, {2: 0, 4: 0})}, chain=0, waits=0,
)  # fmt: skip
WRITE = replace(SUM, work=budgets.WRITE)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, disassembly.Kernel]:
    """The kernels of planted.cu, by name and fault."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("planted")
    target = ["-gencode", "arch=compute_90,code=sm_90"]
    command = [nvcc, "-std=c++20", "-O3", "-c", *target, str(PLANTED), "-o", "planted.o"]
    subprocess.run(command, cwd=folder, check=True)
    found = re.search(r"enum Fault \{(.*?)\}", PLANTED.read_text(), re.S)
    assert found is not None
    faults = [word.strip() for word in found[1].split(",") if word.strip()]
    kernels: dict[str, disassembly.Kernel] = {}
    for kernel in disassembly.read(folder / "planted.o", folder):
        name = re.fullmatch(r"(sum|write)_kernel<(?:\(Fault\))?(\d+)>", kernel.name)
        assert name is not None, kernel.name
        kernels[f"{name[1]} {faults[int(name[2])]}"] = kernel
    return kernels


def test_a_kernel_without_a_fault_passes(planted: dict[str, disassembly.Kernel]) -> None:
    assert budgets.over_budget(planted["sum none"], SUM, 4) == []
    assert budgets.over_budget(planted["write none"], WRITE, 4) == []
    assert budgets.local_memory(planted["sum none"]) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("sum scalar_loads", "no loop moves 16 bytes an instruction .* found LDG.E.STRONG.SYS"),
        ("sum dependent_load", "2 loads in a chain before the first bulk load, allowed 0"),
        ("sum dependent_load", "2 waits for memory before the first bulk load, allowed 0"),
        ("sum more_mufu", "1 MUFU.RSQ for 16 elements, not 0"),
        ("sum more_branches", r"\d+ branches an iteration, allowed 1"),
        ("sum more_instructions", r"instructions an element, allowed 5"),
        ("sum one_vector", "1 vectors an iteration, wanted 4"),
        ("write narrow_store", "ST.*accesses fewer than 16 bytes"),
    ],
)
def test_a_planted_fault_is_over_budget(
    planted: dict[str, disassembly.Kernel], fault: str, words: str
) -> None:
    budget = WRITE if fault.startswith("write") else SUM
    wrong = budgets.over_budget(planted[fault], budget, 4)
    assert any(re.search(words, line) for line in wrong), wrong
    assert all(line.startswith(str(planted[fault])) for line in wrong)


def test_a_planted_array_is_found_in_local_memory(planted: dict[str, disassembly.Kernel]) -> None:
    (wrong,) = budgets.local_memory(planted["sum local_array"])
    assert "accesses to local memory" in wrong


def test_a_planted_order_of_a_sum_is_found(planted: dict[str, disassembly.Kernel]) -> None:
    """It has the same operations, so their numbers tell nothing."""
    first, second = planted["sum none"], planted["sum other_order"]
    (wrong,) = budgets.unequal(first, second, budgets.REDUCE, 4)
    assert "not the same arithmetic: FADD" in wrong
    of = [budgets.path_of(kernel, budgets.REDUCE, 4) for kernel in (first, second)]
    assert of[0] is not None
    assert of[1] is not None
    assert budgets.opcodes(of[0]) == budgets.opcodes(of[1])
    # How numbers are addressed and loaded is no arithmetic.
    assert budgets.unequal(first, planted["sum dependent_load"], budgets.REDUCE, 4) == []


def code(*lines: str) -> disassembly.Kernel:
    """A kernel by hand: an instruction a line, of 16 bytes each."""
    instructions = []
    for line in lines:
        words = line.split(maxsplit=2 if line.startswith("@") else 1)
        predicate = words.pop(0) if line.startswith("@") else ""
        operands = tuple(words[1].split(",")) if len(words) > 1 else ()
        instructions.append(disassembly.Instruction(predicate, words[0], operands))
    return disassembly.Kernel("by hand", "90", tuple(instructions))


def test_loops_are_found_by_their_back_edges() -> None:
    nested = program.Program(
        code(
            "MOV R0,RZ",
            "IADD3 R1,R1,0x1,RZ",  # 0x10: the outer loop
            "FADD R2,R2,R1",  # 0x20: the inner one
            "@P0 BRA 0x20",
            "@!P1 BRA 0x60",
            "BRA 0x10",
            "EXIT",
            "BRA 0x70",  # behind the end: not reached
        )
    )
    outer, inner = nested.loops
    assert nested.blocks[outer.header].begin == 1
    assert nested.blocks[inner.header].begin == 2
    assert not outer.is_innermost
    assert inner.is_innermost
    assert inner.blocks < outer.blocks


@pytest.mark.parametrize(
    ("line", "written", "read"),
    [
        ("LDG.E.128 R8,desc[UR4][R2.64+0x200]", "R8 R9 R10 R11", "UR4 UR5 R2 R3"),
        ("STG.E.64 desc[UR4][R2.64],R6", "", "UR4 UR5 R2 R3 R6 R7"),
        ("@!P0 ISETP.GE.AND P1,PT,R4,R5,PT", "P1", "P0 R4 R5"),
        ("IADD3 R6,P0,R4,R6,RZ", "R6 P0", "R4 R6"),
        ("SHFL.BFLY PT,R3,R4,0x10,0x1f", "R3", "R4"),
        ("DFMA R4,R6,R8,R4", "R4 R5", "R6 R7 R8 R9 R4 R5"),
    ],
)
def test_registers_of_an_instruction(line: str, written: str, read: str) -> None:
    found: Any = program.registers(code(line).instructions[0])
    assert [" ".join(names) for names in found] == [written, read]


def test_names_without_namespaces_and_arguments() -> None:
    assert disassembly.short_name("void llmloss::cuda::k<llmloss::BFloat16, true>(int)") == (
        "k<BFloat16, true>"
    )
    assert disassembly.short_name("void f<(llmloss::cuda::Mask)3>(float*)") == "f<(Mask)3>"
