"""Functions of rows of logits that are torch arithmetic, from hidden states: a chunk at a time.

What the kernels do not have. Like `llmloss_ext.rowwise` for logits that are there: float32 copies
exist for a few rows at a time, and backward computes each chunk's logits again, four products in
all. A function is known by its name, since operators, which compilers do not look into, take no
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..composite import only, real_of
from ..divergence import COPIES
from ..ops import in_transform
from ..ops.namespace import qualified
from ..ops.rows import put, take
from .operators import pack_limit, unpack_limit
from .planning import chunk_limit
from .projection import Gradients, Projection, as_rows, check_projection, to_dtype_of_products
from .walk import or_empty

__all__ = ["Rows", "linear_rows", "row_function"]


class Rows(NamedTuple):
    """What a row function is given."""

    logits: Tensor
    """(n, V): without padding."""
    others: list[Tensor]
    """What belongs to the tokens, (n, ...) each, without a gradient."""
    shared: list[Tensor]
    """What belongs to all of them, and may have a gradient."""
    numbers: Sequence[float]


RowFunction = Callable[[Rows], Tensor]
"""Returns (n, k) in float32 (float64 for float64)."""

_FUNCTIONS: dict[str, RowFunction] = {}


def row_function(function: RowFunction) -> RowFunction:
    """Makes a function known to `linear_rows`, by its name."""
    _FUNCTIONS[function.__name__] = function
    return function


class _Call(NamedTuple):
    """What the operators take beside tensors."""

    name: str
    numbers: list[float]
    width: int
    """k."""
    vocab_size: int
    limit: list[int]
    drop: bool


def linear_rows(
    function: RowFunction,
    width: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    others: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    numbers: Sequence[float] = (),
    valid: Tensor | None = None,
    vocab_size: int,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
) -> Tensor:
    """The function of the rows of ``hidden @ weight.T + bias``, differentiable.

    Under torch.func transforms, and for gradients of gradients, the logits are there whole.

    Args:
        function: A `row_function`. That of a row may depend on no other row.
        width: k.
        hidden: (..., D).
        weight: (V, D).
        bias: (V).
        others: (..., m) each.
        shared: Of any shape.
        numbers: Options of the function.
        valid: (...) bool: other rows are 0, with a gradient of exactly zero, whatever stands there.
        vocab_size: The classes that take part.
        chunk_tokens: See `llmloss_ext.options`, as the next two.
        max_chunk_bytes: Of a chunk's logits.
        drop_ignored: Whether rows that are not valid are left out of the products.

    Returns:
        (..., k).

    Raises:
        ValueError: Hidden states and weight do not fit, or a chunk cannot be so large.
        RuntimeError: A wrong dtype or device.
    """
    check_projection(hidden, weight, bias)
    shape, hidden = hidden.shape[:-1], as_rows(to_dtype_of_products(hidden, weight))
    limit = chunk_limit(
        weight.shape[0], hidden.dtype, hidden.device.type, chunk_tokens, max_chunk_bytes
    )
    if drop_ignored is None:
        drop_ignored = hidden.device.type == "cpu"
    call = _Call(
        function.__name__, [float(x) for x in numbers], width, vocab_size, pack_limit(limit),
        drop_ignored and valid is not None,
    )  # fmt: skip
    of_tokens = [as_rows(t.detach()) for t in others]
    valid = None if valid is None else valid.reshape(-1)
    if in_transform():
        rows = _composed(call, hidden, weight, bias, of_tokens, list(shared), valid)
    else:
        rows = _LinearRows.apply(  # type: ignore[no-untyped-call]
            call, valid, len(of_tokens), hidden, weight, bias, *of_tokens, *shared
        )
    return rows.reshape(*shape, width)


def _composed(
    call: _Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    others: list[Tensor],
    shared: list[Tensor],
    valid: Tensor | None,
) -> Tensor:
    """With every derivative, from whole logits."""
    used = call.vocab_size
    if valid is not None:
        hidden = only(valid, hidden)
    logits = hidden @ weight[:used].to(hidden.dtype).t()
    if bias is not None:
        logits = logits + bias[:used].to(hidden.dtype)
    return _masked(_FUNCTIONS[call.name], Rows(logits, others, shared, call.numbers), valid)


def _masked(function: RowFunction, rows: Rows, valid: Tensor | None) -> Tensor:
    """The function, 0 where not valid, whatever stands there."""
    if valid is None:
        return function(rows)

    def kept(x: Tensor) -> Tensor:
        return torch.where(valid.reshape(-1, *(1,) * (x.dim() - 1)), x, 0)

    clean = rows._replace(logits=kept(rows.logits), others=[kept(x) for x in rows.others])
    return only(valid, function(clean))


@torch.library.custom_op(qualified("linear_rows"), mutates_args=())
def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    others: Sequence[Tensor],
    shared: Sequence[Tensor],
    valid: Tensor | None,
    name: str,
    numbers: Sequence[float],
    width: int,
    vocab_size: int,
    limit: Sequence[int],
    drop: bool,
) -> Tensor:
    """The function of each row; 0 where not valid."""
    real = real_of(hidden)
    result = torch.zeros(hidden.shape[0], width, dtype=real, device=hidden.device)
    projection = Projection(hidden, weight, bias, vocab_size)
    for chunk in projection.chunks(unpack_limit(limit), valid, drop=drop):
        parts = [take(t, chunk.rows) for t in others]
        found = result.new_empty(chunk.hidden.shape[0], width)
        for at in _slices(len(found), vocab_size):
            rows = Rows(
                chunk.logits[at, :vocab_size], [t[at] for t in parts], list(shared), numbers
            )
            keep = None if chunk.counts is None else chunk.counts[at]
            found[at] = _masked(_FUNCTIONS[name], rows, keep)
        put(result, chunk.rows, found)
        del chunk
    return result


@_rows.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, others, shared, valid, name, numbers, width, vocab_size, limit, drop
):  # fmt: skip
    return hidden.new_empty((hidden.shape[0], width), dtype=real_of(hidden))


@torch.library.custom_op(qualified("linear_rows_backward"), mutates_args=())
def _rows_backward(
    grad_rows: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    others: Sequence[Tensor],
    shared: Sequence[Tensor],
    valid: Tensor | None,
    name: str,
    numbers: Sequence[float],
    width: int,
    vocab_size: int,
    limit: Sequence[int],
    drop: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight, bias and shared; without elements where not needed."""
    real = real_of(hidden)
    with_hidden, with_weight, with_bias, *with_shared = needs
    projection = Projection(hidden, weight, bias, vocab_size)
    gradients = Gradients(projection, with_hidden, with_weight, with_bias, real, weight.dtype)
    # In float32 until all chunks are added.
    sums = [
        torch.zeros_like(t, dtype=real_of(t)) if asked else t.new_empty(0)
        for t, asked in zip(shared, with_shared, strict=True)
    ]
    has_gradient = (grad_rows != 0).any(-1)
    counts = has_gradient if valid is None else has_gradient & valid
    # Inside an operator, which a compiled graph calls, autograd is switched off.
    key = torch._C.DispatchKey.AutogradFunctionality
    for chunk in projection.chunks(unpack_limit(limit), counts, drop=drop):
        parts = [take(t, chunk.rows) for t in others]
        upstream = take(grad_rows, chunk.rows)
        for at in _slices(upstream.shape[0], vocab_size):
            keep = None if chunk.counts is None else chunk.counts[at]
            of_rows = upstream[at] if keep is None else only(keep, upstream[at])
            with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
                leaf = chunk.logits[at, :vocab_size].detach().requires_grad_()
                leaves = [
                    t.detach().requires_grad_(asked)
                    for t, asked in zip(shared, with_shared, strict=True)
                ]
                rows = Rows(leaf, [t[at] for t in parts], leaves, numbers)
                found = _masked(_FUNCTIONS[name], rows, keep)
                wanted = [leaf, *(t for t, asked in zip(leaves, with_shared, strict=True) if asked)]
                of_logits, *rest = torch.autograd.grad(found, wanted, of_rows, allow_unused=True)
            for i, asked in enumerate(with_shared):
                gradient = rest.pop(0) if asked else None
                if gradient is not None:
                    sums[i] += gradient
            chunk.logits[at, :vocab_size] = 0 if of_logits is None else of_logits
        gradients.add(chunk)
        del chunk
    grad_bias = gradients.bias
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return [
        or_empty(gradients.hidden, hidden),
        or_empty(gradients.weight_result(), hidden),
        or_empty(grad_bias, hidden),
        *(s.to(t.dtype) for s, t in zip(sums, shared, strict=True)),
    ]


