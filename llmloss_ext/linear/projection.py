"""The chunked projection: logits exist for one chunk of tokens at a time, and are overwritten.

Everything here works on (N, D) hidden states and is without derivatives; `operators` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import FLOATS, is_autocast
from ..composite import only, real_of
from ..ops.library import kernels
from ..ops.rows import Rows, count_of, put, take
from .cpu_products import is_upcast
from .planning import (
    UPCAST_TOKENS,
    ChunkLimit,
    block_rows,
    check_logits_dtype,
    dtype_of_logits,
    even_chunk,
    first_part_rows,
    is_one_product,
    rounded_rows,
    row_stride,
    upcast_rows,
)

_HUGE_PAGE = 2 << 20


def as_rows(hidden: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return hidden.reshape(-1, hidden.shape[-1])


def check_projection(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits_dtype: torch.dtype | None = None,
) -> bool:
    """Whether 16-bit products keep their logits in float32.

    Raises:
        ValueError, RuntimeError: ``hidden @ weight.T + bias`` cannot be computed, or not with such
            logits.
        TypeError: ``logits_dtype`` is no dtype.
    """
    if hidden.dtype not in FLOATS:
        raise RuntimeError(
            f"expected hidden states of float32, bfloat16, float16 or float64, got {hidden.dtype}"
        )
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "expected hidden states (..., D) and a weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"the weight is empty: {tuple(weight.shape)}")
    if weight.device != hidden.device:
        raise RuntimeError(
            f"expected input and weight on the same device, got {hidden.device} and {weight.device}"
        )
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise RuntimeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
    if weight.dtype != hidden.dtype and logits_dtype is None and not is_autocast(hidden):
        raise RuntimeError(
            f"expected input and weight of the same dtype, got {hidden.dtype} and {weight.dtype}; "
            "convert one, give logits_dtype, or use torch.autocast"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"the bias must have shape ({weight.shape[0]},) on {weight.device}, got "
            f"{tuple(bias.shape)} on {bias.device}"
        )
    return check_logits_dtype(logits_dtype, _dtype_of_products(hidden, weight))


def to_dtype_of_products(hidden: Tensor, weight: Tensor) -> Tensor:
    """Autocast's, if it is on (float64 stays); else the one that holds both operands."""
    return hidden.to(_dtype_of_products(hidden, weight))


def _dtype_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if not is_autocast(hidden):
        return torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.dtype == torch.float64:
        return hidden.dtype
    return torch.get_autocast_dtype(hidden.device.type)


def chunk_rows(tokens: int, limit: ChunkLimit, valid: Tensor | None) -> list[Rows]:
    """The rows of each chunk, none of which has more than the first.

    Args:
        tokens: N.
        limit: How many of them a chunk has.
        valid: (N) bool: rows that are not ignored, if the others are to be dropped. On CUDA their
            number has to be waited for.
    """
    indices = None if valid is None else valid.nonzero().squeeze(1)
    if indices is not None and indices.numel() < tokens:
        count = indices.numel()
        return list(torch.split(indices, even_chunk(count, limit.of(count)))) if count else []
    step = limit.of(tokens)
    return [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]


