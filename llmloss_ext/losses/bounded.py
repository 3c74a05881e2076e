"""Guards of losses over log-probabilities: which tokens count, and no inf or nan in a gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Bounds",
    "bounded_exponent",
    "check_same_shape",
    "finite",
    "finite_gradient",
    "of_tokens_or_sequences",
    "valid_tokens",
    "where_valid",
]


def valid_tokens(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as bool, of the shape of the log-probabilities."""
    check_same_shape(like, mask=mask)
    return mask.bool()


def check_same_shape(log_probs: Tensor, **others: Tensor | None) -> None:
    """No broadcasting: a tensor of another shape is a mistake."""
    for name, other in others.items():
        if other is not None and other.shape != log_probs.shape:
            raise ValueError(
                f"{name} must have the shape of the log-probabilities, {tuple(log_probs.shape)}, "
                f"got {tuple(other.shape)}"
            )


def of_tokens_or_sequences(name: str, x: Tensor, log_probs: Tensor) -> Tensor:
    """One number for each token, (..., S), or for each sequence, (...) or (..., 1), as (..., 1)."""
    leading = log_probs.shape[:-1]
    if x.shape == leading:
        return x.unsqueeze(-1)
    if x.shape not in (log_probs.shape, (*leading, 1)):
        raise ValueError(
            f"{name} must have one number per token, {tuple(log_probs.shape)}, or per sequence, "
            f"{tuple(leading)} or {(*leading, 1)}; got {tuple(x.shape)}"
        )
    return x


def where_valid(valid: Tensor, x: Tensor) -> Tensor:
    """0 at tokens that do not count: a padding's -inf or nan gets into no exp, and no gradient."""
    return torch.where(valid, x, 0.0)


_LARGEST_EXPONENT = {
    torch.float64: 709.782712893384,
    torch.float32: 88.72283172607422,
    torch.bfloat16: 88.5,
    torch.float16: 11.0859375,
}
"""The largest number of each type whose exponential is finite."""


def bounded_exponent(log_ratio: Tensor) -> Tensor:
    """The logarithm of a ratio, as far as the ratio is finite; beyond, it is constant."""
    return log_ratio.clamp_max(_LARGEST_EXPONENT[log_ratio.dtype])


def finite(x: Tensor) -> Tensor:
    """The nearest finite number, constant where that is another: no inf gets into a gradient."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


class Bounds(NamedTuple):
    """How large the parts of a token's loss may get, so that the gradient of a type stays finite.

    Losses are computed in float32 or float64 whatever the log-probabilities are, but their gradient
    is of the log-probabilities' type: of float16, nothing beyond 65504. Where a part is beyond its
    bound it is constant. The gradient is a sum of few parts, of which each may have its share.
    """

    exponent: float
    """The largest logarithm of a ratio."""
    largest: float
    """The largest part."""

    @classmethod
    def of(cls, dtype: torch.dtype, parts: int = 8) -> Bounds:
        """Those of a type of log-probabilities, whose gradient is the sum of so many parts."""
        return cls(_LARGEST_EXPONENT[dtype] - math.log(parts), torch.finfo(dtype).max / parts)

    def exp(self, log_ratio: Tensor) -> Tensor:
        """The ratio, as far as it may grow."""
        return torch.exp(log_ratio.clamp_max(self.exponent))

    def finite(self, x: Tensor) -> Tensor:
        """The part, as far as it may grow."""
        return x.clamp(-self.largest, self.largest)


def finite_gradient(x: Tensor) -> Tensor:
    """x, whose gradient is the nearest finite number of x's dtype.

    A float32 gradient on its way to a float16 leaf, or the product of two derivatives, may overflow
    though each factor is finite; an inf that a 0 multiplies further up would be nan.
    """
    compiling = torch.compiler.is_compiling()  # which refuses whatever has a derivative forwards
    function = _FiniteGradient if compiling else _FiniteGradientBothWays
    return function.apply(x)  # type: ignore[no-untyped-call]


class _FiniteGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return finite(grad)


class _FiniteGradientBothWays(_FiniteGradient):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)
