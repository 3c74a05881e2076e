"""A projection followed by a loss, which every test of the linear losses starts from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext import cross_entropy, linear_cross_entropy

N, D, V = 37, 16, 101


class Problem:
    """Hidden states, a projection, targets, in one dtype; and the same in float64."""

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        tokens: int = N,
        bias: bool = True,
    ) -> None:
        self.hidden = torch.randn(tokens, D, device=device).to(dtype)
        self.weight = (torch.randn(V, D, device=device) * 0.5).to(dtype)
        self.bias = torch.randn(V, device=device).to(dtype) if bias else None
        self.target = torch.randint(0, V, (tokens,), device=device)
        self.target[::5] = -100

    def leaves(self, double: bool = False) -> list[Tensor]:
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return [(t.double() if double else t).clone().requires_grad_() for t in tensors]

    def run(
        self, loss: Any, double: bool = False, upstream: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss's value and its gradients for hidden states, weight and bias."""
        leaves = self.leaves(double)
        value = loss(*leaves)
        if upstream is None:
            upstream = torch.ones_like(value)
        return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def linear(target: Tensor, **options: Any) -> Any:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)

    return loss


def reference(target: Tensor, **options: Any) -> Any:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cross_entropy(F.linear(hidden, weight, bias), target, **options)

    return loss


def error(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach().double(), exact.detach()
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-300))
