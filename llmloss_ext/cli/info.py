"""``llmloss info``: versions, instruction sets, devices, and how the kernels are launched."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from .. import chips
from ..version import __version__
from .errors import UserError, first_line

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "neon")


ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
H100 = chips.H100.limits


def add_parser(subparsers: Any) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("info", help="print versions, instruction sets and devices")
    parser.add_argument(
        "--plan",
        nargs=3,
        metavar=("N", "V", "DTYPE"),
        help="print how the CUDA kernels are launched for N x V logits, e.g. 8192 128256 bfloat16",
    )


def run(args: argparse.Namespace) -> int:
    """Prints one fact per line."""
    if args.plan is not None:
        print(plan(*args.plan))
        return 0
    for name, value in facts():
        print(f"{name:<18} {value}")
    for line in kernels():
        print(line)
    return 0


def plan(rows: str, vocab_size: str, dtype: str) -> str:
    """Describes how the CUDA kernels are launched on this machine's GPU, or else on an H100.

    Args:
        rows: The number of tokens, N.
        vocab_size: The vocabulary size, V.
        dtype: The dtype of the logits, a key of `ELEMENT_BYTES`.

    Raises:
        UserError: An argument is not a number, is out of range, or names no dtype.
    """
    from .. import ops

    if dtype not in ELEMENT_BYTES:
        raise UserError(f"--plan: dtype must be one of {', '.join(ELEMENT_BYTES)}, got {dtype}")
    try:
        n, v = int(rows), int(vocab_size)
    except ValueError:
        raise UserError(f"--plan: N and V must be integers, got {rows} and {vocab_size}") from None
    if max(abs(n), abs(v)) >= 2**63:
        raise UserError("--plan: N and V must be below 2^63")
    name, limits = _limits()
    try:
        text = ops.kernels.launch_plan(n, v, ELEMENT_BYTES[dtype], *limits)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--plan: {first_line(error)}") from None
    predicted = _predictions(n, v, ELEMENT_BYTES[dtype])
    held = residency_table(n, v, dtype)
    return "\n".join([f"{n:,} x {v:,} {dtype} on {name}", text.rstrip("\n"), *predicted, *held])


def _predictions(rows: int, vocab_size: int, element_bytes: int) -> list[str]:
    """How long the kernels take by the model, on each GPU that it knows; not for float64."""
    from .. import ops, roofline

    if element_bytes not in roofline.REDUCE:
        return []
    predicted = {}
    for chip in chips.CHIPS.values():
        text = ops.kernels.launch_plan(rows, vocab_size, element_bytes, *chip.limits)
        label = chip.name if chip.is_measured else f"{chip.name} (estimated)"
        predicted[label] = roofline.predict(chip, text, rows, vocab_size, element_bytes)
    return roofline.lines(predicted)


def residency_table(rows: int, vocab_size: int, dtype: str) -> list[str]:
    """How many blocks a multiprocessor of each known GPU holds; nothing without CUDA kernels."""
    from .. import ops, residency

    report = _report()
    held = [
        row
        for chip in chips.CHIPS.values()
        if chip.name != "H200"  # the same as the H100
        for row in residency.residency(
            chip,
            ops.kernels.launch_plan(rows, vocab_size, ELEMENT_BYTES[dtype], *chip.limits),
            dtype,
            report,
        )
    ]
    if not held:
        return []
    return ["blocks that a multiprocessor holds", *residency.table(held)]


def _report() -> list[dict[str, Any]]:
    """The compiler's on each kernel of this build; empty where it has none."""
    from .. import ops

    report = Path(__file__).parents[1] / "cuda_kernels.json"
    if not ops.has_cuda() or not report.exists():
        return []
    kernels: list[dict[str, Any]] = json.loads(report.read_text())
    return kernels


def _limits() -> tuple[str, tuple[int, int, int, int]]:
    import torch

    if not torch.cuda.is_available():
        return "an H100 (this machine has no CUDA device)", H100
    # Any: torch's type stubs leave out half of the properties.
    device: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    cluster = {9: 16, 10: 16}.get(device.major, 8 if device.major > 8 else 1)
    shared = (device.shared_memory_per_block_optin, device.shared_memory_per_multiprocessor)
    return device.name, (device.multi_processor_count, *shared, cluster)


def kernels() -> list[str]:
    """Lists the CUDA kernels of this build, with registers and spills for each architecture."""
    report = _report()
    if not report:
        return []
    table: dict[str, dict[str, str]] = {}
    for kernel in report:
        spilled = f" ({kernel['spill_bytes']} B spilled)" if kernel["spill_bytes"] else ""
        cell = f"{kernel['registers']}{spilled}"
        if kernel["shared_bytes"]:
            cell += f" {kernel['shared_bytes']} B shared"
        table.setdefault(kernel["kernel"], {})[kernel["architecture"]] = cell
    architectures = sorted({name for row in table.values() for name in row}, key=int)
    lines = ["", "registers per thread; for the shared memory of a launch see --plan"]
    lines.append(f"{'CUDA kernel':<34}" + "".join(f"{'sm_' + name:>8}" for name in architectures))
    for name, row in sorted(table.items()):
        lines.append(f"{name:<34}" + "".join(f"{row.get(arch, '-'):>8}" for arch in architectures))
    return lines


def facts() -> list[tuple[str, str]]:
    """The facts that decide how the library runs here, as pairs of name and value."""
    import torch

    from .. import ops

    return [
        ("llmloss_ext", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("library", str(ops.LIBRARY)),
        ("CPU kernels", _isa()),
        ("threads", str(torch.get_num_threads())),
        ("CUDA kernels", _cuda()),
        ("CUDA device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("llmloss train", _command("train")),
        ("llmloss eval", _command("eval")),
        ("llmloss bench", _command("bench")),
    ]


def instruction_set() -> str:
    """The CPU kernels that run on this machine: one of `ISAS`.

    Raises:
        UserError: ``LLMLOSS_CPU_ISA`` names none.
    """
    from .. import ops

    try:
        return ISAS[ops.kernels.cpu_isa()]
    except ValueError as error:
        raise UserError(first_line(error)) from error


def _isa() -> str:
    active = instruction_set()
    forced = os.environ.get("LLMLOSS_CPU_ISA")
    return active if forced is None else f"{active} (LLMLOSS_CPU_ISA={forced})"


def _cuda() -> str:
    from .. import ops

    return "built" if ops.has_cuda() else "not in this build"


def _command(name: str) -> str:
    """Whether the packages that a command needs are there."""
    package = f"llmloss_{name}"
    try:
        missing = importlib.import_module(package).missing_packages()
    except ModuleNotFoundError:
        return f"not installed: {package} is missing"
    if missing:
        return f"needs {', '.join(missing)}: pip install 'llmloss_ext[{name}]'"
    return "available"
