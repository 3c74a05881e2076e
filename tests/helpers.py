"""What the tests share: dtypes, the one table of tolerances, comparisons and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmloss_ext.tolerances import GRADIENT, VALUE

__all__ = ["FLOATS", "GRADIENT", "VALUE", "Passed", "assert_close", "gradients"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Passed(torch.autograd.Function):
    """``Passed.apply(logits, anchor)``: the same memory, as if a model had computed it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, anchor: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.new_zeros(())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """|actual - expected| <= tolerance max(1, |expected|); nan and inf must be in one place."""
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance,
        equal_nan=True,
    )  # fmt: skip


def gradients(
    loss: Callable[..., Tensor], *tensors: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss's value and its gradients for fresh leaves of ``tensors``."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    if upstream is None:
        upstream = torch.ones_like(value)
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))
