"""The machine that the figures are measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from llmloss_ext import __version__
from llmloss_ext.cli import instruction_set

IDENTITY = ("cpu", "threads", "gpu")
"""Runs that agree in these are comparable in absolute times."""


def cpu_named_in(info: str) -> str:
    """The CPU's name in the text of Linux's /proc/cpuinfo; "" if it has none.

    On Arm there are two numbers instead: who designed the core, and which of theirs it is.
    """
    facts: dict[str, str] = {}
    for line in info.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "model name" in facts:
        return facts["model name"]
    core = [facts.get(f"CPU {what}") for what in ("implementer", "part")]
    return f"{platform.machine()} {core[0]} {core[1]}" if all(core) else ""


def machine() -> dict[str, object]:
    """The facts of this machine, by name."""
    info = Path("/proc/cpuinfo")
    cpu = cpu_named_in(info.read_text()) if info.exists() else ""
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **_gpu(),
        "date": date.today().isoformat(),
        "llmloss_ext": __version__,
        **_commit(),
    }


def _commit() -> dict[str, object]:
    """Of the checkout that the library is in; nothing where it is installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return {}
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return {"commit": _output(describe)}


def _gpu() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver, clock": _output(query),
    }


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
