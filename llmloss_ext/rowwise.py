"""Functions of rows of logits that are torch arithmetic, for some rows at a time.

Their float32 copies of the logits, and what backward needs of them, then exist for a chunk only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .composite import real_of, spared
from .divergence import COPIES
from .linear.planning import ChunkLimit, plan
from .linear.projection import chunk_rows
from .ops import can_read, in_transform
from .ops.rows import Rows, put, take

RowFunction = Callable[..., Tensor]
"""Of logits (..., V) and of what else belongs to the tokens, (..., k) each: a number per token."""


def masked(function: RowFunction, valid: Tensor | None, *inputs: Tensor) -> Tensor:
    """The function; 0 where not valid, whatever stands there, with a gradient of exactly zero."""
    if valid is None:
        return function(*inputs)
    rows = function(*(torch.where(valid.unsqueeze(-1), t, 0) for t in inputs))
    return torch.where(valid, rows, 0.0)


def by_rows(
    function: RowFunction, logits: Tensor, others: tuple[Tensor, ...], valid: Tensor | None
) -> Tensor:
    """`masked` for some rows at a time, differentiable with respect to the logits.

    Args:
        function: What to compute.
        logits: (..., V). Rows of any stride are read in place.
        others: (..., k) each, without a gradient.
        valid: (...) bool; None: all.

    Returns:
        (...), float32 (float64 for float64).
    """
    others = tuple(t.detach() for t in others)
    if in_transform() or torch.compiler.is_compiling() or not logits.numel():
        return masked(function, valid, logits, *others)
    tokens = logits.numel() // logits.shape[-1]
    size = (tokens, 1, logits.shape[-1])
    planned = plan(*size, real_of(logits), logits.device, needs_grad=(True, False))
    chunk = max(planned.chunk_tokens // COPIES, 1)
    flat = None if valid is None else valid.reshape(-1)
    rows: Tensor = _ByRows.apply(  # type: ignore[no-untyped-call]
        _as_rows(logits), flat, function, chunk, *map(_as_rows, others)
    )
    return rows.reshape(logits.shape[:-1])


def _as_rows(tensor: Tensor) -> Tensor:
    """As (N, k) if that needs no copy."""
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return tensor


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of (..., k), counted over all leading dimensions; no others are copied."""
    if tensor.dim() == 2:
        return take(tensor, rows)
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=tensor.device)
    return tensor[torch.unravel_index(rows, tensor.shape[:-1])]


class _ByRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        valid: Tensor | None,
        function: RowFunction,
        chunk: int,
        *others: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logits, valid, *others)
        ctx.function, ctx.chunk = function, chunk
        tokens = logits.numel() // logits.shape[-1]
        result = torch.zeros(tokens, dtype=real_of(logits), device=logits.device)
        for rows, keep in _chunks(tokens, chunk, valid):
            put(result, rows, masked(function, keep, *(_take(t, rows) for t in (logits, *others))))
        return result

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        logits, valid, *others = ctx.saved_tensors
        nothing = (None,) * (3 + len(others))
        if torch.is_grad_enabled():  # create_graph
            shape = logits.shape[:-1]
            keep = None if valid is None else valid.reshape(shape)
            safe = spared(logits, grad_rows)
            result = masked(ctx.function, keep, safe, *others)
            (gradient,) = torch.autograd.grad(
                result, logits, grad_rows.reshape(shape), create_graph=True
            )
            return (gradient, *nothing)
        # Rows without a gradient from above have none, whatever they hold.
        has_gradient = grad_rows != 0
        valid = has_gradient if valid is None else valid & has_gradient
        gradient = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
        out = gradient.view(-1, logits.shape[-1])
        for rows, keep in _chunks(len(out), ctx.chunk, valid):
            parts = [_take(t, rows) for t in others]
            with torch.enable_grad():
                leaf = _take(logits, rows).detach().requires_grad_()
                result = masked(ctx.function, keep, leaf, *parts)
            put(out, rows, torch.autograd.grad(result, leaf, take(grad_rows, rows))[0])
        return (gradient, *nothing)


def _chunks(tokens: int, chunk: int, valid: Tensor | None) -> Iterator[tuple[Rows, Tensor | None]]:
    """Rows, and which of them are valid. Where it costs no waiting, others are not among them."""
    drop = valid is not None and can_read(valid)
    for rows in chunk_rows(tokens, ChunkLimit(chunk, is_even=False), valid if drop else None):
        yield rows, None if drop or valid is None else take(valid, rows)
