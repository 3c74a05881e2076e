"""Functions of rows of logits that are torch arithmetic, for some rows at a time.

Their float32 copies of the logits, and what backward needs of them, then exist for a chunk only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
"""Of logits (..., V), of what else belongs to the tokens, (..., k) each, and of what all share: a
number per token."""


def masked(
    function: RowFunction, valid: Tensor | None, *inputs: Tensor, shared: Sequence[Tensor] = ()
) -> Tensor:
    """The function; 0 where not valid, whatever stands there, with a gradient of exactly zero."""
    if valid is None:
        return function(*inputs, *shared)
    rows = function(*(torch.where(valid.unsqueeze(-1), t, 0) for t in inputs), *shared)
    return torch.where(valid, rows, 0.0)


def by_rows(
    function: RowFunction,
    logits: Tensor,
    others: tuple[Tensor, ...],
    valid: Tensor | None,
    shared: tuple[Tensor, ...] = (),
) -> Tensor:
    """`masked` for some rows at a time, differentiable with respect to logits and ``shared``.

    Args:
        function: What to compute.
        logits: (..., V). Rows of any stride are read in place.
        others: (..., k) each, without a gradient.
        valid: (...) bool; None: all.
        shared: What no row has for itself, such as the scale of all logits.

    Returns:
        (...), float32 (float64 for float64).
    """
    others = tuple(t.detach() for t in others)
    if in_transform() or torch.compiler.is_compiling() or not logits.numel():
        return masked(function, valid, logits, *others, shared=shared)
    tokens = logits.numel() // logits.shape[-1]
    size = (tokens, 1, logits.shape[-1])
    planned = plan(*size, real_of(logits), logits.device, needs_grad=(True, False))
    chunk = max(planned.chunk_tokens // COPIES, 1)
    flat = None if valid is None else valid.reshape(-1)
    rows: Tensor = _ByRows.apply(  # type: ignore[no-untyped-call]
        _as_rows(logits), flat, function, chunk, len(shared), *shared, *map(_as_rows, others)
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
        shared_count: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logits, valid, *tensors)
        ctx.function, ctx.chunk, ctx.shared_count = function, chunk, shared_count
        shared, others = tensors[:shared_count], tensors[shared_count:]
        tokens = logits.numel() // logits.shape[-1]
        result = torch.zeros(tokens, dtype=real_of(logits), device=logits.device)
        for rows, keep in _chunks(tokens, chunk, valid):
            inputs = (_take(t, rows) for t in (logits, *others))
            put(result, rows, masked(function, keep, *inputs, shared=shared))
        return result

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        logits, valid, *tensors = ctx.saved_tensors
        shared, others = tensors[: ctx.shared_count], tensors[ctx.shared_count :]
        # Of the logits, and of what is shared.
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5 : 5 + len(shared)]]
        if torch.is_grad_enabled():  # create_graph
            shape = logits.shape[:-1]
            keep = None if valid is None else valid.reshape(shape)
            safe = spared(logits, grad_rows)
            result = masked(ctx.function, keep, safe, *others, shared=shared)
            upstream = grad_rows.reshape(shape)
            of_logits, *of_shared = _gradients(
                result, (logits, *shared), needed, upstream, create_graph=True
            )
        else:
            # Rows without a gradient from above have none, whatever they hold.
            has_gradient = grad_rows != 0
            valid = has_gradient if valid is None else valid & has_gradient
            of_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
            out = of_logits.view(-1, logits.shape[-1])
            totals = [torch.zeros_like(t, dtype=torch.float64) for t in shared]
            for rows, keep in _chunks(len(out), ctx.chunk, valid):
                parts = [_take(t, rows) for t in others]
                leaves = [t.detach() for t in (_take(logits, rows), *shared)]
                for leaf, is_needed in zip(leaves, needed, strict=True):
                    leaf.requires_grad_(is_needed)
                with torch.enable_grad():
                    result = masked(ctx.function, keep, leaves[0], *parts, shared=leaves[1:])
                found = _gradients(result, leaves, needed, take(grad_rows, rows))
                if found[0] is not None:
                    put(out, rows, found[0])
                totals = [t if g is None else t + g for t, g in zip(totals, found[1:], strict=True)]
            of_shared = [t.to(x.dtype) for t, x in zip(totals, shared, strict=True)]
        return (of_logits, None, None, None, None, *of_shared, *(None for _ in others))


def _gradients(
    result: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    upstream: Tensor,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """For each input; None where it is not needed."""
    wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(result, wanted, upstream, create_graph=create_graph))
    return [next(found) if is_needed else None for is_needed in needed]


def _chunks(tokens: int, chunk: int, valid: Tensor | None) -> Iterator[tuple[Rows, Tensor | None]]:
    """Rows, and which of them are valid. Where it costs no waiting, others are not among them."""
    drop = valid is not None and can_read(valid)
    for rows in chunk_rows(tokens, ChunkLimit(chunk, is_even=False), valid if drop else None):
        yield rows, None if drop or valid is None else take(valid, rows)
