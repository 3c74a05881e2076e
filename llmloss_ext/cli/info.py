"""``llmloss info``: versions, instruction sets, and what is available."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib import metadata
from typing import Any

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def add_parser(subparsers: Any) -> None:
    """Adds the command's options."""
    subparsers.add_parser("info", help="print versions, instruction sets and what is available")


def run(_args: argparse.Namespace) -> int:
    """Prints one fact a line."""
    for name, value in facts():
        print(f"{name:<18} {value}")
    return 0


def facts() -> list[tuple[str, str]]:
    """Name and value of what decides how the library runs here."""
    import torch

    import llmloss_ext

    return [
        ("llmloss_ext", _version("llmloss_ext")),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("library", str(llmloss_ext.ops.LIBRARY)),
        ("CPU kernels", _isa()),
        ("threads", str(torch.get_num_threads())),
        ("CUDA kernels", _cuda()),
        ("CUDA device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("llmloss train", _train()),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed: built in place"


def _isa() -> str:
    import torch

    active = ISAS[torch.ops.llmloss.cpu_isa()]
    forced = os.environ.get("LLMLOSS_CPU_ISA")
    return active if forced is None else f"{active} (LLMLOSS_CPU_ISA={forced})"


def _cuda() -> str:
    import torch

    registered = torch._C._dispatch_has_kernel_for_dispatch_key("llmloss::cross_entropy", "CUDA")
    return "built" if registered else "not in this build"


def _train() -> str:
    needed = ("matplotlib", "mistral_common", "numpy", "rich")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'llmloss_ext[train]'"
    return "available"
