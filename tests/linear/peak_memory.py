"""Prints the peak memory, in bytes, of linear losses beyond their inputs. Run in its own process.

Each line of the input is a case, and its answer a line of two numbers, measured and planned:

    N D V DTYPE REDUCTION [autocast | dropped | float32] [CHUNK_TOKENS]

With autocast, DTYPE is the hidden states' and the weight is float32; with dropped, there are N / 4
more tokens, which are ignored; with float32, the logits have it.

The peak of the resident set is that of a second call: the first one also pays for what the matrix
libraries keep for themselves.
"""

from __future__ import annotations

import ctypes
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


def map_large_blocks() -> None:
    """Every large buffer is the system's again when it is freed, and counted when it is not."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def main() -> None:
    map_large_blocks()
    torch.set_num_threads(1)  # the matrix libraries keep buffers for each thread
    for line in sys.stdin:
        print(*peak(line.split()), flush=True)


def peak(case: list[str]) -> tuple[int, int]:
    """The measured and the planned peak of a case."""
    n, d, v = map(int, case[:3])
    dtype, reduction = getattr(torch, case[3]), case[4]
    autocast, dropped = ("autocast" in case, "dropped" in case)
    logits_dtype = torch.float32 if "float32" in case[5:] else None
    chunk_tokens = int(case[-1]) if case[-1].isdigit() else None
    weight_dtype = torch.float32 if autocast else dtype
    torch.manual_seed(0)
    tokens = n + n // 4 if dropped else n
    hidden = torch.randn(tokens, d).to(dtype).requires_grad_()
    weight = torch.empty(v, d, dtype=weight_dtype)
    for rows in weight.split(4096):  # no float32 copy of the whole
        rows.copy_(torch.randn(rows.shape) * 0.02)
    weight.requires_grad_()
    target = torch.randint(0, v, (tokens,))
    target[n:] = -100
    for _ in range(2):
        hidden.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = linear_cross_entropy(
                hidden, weight, target, reduction=reduction, chunk_tokens=chunk_tokens,
                logits_dtype=logits_dtype,
            ).sum()  # fmt: skip
        loss.backward()
        measured = resident("VmHWM") - before
    planned = plan(
        n, d, v, dtype, weight_dtype=weight_dtype, recompute=reduction == "none",
        drop_ignored=dropped, chunk_tokens=chunk_tokens, logits_dtype=logits_dtype,
    )  # fmt: skip
    return measured, planned.peak_bytes


if __name__ == "__main__":
    main()
