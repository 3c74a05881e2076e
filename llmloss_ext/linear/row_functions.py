"""Functions of rows of logits that are torch arithmetic, from hidden states: a chunk at a time.

What the kernels do not have. Like `llmloss_ext.rowwise` for logits that are there: float32 copies
exist for a few rows at a time, and backward computes each chunk's logits again, four products in
all. A function is known by its name, since operators, which compilers do not look into, take no
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_scale
from ..composite import only, real_of
from ..divergence import COPIES
from ..ops import in_transform
from ..ops.namespace import qualified
from ..ops.rows import put, take
from ..options import LogitOptions, tempered, with_defaults
from .operators import pack_limit, unpack_limit, whole_logits
from .planning import chunk_limit, dtype_of_logits
from .projection import Gradients, Projection, as_rows, check_projection, to_dtype_of_products
from .walk import or_empty

__all__ = ["OF_WALK", "RowOptions", "Rows", "linear_rows", "row_function"]


class Rows(NamedTuple):
    """What a row function is given."""

    logits: Tensor
    """(n, V): without padding."""
    others: list[Tensor]
    """What belongs to the tokens, (n, ...) each, without a gradient."""
    shared: list[Tensor]
    """What belongs to all of them, and may have a gradient."""
    numbers: Sequence[float]


class RowOptions(NamedTuple):
    """How the logits of rows are read, and walked through: as users give it."""

    softcap: float | None
    logit_scale: float | Tensor
    temperature: float
    vocab_size: int | None
    chunk_tokens: int | None
    max_chunk_bytes: int | None
    drop_ignored: bool | None
    logits_dtype: torch.dtype | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RowOptions:
        """Those that are given, and defaults.

        Raises:
            TypeError: There are other options.
        """
        return cls(**with_defaults(options, cls._fields))

    @property
    def walk(self) -> dict[str, Any]:
        """The options of `linear_rows`."""
        return {name: getattr(self, name) for name in OF_WALK}

    def checked(self, ignore_index: int, columns: int, like: Tensor) -> tuple[LogitOptions, Tensor]:
        """The options of logits with so many columns, and their scale as a tensor, 0-d.

        Temperature is in both.

        Raises:
            ValueError, TypeError, RuntimeError: As `LogitOptions.of` and `check_scale`.
        """
        options = LogitOptions.of(
            self.softcap, self.logit_scale, self.vocab_size, ignore_index, columns,
            self.temperature,
        )  # fmt: skip
        scale = tempered(check_scale(self.logit_scale, like), self.temperature)
        if scale is None:
            scale = torch.full((), options.scale, dtype=real_of(like), device=like.device)
        return options, scale.reshape(())


OF_WALK = ("chunk_tokens", "max_chunk_bytes", "drop_ignored", "logits_dtype")
"""The options of a walk: for hidden states only."""

RowFunction = Callable[[Rows], Tensor]
"""Returns (n, k) in float32 (float64 for float64)."""

_FUNCTIONS: dict[str, RowFunction] = {}


def row_function(function: RowFunction) -> RowFunction:
    """Makes a function known to `linear_rows`, by its name."""
    _FUNCTIONS[function.__name__] = function
    return function


class Given(NamedTuple):
    """What the operators take, in their order: first tensors, then the call."""

    hidden: Any
    """(N, D), in the dtype of the products."""
    weight: Any
    bias: Any
    others: Any
    """(N, ...) each."""
    shared: Any
    valid: Any
    """(N) bool; None: all."""
    name: str
    numbers: Sequence[float]
    width: int
    """k."""
    vocab_size: int
    limit: Sequence[int]
    """Of the chunks, packed."""
    drop: bool
    has_float32_logits: bool
    """Also those of 16-bit products."""

    @property
    def projection(self) -> Projection:
        """Of the hidden states."""
        return Projection(
            self.hidden, self.weight, self.bias, self.vocab_size,
            has_float32_logits=self.has_float32_logits,
        )  # fmt: skip

    def rows(
        self, logits: Tensor, others: list[Tensor], valid: Tensor | None, shared: list[Tensor]
    ) -> Tensor:
        """The function of some rows, 0 where not valid, whatever stands there."""
        rows = Rows(logits, others, shared, self.numbers)
        if valid is None:
            return _FUNCTIONS[self.name](rows)

        def kept(x: Tensor) -> Tensor:
            return torch.where(valid.reshape(-1, *(1,) * (x.dim() - 1)), x, 0)

        clean = rows._replace(logits=kept(logits), others=[kept(x) for x in others])
        return only(valid, _FUNCTIONS[self.name](clean))

    def composed(self) -> Tensor:
        """With every derivative, from whole logits."""
        logits = whole_logits(
            self.hidden, self.weight, self.bias, self.valid, self.vocab_size,
            has_float32_logits=self.has_float32_logits,
        )  # fmt: skip
        return self.rows(logits, self.others, self.valid, self.shared)


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor[] others, Tensor[] shared, Tensor? valid, "
    "str name, float[] numbers, SymInt width, SymInt vocab_size, SymInt[] limit, bool drop, "
    "bool has_float32_logits"
)
"""Of the fields of `Given`."""


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
    logits_dtype: torch.dtype | None = None,
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
        chunk_tokens: See `llmloss_ext.options`, as the next three.
        max_chunk_bytes: Of a chunk's logits.
        drop_ignored: Whether rows that are not valid are left out of the products.
        logits_dtype: Of the logits that the function is given.

    Returns:
        (..., k).

    Raises:
        ValueError: Hidden states and weight do not fit, or a chunk cannot be so large.
        RuntimeError: A wrong dtype or device.
    """
    is_wide = check_projection(hidden, weight, bias, logits_dtype)
    shape, hidden = hidden.shape[:-1], as_rows(to_dtype_of_products(hidden, weight))
    dtype = dtype_of_logits(hidden.dtype, has_float32_logits=is_wide)
    limit = chunk_limit(weight.shape[0], dtype, hidden.device.type, chunk_tokens, max_chunk_bytes)
    if drop_ignored is None:
        drop_ignored = hidden.device.type == "cpu"
    given = Given(
        hidden, weight, bias, [as_rows(t.detach()) for t in others], list(shared),
        None if valid is None else valid.reshape(-1),
        function.__name__, [float(x) for x in numbers], width, vocab_size, pack_limit(limit),
        drop_ignored and valid is not None, is_wide,
    )  # fmt: skip
    if in_transform():
        rows = given.composed()
    else:
        rows = _LinearRows.apply(given, hidden, weight, bias, *shared)  # type: ignore[no-untyped-call]
    return rows.reshape(*shape, width)


