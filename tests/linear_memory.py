"""Prints the peak memory, in bytes, of one linear loss beyond its inputs. Run in its own process.

    python linear_memory.py N D V DTYPE REDUCTION

The peak of the resident set is that of a second call: the first one also pays for what the matrix
libraries keep for themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llmloss_ext import linear_cross_entropy, plan


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def main() -> None:
    n, d, v = map(int, sys.argv[1:4])
    dtype, reduction = getattr(torch, sys.argv[4]), sys.argv[5]
    torch.manual_seed(0)
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = torch.empty(v, d, dtype=dtype)
    for rows in weight.split(4096):  # no float32 copy of the whole
        rows.copy_(torch.randn(rows.shape) * 0.02)
    weight.requires_grad_()
    target = torch.randint(0, v, (n,))
    for _ in range(2):
        hidden.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()
        peak = resident("VmHWM") - before
    planned = plan(n, d, v, dtype, recompute=reduction == "none")
    print(peak, planned.peak_bytes)


if __name__ == "__main__":
    main()
