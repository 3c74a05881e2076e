"""The tensors of a case: seeded, not in the caches, and restored after they are overwritten."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmloss_ext.linear import is_upcast

from .cases import Case

IGNORE_INDEX = -100
_CONFIDENT = 64
"""One row in this many predicts its target with p = 0.99, where p - 1 cancels."""
_ALIGNED_BYTES = 128
"""Rows of a product begin at multiples of this: oneDNN is a third faster so."""
_CHUNKS = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 8192)}


class LogitsInputs:
    """N x V logits and targets.

    On a CPU there are enough copies of the logits to exceed the caches. They are used in turn, so
    that no use finds its copy in a cache. (On a GPU, the timer flushes the cache.) Logits that a
    contender has overwritten are restored before their next use.
    """

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        like: dict[str, Any] = {"generator": generator, "device": case.device}
        dtype = case.torch_dtype
        self.logits = torch.empty(case.rows, case.columns, dtype=dtype, device=case.device)
        for rows in self.logits.split(max((1 << 26) // case.columns, 1)):
            rows.copy_(torch.randn(rows.shape, **like) * 2)
        self.target = torch.randint(0, case.columns, (case.rows,), **like)
        peak = 2.0 + math.log(99 * case.columns)  # log-sum of the other columns, and p = 0.99
        confident = torch.arange(0, case.rows, _CONFIDENT, device=case.device)
        self.logits[confident, self.target[confident]] = peak
        _ignore(self.target, case, generator)
        copies = 1 if case.warm else _copies(case)
        self._sets = [self.logits.clone() for _ in range(copies)]
        self._turn = 0
        self._spoilt: Tensor | None = None

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """What a contender takes after the logits."""
        return (self.target,)

    def next(self) -> Tensor:
        """The next copy of the logits, which needs no gradient."""
        if self._spoilt is not None:
            self._spoilt.copy_(self.logits)
            self._spoilt = None
        self._turn = (self._turn + 1) % len(self._sets)
        return self._sets[self._turn]

    def leaf(self) -> Tensor:
        """The next copy of the logits, as a leaf that needs a gradient."""
        return self.next().detach().requires_grad_()

    def overwritable(self) -> Tensor:
        """The next copy of the logits, not as a leaf: like the output of a projection."""
        self._spoilt = self.next()
        anchor = torch.zeros((), requires_grad=True, device=self.logits.device)
        passed: Tensor = _Passed.apply(self._spoilt, anchor)
        return passed

    def copy(self) -> None:
        """Reads the bytes of the logits once, and writes them once."""
        self._scratch.copy_(self.next())

    def read(self) -> None:
        """Reads the bytes of the logits once."""
        logits = self.next()
        words = torch.int32 if logits.is_cuda else torch.int64
        flat = logits.view(-1)
        whole = flat.numel() // (8 // flat.element_size()) * (8 // flat.element_size())
        flat[:whole].view(words).sum()

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.zeros_like(self.logits)


class LinearInputs:
    """N x D hidden states, a V x D weight, and targets."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        like: dict[str, Any] = {"generator": generator, "device": case.device}
        hidden = torch.randn(case.rows, case.features, **like)
        weight = torch.randn(case.columns, case.features, **like) * 0.02
        self.hidden = hidden.to(case.torch_dtype).requires_grad_(case.has_backward)
        self.weight = weight.to(case.torch_dtype).requires_grad_(case.has_backward)
        self.target = torch.randint(0, case.columns, (case.rows,), **like)
        _ignore(self.target, case, generator)

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """What a contender takes after hidden states and weight."""
        return (self.target,)

    def fresh(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight, with their gradients cleared."""
        self.hidden.grad = self.weight.grad = None
        return self.hidden, self.weight

    def products(self, chunk: int) -> None:
        """Computes only the matrix products, ``chunk`` tokens at a time, without allocating."""
        hidden, weight = self._operands
        logits, grad_hidden, grad_weight = self._buffers
        for begin in range(0, hidden.shape[0], chunk):
            rows = hidden[begin : begin + chunk]
            part = logits[: rows.shape[0]]
            torch.mm(rows, weight.t(), out=part)
            if self.hidden.requires_grad:
                torch.mm(part, weight, out=grad_hidden[begin : begin + chunk])
                torch.mm(part.t(), rows, out=grad_weight)

    def product_chunks(self) -> list[int]:
        """The chunk sizes to try for `products`."""
        tokens = self.hidden.shape[0]
        return sorted({min(chunk, tokens) for chunk in _CHUNKS[self.hidden.device.type]})

    @cached_property
    def _operands(self) -> tuple[Tensor, Tensor]:
        """In float32 on a CPU that has no products of their 16 bits: its fastest are those."""
        operands = self.hidden.detach(), self.weight.detach()
        if is_upcast(self.hidden.dtype, self.hidden.device.type):
            return operands[0].float(), operands[1].float()
        return operands

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = self._operands
        columns = weight.shape[0]
        unit = _ALIGNED_BYTES // hidden.element_size()
        logits = hidden.new_zeros(max(self.product_chunks()), -(-columns // unit) * unit)
        return logits[:, :columns], torch.zeros_like(hidden), torch.zeros_like(weight)


class PreferenceInputs(LinearInputs):
    """A policy's hidden states and weight, and those of a reference that is close to it."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        generator = torch.Generator(case.device).manual_seed(1)
        hidden, weight = (
            t.detach() + scale * torch.randn(t.shape, generator=generator, device=case.device)
            for t, scale in ((self.hidden, 0.05), (self.weight, 0.001))
        )
        self.reference_hidden = hidden.to(case.torch_dtype)
        self.reference_weight = weight.to(case.torch_dtype)
        self._shape = (case.sequences, case.rows // case.sequences)

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The targets of the sequences, and the reference's hidden states and weight."""
        hidden = self.reference_hidden.view(*self._shape, -1)
        return self.target.view(self._shape), hidden, self.reference_weight


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, anchor):  # type: ignore[no-untyped-def]
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, grad.new_zeros(())


def _ignore(target: Tensor, case: Case, generator: torch.Generator) -> None:
    count = case.rows - case.valid_rows
    order = torch.randperm(case.rows, generator=generator, device=case.device)
    target[order[:count]] = IGNORE_INDEX


def _copies(case: Case) -> int:
    if case.device != "cpu":
        return 1
    return max(-(-2 * last_level_cache() // case.logits_bytes), 1)


@lru_cache(maxsize=1)
def last_level_cache() -> int:
    """The bytes of the CPU's largest cache, or 64 MiB if the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * unit if unit else 0)
    return max(sizes, default=0) or 64 << 20
