"""The chunked projection: logits exist for one chunk of tokens at a time, and are overwritten.

Everything here works on (N, D) hidden states and is not differentiable itself; `autograd` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmloss_ext.composite import real_of
from llmloss_ext.linear.planning import VOCAB_BLOCK, row_stride

Rows = slice | Tensor
"""The rows of a chunk: neighbours, or the indices of those that are not ignored."""


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """The rows of a tensor; a view of neighbours, else a copy."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def put(tensor: Tensor, rows: Rows, values: Tensor) -> None:
    """Writes the rows of a tensor."""
    if isinstance(rows, slice):
        tensor[rows] = values
    else:
        tensor.index_copy_(0, rows, values)


def chunk_rows(tokens: int, chunk_tokens: int, valid: Tensor | None) -> Iterator[Rows]:
    """The rows of each chunk.

    Args:
        tokens: N.
        chunk_tokens: Rows of a chunk at most.
        valid: (N) bool: rows that are not ignored, if the others are to be dropped. On CUDA their
            number has to be waited for.
    """
    indices = None if valid is None else valid.nonzero().squeeze(1)
    if indices is not None and indices.numel() < tokens:
        yield from torch.split(indices, chunk_tokens) if indices.numel() else ()
        return
    for begin in range(0, tokens, chunk_tokens):
        yield slice(begin, min(begin + chunk_tokens, tokens))


def new_buffer(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of many megabytes."""
    buffer = torch.empty(shape, dtype=dtype, device=like.device)
    if buffer.device.type == "cpu":
        torch.ops.llmloss.prefer_huge_pages_(buffer)
    return buffer


@dataclass
class Chunk:
    """Some tokens: their rows, hidden states and logits (which may be overwritten)."""

    rows: Rows
    hidden: Tensor
    logits: Tensor


class Projection:
    """``hidden @ weight.T + bias`` in the dtype of the hidden states, a chunk at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Hidden states (N, D); weight (V, D); bias (V) or None."""
        self.hidden = hidden
        # Under autocast the weight may be float32: one copy in the dtype of the products.
        self.weight = weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)

    def chunks(self, chunk_tokens: int, valid: Tensor | None) -> Iterator[Chunk]:
        """Each chunk's logits, all in one buffer: a chunk ends where the next one begins."""
        tokens, vocab_size = self.hidden.shape[0], self.weight.shape[0]
        dtype = self.hidden.dtype
        shape = (min(chunk_tokens, tokens), row_stride(vocab_size, dtype))
        buffer = new_buffer(self.hidden, shape, dtype)
        # oneDNN's products read a column too many and multiply it by 0: no nan may stand there.
        buffer[:, vocab_size:] = 0
        for rows in chunk_rows(tokens, chunk_tokens, valid):
            hidden = take(self.hidden, rows)
            logits = buffer[: hidden.shape[0], :vocab_size]
            self.project(hidden, logits)
            yield Chunk(rows, hidden, logits)

    def project(self, hidden: Tensor, logits: Tensor) -> None:
        """Writes the logits of hidden states."""
        # Products into `out`, here and below, are not autocast's to round.
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)


class Gradients:
    """The gradients of a projection, gathered chunk by chunk; None where not asked for.

    The weight's is accumulated in `accumulate_in` and rounded once, by `weight_result`.
    """

    def __init__(
        self,
        projection: Projection,
        needs: tuple[bool, bool, bool],
        accumulate_in: torch.dtype,
        accumulator: Tensor | None = None,
    ) -> None:
        """needs: hidden, weight, bias. accumulator: to which the weight's gradient is added."""
        hidden, weight = projection.hidden, projection.weight
        self._projection = projection
        # Rows that are dropped have a gradient too: zero.
        self.hidden = hidden.new_zeros(hidden.shape) if needs[0] else None
        self._accumulator = accumulator
        self._is_empty = accumulator is None
        if needs[1] and accumulator is None:
            self._accumulator = new_buffer(weight, tuple(weight.shape), accumulate_in)
        dtype = real_of(hidden)
        self.bias = weight.new_zeros(weight.shape[0], dtype=dtype) if needs[2] else None

    def add(self, chunk: Chunk) -> None:
        """Adds a chunk whose logits have become their gradient."""
        gradient = chunk.logits
        if self.hidden is not None:
            if isinstance(chunk.rows, slice):
                torch.mm(gradient, self._projection.weight, out=self.hidden[chunk.rows])
            else:
                part = torch.empty_like(chunk.hidden)
                put(self.hidden, chunk.rows, torch.mm(gradient, self._projection.weight, out=part))
        if self._accumulator is not None:
            self._add_weight(gradient, chunk.hidden, self._accumulator)
            self._is_empty = False
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def _add_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        if total.dtype == gradient.dtype:
            if self._is_empty:
                torch.mm(gradient.t(), hidden, out=total)
            else:
                total.addmm_(gradient.t(), hidden)
        elif total.is_cuda:
            if self._is_empty:
                total.zero_()
            torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
        else:
            self._add_blocks(gradient, hidden, total)

    def _add_blocks(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        """Products whose results have 16 bits, as a CPU's have, stay in its cache until added."""
        # float16 has no fast products there: float32 costs no more, and rounds nothing.
        if gradient.dtype == torch.float16:
            hidden = hidden.to(total.dtype)
        block = hidden.new_empty(VOCAB_BLOCK, hidden.shape[1])
        for begin in range(0, total.shape[0], VOCAB_BLOCK):
            rows = slice(begin, min(begin + VOCAB_BLOCK, total.shape[0]))
            left = gradient[:, rows].to(hidden.dtype).t()
            product = torch.mm(left, hidden, out=block[: rows.stop - rows.start])
            if self._is_empty:
                total[rows] = product
            else:
                total[rows] += product

    def weight_result(self, dtype: torch.dtype) -> Tensor | None:
        """The weight's gradient, rounded. Call it when the chunks are gone, and once."""
        total, self._accumulator = self._accumulator, None
        if total is None:
            return None
        if self._is_empty:
            total.zero_()
        if total.dtype == dtype:
            return total
        return new_buffer(total, tuple(total.shape), dtype).copy_(total)
