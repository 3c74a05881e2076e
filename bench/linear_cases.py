"""The cases of the losses from hidden states, beside torch's and beside the bare products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmloss_ext
from bench.cases import Case
from bench.peers import linear_peers
from bench.timing import Contender


class _Projection:
    """Hidden states, a weight and targets of one size."""

    def __init__(
        self, tokens: int, features: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        like = {"generator": generator, "device": device}
        self.hidden = torch.randn(tokens, features, **like).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, features, **like) * 0.02
        self.weight = weight.to(dtype).requires_grad_()
        self.target = torch.randint(0, vocab_size, (tokens,), **like)
        self.few = self.target.clone()
        self.few[torch.randperm(tokens, **like)[: tokens * 3 // 4]] = -100

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


def gpu_linear_cases() -> list[Case]:
    """The size that the peers publish, in bfloat16."""
    cases = linear_cases(8192, 4096, 128256, (torch.bfloat16,), "cuda", (1024, 2048, 8192))
    return cases[:1]


def linear_cases(
    tokens: int = 2048,
    features: int = 768,
    vocab_size: int = 50257,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    device: str = "cpu",
    chunks: tuple[int, ...] = (256, 512, 1024),
) -> list[Case]:
    """A size, beside eager torch, torch's chunks, the products alone and the peers."""
    cases = []
    for dtype in dtypes:
        inputs = _Projection(tokens, features, vocab_size, dtype, device)
        loss = llmloss_ext.linear_cross_entropy
        ours = inputs.step(loss, inputs.target)
        contenders = [
            Contender("llmloss", ours),
            Contender("torch", inputs.step(_eager, inputs.target)),
            *(Contender(f"products/{c}", inputs.products(c)) for c in chunks),
            *(
                Contender(peer.name, inputs.step(peer.loss, inputs.target))
                for peer in (linear_peers() if device == "cuda" else [])
                if peer.loss is not None
            ),
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
