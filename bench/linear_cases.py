"""The cases of the losses from hidden states, beside torch's and beside the bare products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmloss_ext
from bench.cases import Case
from bench.timing import Contender


class _Projection:
    """Hidden states, a weight and targets of one size."""

    def __init__(self, tokens: int, features: int, vocab_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, features, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, features, generator=generator) * 0.02
        self.weight = weight.to(dtype).requires_grad_()
        self.target = torch.randint(0, vocab_size, (tokens,), generator=generator)
        self.few = self.target.clone()
        self.few[torch.randperm(tokens, generator=generator)[: tokens * 3 // 4]] = -100

    def step(self, loss: Callable[..., Tensor], target: Tensor) -> Callable[[], None]:
        """Forward and backward."""

        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            loss(self.hidden, self.weight, target).backward()

        return run

    def products(self, chunk: int) -> Callable[[], None]:
        """The three matrix products alone, in chunks, into memory that is there already."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits = hidden.new_empty(chunk, weight.shape[0])
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def run() -> None:
            for begin in range(0, hidden.shape[0], chunk):
                rows = hidden[begin : begin + chunk]
                torch.mm(rows, weight.t(), out=logits)
                torch.mm(logits, weight, out=grad_hidden[begin : begin + chunk])
                torch.mm(logits.t(), rows, out=grad_weight)

        return run


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def linear_cases(tokens: int = 2048, features: int = 768, vocab_size: int = 50257) -> list[Case]:
    """The table of the linear issue: one size, two dtypes."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _Projection(tokens, features, vocab_size, dtype)
        loss = llmloss_ext.linear_cross_entropy
        ours = inputs.step(loss, inputs.target)
        contenders = [
            Contender("llmloss", ours),
            Contender("torch", inputs.step(_eager, inputs.target)),
            *(Contender(f"products/{c}", inputs.products(c)) for c in (256, 512, 1024)),
        ]
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            contenders.append(
                Contender("torch chunked", inputs.step(_torch_chunked, inputs.target))
            )
        size = f"linear, forward+backward, D {features}"
        cases.append(Case(size, tokens, vocab_size, dtype, 0, contenders))
        few = [Contender("llmloss", inputs.step(loss, inputs.few)), Contender("plain", ours)]
        cases.append(Case(f"{size}, 75 % ignored", tokens, vocab_size, dtype, 0, few))
    return cases
