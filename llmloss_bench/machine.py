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


def machine() -> dict[str, object]:
    """The facts of this machine, by name."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "cpu": cpu,
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
