"""Prints the peak memory, in bytes, of linear losses beyond their inputs. Run in its own process.

Each line of the input is a case, and its answer a line of two numbers, measured and planned:

    N D V DTYPE LOSS [autocast | dropped | float32] [CHUNK_TOKENS]

LOSS is a reduction of the cross entropy, or a loss whose reference has hidden states and a weight
of the same sizes: `policy` (ratios of tokens), `sequences` (of sequences), `preference` or
`unpaired`, whose mismatched completions are the batch again.

With autocast, DTYPE is the hidden states' and the weight is float32; with dropped, there are N / 4
more tokens, which are ignored; with float32, the logits have it.

The peak of the resident set is that of a second call: the first one also pays for what the matrix
libraries keep for themselves.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from llmloss_ext import linear_cross_entropy, losses, plan


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


def new_weight(v: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """(V, D), without a float32 copy of the whole."""
    weight = torch.empty(v, d, dtype=dtype)
    for rows in weight.split(4096):
        rows.copy_(torch.randn(rows.shape) * 0.02)
    return weight


def loss_of(
    loss: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    reference: tuple[torch.Tensor, torch.Tensor] | None,
    **options: Any,
) -> torch.Tensor:
    """0-d."""
    if reference is None:
        return linear_cross_entropy(hidden, weight, target, reduction=loss, **options).sum()
    rows, pairs = (hidden.view(2, -1, hidden.shape[1]), target.view(2, -1))
    theirs = {
        "reference_input": reference[0].view_as(rows), "reference_weight": reference[1], **options,
    }  # fmt: skip
    if loss == "preference":
        return losses.linear_preference_loss(rows, weight, pairs, **theirs).loss
    if loss == "unpaired":
        return losses.linear_unpaired_loss(
            rows, weight, pairs, desirable=torch.tensor([True, False]), kl_input=rows,
            kl_target=pairs, kl_reference_input=theirs["reference_input"], **theirs,
        ).loss  # fmt: skip
    level = {"policy": "token", "sequences": "sequence"}[loss]
    return losses.linear_policy_loss(
        rows, weight, pairs, advantages=torch.ones(2), beta=0.1, importance_sampling_level=level,
        **theirs,
    ).loss  # fmt: skip


def peak(case: list[str]) -> tuple[int, int]:
    """The measured and the planned peak of a case."""
    n, d, v = map(int, case[:3])
    dtype, loss = getattr(torch, case[3]), case[4]
    is_reduction = loss in ("mean", "none")
    autocast, dropped = ("autocast" in case, "dropped" in case)
    logits_dtype = torch.float32 if "float32" in case[5:] else None
    chunk_tokens = int(case[-1]) if case[-1].isdigit() else None
    weight_dtype = torch.float32 if autocast else dtype
    torch.manual_seed(0)
    tokens = n + n // 4 if dropped else n
    hidden = torch.randn(tokens, d).to(dtype).requires_grad_()
    weight = new_weight(v, d, weight_dtype).requires_grad_()
    reference = None
    if not is_reduction:
        reference = torch.randn(tokens, d).to(dtype), new_weight(v, d, weight_dtype)
    target = torch.randint(0, v, (tokens,))
    target[n:] = -100
    for _ in range(2):
        hidden.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        with torch.autocast("cpu", dtype, enabled=autocast):
            options = {"chunk_tokens": chunk_tokens, "logits_dtype": logits_dtype}
            value = loss_of(loss, hidden, weight, target, reference, **options)
        value.backward()
        measured = resident("VmHWM") - before
    planned = plan(
        n, d, v, dtype, weight_dtype=weight_dtype, recompute=loss == "none",
        group_tokens={"sequences": n // 2, "unpaired": n // 2, "preference": n}.get(loss),
        drop_ignored=dropped, chunk_tokens=chunk_tokens, logits_dtype=logits_dtype,
        references={"mean": 0, "none": 0, "unpaired": 3}.get(loss, 1),
    )  # fmt: skip
    return measured, planned.peak_bytes


if __name__ == "__main__":
    main()