@torch.library.custom_op(qualified("linear_rows"), mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def _rows(*arguments: Any) -> Tensor:
    """The function of each row; 0 where not valid."""
    given = Given(*arguments)
    hidden = given.hidden
    result = torch.zeros(hidden.shape[0], given.width, dtype=real_of(hidden), device=hidden.device)
    for chunk in given.projection.chunks(unpack_limit(given.limit), given.valid, drop=given.drop):
        parts = [take(t, chunk.rows) for t in given.others]
        found = result.new_empty(chunk.hidden.shape[0], given.width)
        for at in _slices(len(found), given.vocab_size):
            logits = chunk.logits[at, : given.vocab_size]
            keep = None if chunk.counts is None else chunk.counts[at]
            found[at] = given.rows(logits, [t[at] for t in parts], keep, list(given.shared))
        put(result, chunk.rows, found)
        del chunk
    return result


@_rows.register_fake
def _(*arguments: Any) -> Tensor:
    given = Given(*arguments)
    empty: Tensor = given.hidden.new_empty(
        (given.hidden.shape[0], given.width), dtype=real_of(given.hidden)
    )
    return empty


@torch.library.custom_op(
    qualified("linear_rows_backward"), mutates_args=(),
    schema=f"(Tensor grad_rows, bool[] needs, {_SCHEMA}) -> Tensor[]",
)  # fmt: skip
def _rows_backward(grad_rows: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """The gradients of hidden, weight, bias and shared; without elements where not needed."""
    given = Given(*arguments)
    hidden, weight, bias, shared = given.hidden, given.weight, given.bias, given.shared
    with_hidden, with_weight, with_bias, *with_shared = needs
    gradients = Gradients(
        given.projection, with_hidden, with_weight, with_bias, real_of(hidden), weight.dtype
    )
    # In float32 until all chunks are added.
    sums = [
        torch.zeros_like(t, dtype=real_of(t)) if asked else t.new_empty(0)
        for t, asked in zip(shared, with_shared, strict=True)
    ]
    has_gradient = (grad_rows != 0).any(-1)
    counts = has_gradient if given.valid is None else has_gradient & given.valid
    # Inside an operator, which a compiled graph calls, autograd is switched off.
    key = torch._C.DispatchKey.AutogradFunctionality
    for chunk in given.projection.chunks(unpack_limit(given.limit), counts, drop=given.drop):
        parts = [take(t, chunk.rows) for t in given.others]
        upstream = take(grad_rows, chunk.rows)
        for at in _slices(upstream.shape[0], given.vocab_size):
            keep = None if chunk.counts is None else chunk.counts[at]
            of_rows = upstream[at] if keep is None else only(keep, upstream[at])
            with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
                leaf = chunk.logits[at, : given.vocab_size].detach().requires_grad_()
                leaves = [
                    t.detach().requires_grad_(asked)
                    for t, asked in zip(shared, with_shared, strict=True)
                ]
                found = given.rows(leaf, [t[at] for t in parts], keep, leaves)
                wanted = [leaf, *(t for t, asked in zip(leaves, with_shared, strict=True) if asked)]
                of_logits, *rest = torch.autograd.grad(found, wanted, of_rows, allow_unused=True)
            for i, asked in enumerate(with_shared):
                gradient = rest.pop(0) if asked else None
                if gradient is not None:
                    sums[i] += gradient
            chunk.logits[at, : given.vocab_size] = 0 if of_logits is None else of_logits
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
def _(grad_rows: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor]:
    given = Given(*arguments)
    tensors = [given.hidden, given.weight, given.bias, *given.shared]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if asked and t is not None
        else given.hidden.new_empty(0)
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
    def forward(ctx: Any, given: Given, *leaves: Tensor | None) -> Tensor:
        """Leaves: those of the tensors that may have a gradient."""
        hidden, weight, bias, *shared = leaves
        ctx.save_for_backward(given.valid, *given.others, *leaves)
        # Without the tensors, which are saved.
        ctx.given = given._replace(
            hidden=None, weight=None, bias=None, others=None, shared=None, valid=None
        )
        ctx.others = len(given.others)
        given = given._replace(hidden=hidden, weight=weight, bias=bias, shared=shared)
        result: Tensor = _rows(*given)
        return result

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        valid, *rest = ctx.saved_tensors
        others, leaves = rest[: ctx.others], rest[ctx.others :]
        hidden, weight, bias, *shared = leaves
        given = ctx.given._replace(
            hidden=hidden, weight=weight, bias=bias, others=others, shared=shared, valid=valid
        )
        needs = list(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            wanted = [t for t, asked in zip(leaves, needs, strict=True) if asked]
            found = list(
                torch.autograd.grad(
                    given.composed(), wanted, grad_rows, create_graph=True, allow_unused=True
                )
            )
            return (None, *(found.pop(0) if asked else None for asked in needs))
        results = _rows_backward(grad_rows, needs, *given)
        return (None, *(g if asked else None for g, asked in zip(results, needs, strict=True)))