@_rows_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_rows, hidden, weight, bias, others, shared, valid, name, numbers, width, vocab_size, limit,
    drop, needs,
):  # fmt: skip
    tensors = [hidden, weight, bias, *shared]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if asked and t is not None
        else hidden.new_empty(0)
        for t, asked in zip(tensors, needs, strict=True)
    ]


_LEAST_ELEMENTS = 1 << 18
"""Of the logits that have float32 copies at a time: fewer are not worth their calls."""


def _slices(rows: int, columns: int) -> list[slice]:
    """Rows of a chunk that have float32 copies at a time."""
    step = max(-(-rows // COPIES), _LEAST_ELEMENTS // columns, 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


class _LinearRows(Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, valid: Tensor | None, others: int, *tensors: Tensor | None
    ) -> Tensor:
        hidden, weight, bias, *rest = tensors
        ctx.save_for_backward(valid, *tensors)
        ctx.call, ctx.others = call, others
        result: Tensor = _rows(hidden, weight, bias, rest[:others], rest[others:], valid, *call)
        return result

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        valid, hidden, weight, bias, *rest = ctx.saved_tensors
        others, shared = rest[: ctx.others], rest[ctx.others :]
        given = ctx.needs_input_grad[3:]
        needs = [*given[:3], *given[3 + ctx.others :]]
        nothing = (None,) * ctx.others
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            result = _composed(ctx.call, hidden, weight, bias, others, shared, valid)
            inputs = [hidden, weight, bias, *shared]
            wanted = [t for t, asked in zip(inputs, needs, strict=True) if asked]
            found = list(
                torch.autograd.grad(result, wanted, grad_rows, create_graph=True, allow_unused=True)
            )
            gradients = [found.pop(0) if asked else None for asked in needs]
        else:
            results = _rows_backward(
                grad_rows, hidden, weight, bias, others, shared, valid, *ctx.call, needs
            )
            gradients = [g if asked else None for g, asked in zip(results, needs, strict=True)]
        return (None, None, None, *gradients[:3], *nothing, *gradients[3:])
