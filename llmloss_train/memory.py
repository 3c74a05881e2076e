"""Memory: what there is, and the peak of torch's allocator on a GPU, of the process on a CPU."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from llmloss_ext.cli import UserError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(device: torch.device) -> int:
    """The peak since the process started, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require(device: torch.device, size: int, local_size: int) -> None:
    """Refuses what the device cannot hold: rather than the system's killing the process.

    Args:
        device: That of this process.
        size: What the process takes, in bytes.
        local_size: The processes of this machine, which share its memory.

    Raises:
        UserError: That is more than there is, used and free together.
    """
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        size *= local_size
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        raise UserError(
            f"this run takes {size / 2**30:,.1f} GiB or more, and {device} has "
            f"{there / 2**30:,.1f} GiB: "
            "lower --dim, --layers, --seq-len, --batch-size or --accumulate"
        )


class PeakMeter:
    """Measures the peak beyond the memory that is in use at the start."""

    def __init__(self, device: torch.device) -> None:
        """Starts to measure."""
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._device, self._before = device, torch.cuda.memory_allocated(device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # resets the peak of the resident set
            self._before = _resident("VmRSS")

    def peak(self) -> int | None:
        """Returns the bytes, or None if the system does not report them."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _resident("VmHWM") - self._before if _CLEAR.exists() else None


def _resident(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
