"""The cases of a CUDA device: logits that do not fit its caches, and few rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmloss_ext
from bench.cases import Case, Inputs, backward_of, inplace_loss, torch_loss
from bench.linear_cases import gpu_linear_cases
from bench.peers import Peer, linear_peers, peers
from bench.timing import Contender

SIZES = [(8192, 32000), (8192, 50257), (8192, 128256), (8192, 262144),
         (1, 128256), (16, 128256), (128, 128256)]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)


def gpu_suites() -> list[Callable[[], list[Case]]]:
    """One suite for each size and dtype, so that only one set of logits exists at a time."""
    found = peers()
    logits = [
        lambda rows=rows, columns=columns, dtype=dtype: _cases(rows, columns, dtype, found)
        for rows, columns in SIZES
        for dtype in DTYPES
    ]
    return [*logits, gpu_linear_cases]


def missing_peers() -> list[str]:
    """A line for each peer that is not measured."""
    return [
        f"{peer.name} is not measured: {peer.reason}"
        for peer in (*peers(), *linear_peers())
        if peer.loss is None
    ]


def _cases(rows: int, columns: int, dtype: torch.dtype, found: list[Peer]) -> list[Case]:
    torch.cuda.empty_cache()
    inputs = Inputs(rows, columns, dtype, "cuda")
    target, size = inputs.target, inputs.bytes
    compiled = torch.compile(torch_loss, fullgraph=True, dynamic=False)

    def copy() -> Contender:
        return Contender("copy", lambda: inputs.scratch.copy_(inputs.logits))

    def plain(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        return Contender(name, loss, lambda: (inputs.logits, target))

    def whole(name: str, loss: Callable[[Tensor, Tensor], Tensor], overwrites: bool) -> Contender:
        setup = inputs.overwritable if overwrites else inputs.leaf
        return Contender(name, backward_of(loss, target), setup)

    def read() -> Contender:
        return Contender("read", lambda: torch.sum(inputs.logits.view(torch.int32)))

    others = [
        whole("torch", torch_loss, False),
        whole("compile", compiled, False),
        *(whole(p.name, p.loss, p.overwrites) for p in found if p.loss is not None),
    ]
    contenders = [plain("llmloss", llmloss_ext.cross_entropy), plain("torch", F.cross_entropy)]
    contenders += [plain("compile", compiled), copy(), read()]
    return [
        Case("forward", rows, columns, dtype, size, contenders),
        Case(
            "forward+backward",
            rows,
            columns,
            dtype,
            3 * size,
            [whole("llmloss", llmloss_ext.cross_entropy, False), *others[:2], copy()],
        ),
        Case(
            "forward+backward, inplace",
            rows,
            columns,
            dtype,
            2 * size,
            [whole("llmloss", inplace_loss, True), *others, copy()],
        ),
    ]