def new_buffer(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of many megabytes."""
    buffer = torch.empty(shape, dtype=dtype, device=like.device)
    if buffer.device.type == "cpu" and buffer.nbytes >= _HUGE_PAGE:
        kernels.prefer_huge_pages_(buffer)
    return buffer


@dataclass
class Chunk:
    """Some tokens: their rows, hidden states and logits (which may be overwritten).

    ``counts``: which of them take part; None: all. ``is_only``: there is no other chunk.
    """

    rows: Rows
    hidden: Tensor
    logits: Tensor
    counts: Tensor | None
    is_only: bool


class Projection:
    """``hidden @ weight.T + bias`` in the dtype of the hidden states, a chunk at a time.

    The first ``used`` rows of the weight are read; the others are padding, whatever they hold.

    Float32 logits of 16-bit operands: cuBLAS keeps what it has summed. A CPU has no such product,
    so it multiplies the operands in float32, of which it holds a few rows of each at a time; 16
    bits multiplied are exact in 24. So it does for logits of 16 bits if it has no products of them.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        used: int,
        *,
        has_float32_logits: bool = False,
    ) -> None:
        """Hidden states (N, D); weight (V, D); bias (V) or None."""
        self.hidden, self.columns, self.used = hidden, weight.shape[0], used
        self.logits_dtype = dtype_of_logits(hidden.dtype, has_float32_logits=has_float32_logits)
        # Under autocast the weight may be float32: one copy in the dtype of the products.
        self.weight = weight[:used].to(hidden.dtype)
        self.bias = None if bias is None else bias[:used].to(self.logits_dtype)

    def chunks(
        self,
        limit: ChunkLimit,
        counts: Tensor | None,
        *,
        drop: bool,
        every: Sequence[Rows] | None = None,
    ) -> Iterator[Chunk]:
        """Each chunk's logits, all in one buffer: a chunk ends where the next one begins.

        ``counts`` (N) bool: which tokens take part; None: all. ``drop``: the others are left out.
        ``every``: the rows of each chunk, where the limit does not say them.
        """
        tokens, dtype = self.hidden.shape[0], self.logits_dtype
        if every is None:
            every = chunk_rows(tokens, limit, counts if drop else None)
        shape = (max(map(count_of, every), default=0), row_stride(self.columns, dtype))
        buffer = new_buffer(self.hidden, shape, dtype)
        # oneDNN's products read a column too many and multiply it by 0: no nan may stand there.
        if self.used < shape[1]:
            buffer[:, self.used :] = 0
        for rows in every:
            hidden = take(self.hidden, rows)
            logits = buffer[: hidden.shape[0], : self.columns]
            self.project(hidden, logits)
            part = None if drop or counts is None else take(counts, rows)
            yield Chunk(rows, hidden, logits, part, is_only=len(every) == 1)

    def project(self, hidden: Tensor, logits: Tensor) -> None:
        """Writes the logits of hidden states; those of padding stay."""
        logits = logits[:, : self.used]
        is_wide = self.logits_dtype != hidden.dtype
        if not logits.is_cuda and (is_wide or is_upcast(hidden.dtype, logits.device.type)):
            self._project_upcast(hidden, logits)
            return
        # Products into `out`, here and below, are not autocast's to round.
        if is_wide:
            torch.mm(hidden, self.weight.t(), out_dtype=self.logits_dtype, out=logits)  # type: ignore[call-overload]
            if self.bias is not None:
                logits += self.bias
        elif self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)

    def _project_upcast(self, hidden: Tensor, logits: Tensor) -> None:
        for tokens in _slices(hidden.shape[0], UPCAST_TOKENS):
            left = hidden[tokens].to(torch.float32)
            for rows, weight in self._upcast_weight():
                place = logits[tokens, rows]
                product = place if place.dtype == torch.float32 else left.new_empty(place.shape)
                if self.bias is None:
                    torch.mm(left, weight.t(), out=product)
                else:
                    torch.addmm(self.bias[rows].to(torch.float32), left, weight.t(), out=product)
                if product is not place:
                    place.copy_(product)

    def back_project(self, gradient: Tensor, result: Tensor) -> None:
        """Writes ``gradient @ weight``, (n, D), of a gradient of logits without their padding.

        The gradient of 16-bit operands may be float32 (see `rounded`); the result has their dtype.
        """
        is_wide = gradient.dtype != result.dtype
        if result.is_cuda or not (is_wide or is_upcast(result.dtype, result.device.type)):
            torch.mm(gradient, self.weight, out=result)
            return
        for tokens in _slices(result.shape[0], UPCAST_TOKENS):
            place = result[tokens]
            total = torch.zeros_like(place, dtype=torch.float32)
            for rows, weight in self._upcast_weight():
                torch.addmm(total, gradient[tokens, rows].to(torch.float32), weight, out=total)
            place.copy_(total)

    def _upcast_weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float32, some rows at a time: in one buffer."""
        rows, columns = self.weight.shape
        height = min(upcast_rows(columns), max(rows, 1))  # a shard may have padding alone
        buffer = self.weight.new_empty(height, columns, dtype=torch.float32)
        for block in _slices(rows, height):
            yield block, buffer[: block.stop - block.start].copy_(self.weight[block])


def _slices(count: int, height: int) -> Iterator[slice]:
    """Of so many rows, ``height`` at a time."""
    for begin in range(0, count, height):
        yield slice(begin, min(begin + height, count))


def rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 gradient of logits, rounded to 16 bits within its own memory, which is overwritten.

    A CPU without products of 16 bits gets the rounded numbers in float32.
    """
    narrow = gradient.view(dtype)[:, : gradient.shape[1]]
    if is_upcast(dtype, gradient.device.type):
        narrow = gradient
    # A row's 16 bits lie over the first half of its own 32: some rows at a time are copied.
    height = rounded_rows(gradient.shape[1])
    for rows in _slices(gradient.shape[0], height):
        narrow[rows] = gradient[rows].to(dtype)
    return narrow


class WeightGradient:
    """The gradient of a weight (V, D), summed over chunks and rounded once.

    That of an only chunk is one product, which rounds what it has summed itself.

    Where the result has half the bytes of the sums, these lie in two parts. The first is rounded
    into the first half of its own memory and the second into what that leaves: sums and result are
    never there side by side, and the result holds on to no memory but its own.
    """

    def __init__(
        self,
        like: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        result_dtype: torch.dtype,
        accumulator: Tensor | None = None,
    ) -> None:
        """dtype: of the sums. accumulator: that of the caller, to which is added instead."""
        self._like, self._shape, self._dtype, self._result_dtype = like, shape, dtype, result_dtype
        self._is_empty = accumulator is None
        self._parts = [] if accumulator is None else [accumulator]

    def _new_parts(self, *, is_only: bool) -> list[Tensor]:
        dtype, result_dtype = self._dtype, self._result_dtype
        if is_only and is_one_product(self._like.dtype, result_dtype):
            dtype = result_dtype
        rows, columns = self._shape
        first = first_part_rows(rows, dtype, result_dtype)
        return [
            new_buffer(self._like, (part, columns), dtype) for part in (first, rows - first) if part
        ]

    def add(self, gradient: Tensor, hidden: Tensor, *, is_only: bool = False) -> None:
        """Adds ``gradient.T @ hidden``, of (n, V) and (n, D). is_only: nothing else is added.

        The gradient of 16-bit hidden states may be float32 (see `rounded`).
        """
        self._parts = self._parts or self._new_parts(is_only=is_only)
        # float16's sums are never made in float16 on a CPU, whatever it has.
        is_wide = gradient.dtype != hidden.dtype or gradient.dtype == torch.float16
        begin = 0
        for part in self._parts:
            columns = gradient[:, begin : begin + part.shape[0]]
            is_same = part.dtype == gradient.dtype
            is_on_cpu = not part.is_cuda
            if is_on_cpu and (is_wide or is_upcast(gradient.dtype, part.device.type)):
                self._add_upcast(part, columns, hidden)
            # A CPU writes 16 bits a third faster block by block.
            elif is_on_cpu and (not is_same or (self._is_empty and gradient.dtype.itemsize == 2)):
                self._add_blocks(part, columns, hidden)
            elif is_same:
                self._add_in_one_dtype(part, columns, hidden)
            else:
                self._add_from_16_bits(part, columns, hidden)
            begin += part.shape[0]
        self._is_empty = False

    def _add_in_one_dtype(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        if self._is_empty:
            torch.mm(gradient.t(), hidden, out=total)
        else:
            torch.addmm(total, gradient.t(), hidden, out=total)

    def _add_from_16_bits(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        dtype = total.dtype
        if self._is_empty:
            torch.mm(gradient.t(), hidden, out_dtype=dtype, out=total)  # type: ignore[call-overload]
        else:
            torch.addmm(total, gradient.t(), hidden, out_dtype=dtype, out=total)  # type: ignore[call-overload]

    def _add_blocks(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """Products whose results have 16 bits, as a CPU's have, stay in its cache until added."""
        height = min(block_rows(hidden.shape[1]), total.shape[0])
        block = hidden.new_empty(height, hidden.shape[1])
        for rows in _slices(total.shape[0], height):
            left = gradient[:, rows].t()
            product = torch.mm(left, hidden, out=block[: rows.stop - rows.start])
            self._put(total[rows], product)

    def _add_upcast(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """Products of 16 bits in float32, of which some rows and tokens are there at a time."""
        height = min(upcast_rows(hidden.shape[1]), total.shape[0])
        block = hidden.new_empty(height, hidden.shape[1], dtype=torch.float32)
        for rows in _slices(total.shape[0], height):
            product = block[: rows.stop - rows.start].zero_()
            for tokens in _slices(hidden.shape[0], UPCAST_TOKENS):
                left = gradient[tokens, rows].to(torch.float32).t()
                torch.addmm(product, left, hidden[tokens].to(torch.float32), out=product)
            self._put(total[rows], product)

    def _put(self, total: Tensor, product: Tensor) -> None:
        if self._is_empty:
            total.copy_(product)
        else:
            total += product

    def result(self) -> Tensor:
        """The rounded gradient. Call it when the chunks are gone, and once."""
        parts, self._parts = self._parts, []
        dtype = self._result_dtype
        if not parts:
            return torch.zeros(self._shape, dtype=dtype, device=self._like.device)
        if len(parts) == 1:
            return parts[0].to(dtype)
        rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
        result = torch.empty(0, dtype=dtype, device=parts[0].device)
        result.set_(parts[0].untyped_storage(), 0, (rows, columns), (columns, 1))  # type: ignore[call-overload]
        begin, height = 0, block_rows(columns)
        if result.is_cuda:
            height *= 16  # launches cost more there than a larger copy
        for block in (block for part in parts for block in torch.split(part, height)):
            # The first block's place lies over the block itself, every other over an earlier one.
            source = block if begin else block.to(dtype)
            result[begin : begin + block.shape[0]] = source
            begin += block.shape[0]
        return result


class Gradients:
    """The gradients of a projection, gathered chunk by chunk; None where not asked for."""

    def __init__(
        self,
        projection: Projection,
        needs_hidden: bool,
        needs_weight: bool,
        needs_bias: bool,
        sums_dtype: torch.dtype,
        weight_dtype: torch.dtype,
        accumulator: Tensor | None = None,
    ) -> None:
        """sums_dtype: in which the weight's gradient is accumulated, to be rounded once.

        weight_dtype: to which it is rounded. accumulator: to which it is added instead.
        """
        hidden, weight = projection.hidden, projection.weight
        self._projection = projection
        # Rows that are dropped have a gradient too: zero.
        self.hidden = hidden.new_zeros(hidden.shape) if needs_hidden else None
        self._weight: WeightGradient | None = None
        if needs_weight or accumulator is not None:
            shape = (projection.columns, weight.shape[1])
            self._weight = WeightGradient(hidden, shape, sums_dtype, weight_dtype, accumulator)
        dtype = real_of(hidden)
        self.bias = weight.new_zeros(projection.columns, dtype=dtype) if needs_bias else None

    def add(self, chunk: Chunk) -> None:
        """Adds a chunk whose logits have become their gradient."""
        gradient = chunk.logits
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        if self.hidden is None and self._weight is None:
            return
        if gradient.dtype != chunk.hidden.dtype:
            gradient = rounded(gradient, chunk.hidden.dtype)
        if self.hidden is not None:
            is_slice = isinstance(chunk.rows, slice)
            place = self.hidden[chunk.rows] if is_slice else torch.empty_like(chunk.hidden)
            self._projection.back_project(gradient[:, : self._projection.used], place)
            if not is_slice:
                put(self.hidden, chunk.rows, place)
        if self._weight is not None:
            # Gradients of 0 would make nan of the nan that stands at a token without a part.
            hidden = chunk.hidden if chunk.counts is None else only(chunk.counts, chunk.hidden)
            self._weight.add(gradient, hidden, is_only=chunk.is_only)

    def weight_result(self) -> Tensor | None:
        """The weight's gradient, rounded. Call it when the chunks are gone, and once."""
        return None if self._weight is None else self._weight.result()
