"""How large a chunk of tokens is, and what the whole will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..options import as_integer
from ..shard import ShardedColumns
from .cpu_products import is_upcast

__all__ = ["Plan", "plan", "row_stride"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Bytes of a chunk's logits, and tokens of a chunk at least: what keeps the matrix products at full
# speed (fewer tokens would read the whole weight for too little work).
_DEFAULT_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_LEAST_TOKENS = {"cpu": 256, "cuda": 1024}
_BYTES_BESIDE_SUMS = 1 << 30
"""On CUDA, of a chunk's logits where the weight's gradient is summed over chunks, or as many as the
weight has: there each chunk reads and writes all sums (see `cost`), which few tokens do not repay.
"""
_ALIGNED_BYTES = 128
"""Rows of a chunk's logits begin at multiples of this: oneDNN's products are a third faster so."""
_BLOCK_BYTES = 2 << 20
_UPCAST_BYTES = 1 << 20
UPCAST_TOKENS = 1024
"""Whose 16-bit hidden states a CPU has in float32 at a time."""
_ROUNDED_BYTES = 8 << 20


def block_rows(columns: int) -> int:
    """Rows of the weight's gradient that are rounded to 16 bits together before they are added.

    Few enough to stay in a core's cache until then, and enough for the product that makes them.
    """
    rows = _BLOCK_BYTES // (2 * columns)
    return min(max(1 << max(rows, 1).bit_length() - 1, 512), 4096)


def first_part_rows(rows: int, dtype: torch.dtype, result_dtype: torch.dtype) -> int:
    """Rows of the first of the two parts of a weight's gradient that is summed in ``dtype``.

    All of them, where the result has not half the bytes. Else half of them, but so that the second
    part begins at an aligned column of the logits.
    """
    if dtype.itemsize != 2 * result_dtype.itemsize:
        return rows
    return min(row_stride(-(-rows // 2), result_dtype), rows)


def dtype_of_logits(dtype: torch.dtype, *, has_float32_logits: bool) -> torch.dtype:
    """Of the logits that products of ``dtype`` make."""
    return torch.float32 if has_float32_logits and dtype.itemsize == 2 else dtype


def check_logits_dtype(logits_dtype: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether ``logits_dtype`` asks for float32 logits, for products of ``dtype``.

    Raises:
        TypeError: It is not a dtype.
        ValueError: The products do not have it.
    """
    if logits_dtype is None:
        return False
    if not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype must be a torch.dtype, got {logits_dtype!r}")
    is_wide = dtype.itemsize == 2 and logits_dtype == torch.float32
    if logits_dtype != dtype and not is_wide:
        known = f"{dtype} or torch.float32" if dtype.itemsize == 2 else dtype
        raise ValueError(
            f"logits_dtype must be {known} for products of {dtype}, got {logits_dtype}"
        )
    return is_wide


def upcast_rows(columns: int) -> int:
    """Rows of a 16-bit weight that a CPU has in float32 at a time.

    Few enough to stay in a core's cache, and enough for the product that reads them.
    """
    return min(max(_UPCAST_BYTES // (4 * columns), 128), 1024)


def rounded_rows(columns: int) -> int:
    """Rows of float32 logits whose gradient is rounded to 16 bits at a time."""
    return max(_ROUNDED_BYTES // (2 * columns), 1)


def is_one_product(dtype: torch.dtype, result_dtype: torch.dtype) -> bool:
    """Whether the product of operands of ``dtype`` can be written in the result's.

    It is summed in float32 at least, and rounded once.
    """
    return result_dtype == dtype or (dtype.itemsize == 2 and result_dtype == torch.float32)


@dataclass(frozen=True)
class Plan:
    """What a linear loss does, in numbers.

    Attributes:
        tokens: N.
        features: D.
        vocab_size: V.
        dtype: Of the hidden states, in which the products are computed.
        logits_dtype: Of the logits.
        chunk_tokens: Tokens of a chunk.
        chunks: Their number.
        products: N x D x V matrix products, forward and backward, with those of references.
        flops: Of these products.
        chunk_bytes: Of a chunk's logits, the one large buffer.
        needs_grad: Whether the hidden states and the weight get gradients.
        sum_bytes: Of the sums of the weight's gradient over the chunks, which are rounded in place;
            0 where there is one chunk, whose product is the gradient.
        gradient_bytes: Of the gradients that are returned.
        peak_bytes: The most memory beyond the inputs, gradients included.
        unfused_bytes: The same for a projection followed by a loss: the logits and their gradient.
    """

    tokens: int
    features: int
    vocab_size: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    chunk_tokens: int
    chunks: int
    products: int
    flops: int
    chunk_bytes: int
    needs_grad: tuple[bool, bool]
    sum_bytes: int
    gradient_bytes: int
    peak_bytes: int
    unfused_bytes: int


class LossWalk(NamedTuple):
    """What a loss asks `plan` for."""

    loss: str
    recompute: bool = False
    references: int = 0
    """Of a reference that is given by its hidden states."""
    sequences: int = 0
    """In a group that has to be seen before a token's gradient is known; 0: each token knows it."""


LOSS_WALKS = (
    LossWalk("linear_cross_entropy, mean or sum"),
    LossWalk("linear_cross_entropy without a reduction; statistics of tokens", True),
    LossWalk("linear_policy_loss, ratios of tokens", references=1),
    LossWalk("linear_policy_loss, ratios of sequences", references=1, sequences=1),
    LossWalk("linear_preference_loss", references=1, sequences=2),
    LossWalk("linear_unpaired_loss without a KL", references=1, sequences=1),
    LossWalk("linear_unpaired_loss, with as many mismatched tokens", references=3, sequences=1),
)
"""How the losses walk, for `llmloss plan`."""


def row_stride(vocab_size: int, dtype: torch.dtype) -> int:
    """Elements from one row of a chunk's logits to the next."""
    unit = _ALIGNED_BYTES // dtype.itemsize
    return -(-vocab_size // unit) * unit


def plan(
    tokens: int,
    features: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    needs_grad: tuple[bool, bool] = (True, True),
    recompute: bool = False,
    drop_ignored: bool = False,
    logits_dtype: torch.dtype | None = None,
    references: int = 0,
    group_tokens: int | None = None,
) -> Plan:
    """Plans a linear loss of N x D hidden states and a V x D weight.

    Args:
        tokens: N, those that are not dropped.
        features: D.
        vocab_size: V.
        dtype: In which the products are computed.
        device: Where.
        chunk_tokens: Tokens of a chunk; by default as many as `max_chunk_bytes` holds.
        max_chunk_bytes: The most that a chunk's logits may take. By default 64 MiB on a CPU or what
            256 tokens need; on CUDA 1 GiB or as much as the weight, and for all tokens at once also
            what they save: the sums of the weight's gradient. Without such a gradient 256 MiB
            there, or what 1,024 tokens need.
        weight_grad_dtype: In which the weight's gradient is accumulated, by default float32
            (float64 for float64), and never float16 without ``recompute``.
        weight_dtype: Of the weight, if autocast computes the products in another.
        needs_grad: Whether the hidden states and the weight get gradients.
        recompute: Whether backward computes the logits again: for ``reduction="none"`` and the
            statistics.
        drop_ignored: Whether some tokens are dropped: those of a chunk are then gathered.
        logits_dtype: torch.float32 where products of 16 bits keep their logits in it.
        references: Walks over as many hidden states (and a weight) of the same sizes without a
            gradient, one after the other before the loss: 1 for the reference of a policy. Chunks
            there have no more tokens than here, and are gone: the peak is that of the loss.
        group_tokens: Tokens of a sequence, or of the two of a pair, for a loss that needs them all
            before it knows a token's gradient: a chunk has whole ones, and where not even one fits,
            backward computes the logits again. With ``recompute`` it does so in any case.

    Raises:
        ValueError: A size that is not positive, a dtype that the losses do not have, or a budget
            too small for one token.
        TypeError: ``chunk_tokens`` or ``max_chunk_bytes`` is no integer.
    """
    for name, asked in (
        ("dtype", dtype),
        ("weight_grad_dtype", weight_grad_dtype),
        ("weight_dtype", weight_dtype),
    ):
        if asked is not None and asked not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {asked}")
    if references < 0:
        raise ValueError(f"references must be >= 0, got {references}")
    if group_tokens is not None and group_tokens < 1:
        raise ValueError(f"group_tokens must be at least 1, got {group_tokens}")
    if features < 1 or vocab_size < 1 or tokens < 0:
        raise ValueError(f"expected N >= 0, D >= 1 and V >= 1, got {tokens, features, vocab_size}")
    kind = torch.device(device).type
    is_wide = check_logits_dtype(logits_dtype, dtype)
    logits_dtype = dtype_of_logits(dtype, has_float32_logits=is_wide)
    row_bytes = row_stride(vocab_size, logits_dtype) * logits_dtype.itemsize
    with_input, with_weight = needs_grad
    sums = weight_grad_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight_dtype = weight_dtype or dtype
    weight = Sums.of(vocab_size * features, dtype, weight_dtype, sums) if with_weight else None
    limit = chunk_limit(vocab_size, logits_dtype, kind, chunk_tokens, max_chunk_bytes, weight)
    chunk, is_grouped = limit.of(tokens), False
    if group_tokens is not None and tokens and any(needs_grad) and not recompute:
        whole = tokens_of_whole_groups(
            tokens, group_tokens, limit, row_bytes, vocab_size * features * weight_dtype.itemsize,
            is_own=(chunk_tokens, max_chunk_bytes) != (None, None),
        )  # fmt: skip
        is_grouped, recompute = whole > 0, whole == 0
        if is_grouped:
            cuts = group_cuts([group_tokens] * -(-tokens // group_tokens), whole)
            chunk = min(cuts[1] * group_tokens, tokens)
    if sums == torch.float16 and not recompute:
        sums = torch.float32  # as the mean and the sum do
    products = 1 + with_input + with_weight
    if recompute and (with_input or with_weight):
        products += 1
    products += references
    size = dtype.itemsize
    chunks = -(-tokens // chunk)
    grad_input = with_input * tokens * features * size
    weight_elements = with_weight * vocab_size * features
    grad_weight = weight_elements * weight_dtype.itemsize
    # float16's sums wait for backward: rounded then, beside themselves.
    is_late = dtype == weight_dtype == torch.float16 and not recompute
    result_dtype = torch.float32 if is_late else weight_dtype
    is_one = chunks <= 1 and is_one_product(dtype, result_dtype)
    held_dtype = result_dtype if is_one else sums
    held = weight_elements * held_dtype.itemsize
    working = chunk * row_bytes
    if weight_dtype != dtype:
        working += vocab_size * features * size  # a copy in the dtype of the products
    is_gathered = drop_ignored or (is_grouped and chunks > 1)
    gathered = chunk * features * size if is_gathered else 0
    beside = with_input * gathered  # the hidden states' gradient, before it is put in its rows
    if kind != "cpu" and not drop_ignored:
        # A copy of the hidden states, with zeros at tokens that may be ignored.
        beside = max(beside, with_weight * chunk * features * size)
    if is_wide and (with_input or with_weight):
        rounded = min(rounded_rows(vocab_size), chunk) * vocab_size * size
        # The only chunk's are rounded before there is a gradient of the weight.
        beside = max(beside, rounded - (chunks <= 1) * held)
    if kind == "cpu" and size == 2:
        is_narrow = is_upcast(dtype, kind)
        if is_wide or is_narrow or (with_weight and dtype == torch.float16):
            upcast = _upcast_bytes(chunk, features, vocab_size, has_float32_logits=is_wide)
            beside = max(beside, with_input * gathered + upcast)
        if with_weight and not is_narrow and dtype != torch.float16:
            block = _block_bytes(dtype, held_dtype, features, vocab_size, is_added=chunks > 1)
            beside = max(beside, block)
    working += gathered + beside
    return Plan(
        tokens=tokens,
        features=features,
        vocab_size=vocab_size,
        dtype=dtype,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk,
        chunks=chunks,
        products=products,
        flops=2 * products * tokens * features * vocab_size,
        chunk_bytes=chunk * row_bytes,
        needs_grad=needs_grad,
        sum_bytes=0 if is_one else held,
        gradient_bytes=grad_input + grad_weight,
        peak_bytes=grad_input + held + max(working, is_late * grad_weight),
        unfused_bytes=(2 if with_input or with_weight else 1)
        * tokens
        * vocab_size
        * logits_dtype.itemsize
        + grad_input
        + grad_weight,
    )


def _upcast_bytes(chunk: int, features: int, vocab_size: int, *, has_float32_logits: bool) -> int:
    """Of what a CPU has in float32 to multiply 16 bits: rows of the hidden states and the weight.

    And of the logits, or their gradient, where these have 16 bits. One of the three is the product.
    """
    tokens, rows = min(UPCAST_TOKENS, chunk), min(upcast_rows(features), vocab_size)
    logits = 0 if has_float32_logits else tokens * rows
    return ((tokens + rows) * features + logits) * torch.float32.itemsize


def _block_bytes(
    dtype: torch.dtype, accumulated: torch.dtype, features: int, vocab_size: int, *, is_added: bool
) -> int:
    """Of what a CPU with products of 16 bits adds to the weight's gradient at a time."""
    rows = min(block_rows(features), first_part_rows(vocab_size, accumulated, dtype))
    # To add 16 bits to 32, torch copies them to 32.
    copied = is_added and accumulated != dtype
    return rows * features * (dtype.itemsize + copied * accumulated.itemsize)


class Sums(NamedTuple):
    """The gradient of a weight, as far as it decides how large chunks are."""

    weight_bytes: int
    """Of the weight in the dtype of the products."""
    saved_bytes: int
    """By one chunk, whose product needs no sums beside or in place of the gradient."""

    @classmethod
    def of(
        cls, elements: int, dtype: torch.dtype, weight_dtype: torch.dtype, sums: torch.dtype
    ) -> Sums:
        """Of so many elements; ``dtype`` is that of the products."""
        saved = sums.itemsize - weight_dtype.itemsize
        # float16's gradient stays in float32 until backward.
        if dtype == torch.float16 or not is_one_product(dtype, weight_dtype):
            saved = 0
        return cls(elements * dtype.itemsize, elements * max(saved, 0))


class ChunkLimit(NamedTuple):
    """How large chunks may be, whatever the number of tokens.

    That number is a symbol where a call is traced, and a comparison would bind the graph to its
    outcome: so a call hands on the limit, and the walk, which knows the number, cuts the chunks.
    """

    tokens: int
    is_even: bool
    """Whether all chunks are to be of one size, and so smaller than they may be."""
    alone: int = 0
    """As many tokens are one chunk even where ``tokens`` are fewer."""

    def of(self, tokens: int) -> int:
        """Tokens of a chunk of so many."""
        if tokens <= self.alone:
            return max(tokens, 1)
        return even_chunk(tokens, self.tokens) if self.is_even else min(self.tokens, max(tokens, 1))


class ChunkOptions(NamedTuple):
    """How a linear loss walks through the tokens, and of which classes this process has the weight.

    ``shard`` None: it has the weight of all classes.
    """

    limit: ChunkLimit
    drop_ignored: bool
    weight_grad_dtype: torch.dtype
    shard: ShardedColumns | None = None
    has_float32_logits: bool = False
    """Also those of 16-bit products."""


def chunk_limit(
    vocab_size: int,
    dtype: torch.dtype,
    kind: str,
    asked: int | None,
    budget: int | None,
    sums: Sums | None = None,
) -> ChunkLimit:
    """The part of `plan` that a call needs.

    ``asked`` is its ``chunk_tokens``, ``budget`` its ``max_chunk_bytes``, ``kind`` the device's,
    ``sums`` what the weight's gradient takes; None: it has none.
    """
    if asked is not None:
        asked = as_integer("chunk_tokens", asked)
    if budget is not None:
        budget = as_integer("max_chunk_bytes", budget)
    row_bytes = row_stride(vocab_size, dtype) * dtype.itemsize
    if asked is not None and asked < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {asked}")
    if budget is not None and budget < row_bytes:
        raise ValueError(
            f"max_chunk_bytes must be at least {row_bytes}, the logits of one token, got {budget}"
        )
    if asked is not None:
        return ChunkLimit(asked if budget is None else min(asked, budget // row_bytes), False)
    if budget is not None:
        return ChunkLimit(budget // row_bytes, True)
    default = _DEFAULT_BYTES.get(kind, _DEFAULT_BYTES["cuda"])
    least = _LEAST_TOKENS.get(kind, _LEAST_TOKENS["cuda"])
    if sums is None or kind == "cpu":
        return ChunkLimit(max(default // row_bytes, least), True)
    room = max(_BYTES_BESIDE_SUMS, sums.weight_bytes, least * row_bytes)
    return ChunkLimit(room // row_bytes, True, (room + sums.saved_bytes) // row_bytes)


def tokens_of_whole_groups(
    total: int, largest: int, limit: ChunkLimit, row_bytes: int, weight_bytes: int, *, is_own: bool
) -> int:
    """How many tokens a chunk of whole groups has; 0: the largest group does not fit into one.

    That one may be larger than a chunk need be otherwise: the product that is spared is worth it.

    Args:
        total: Tokens of all groups.
        largest: Tokens of the largest group.
        limit: Of a chunk.
        row_bytes: Of a token's logits.
        weight_bytes: Of the weight.
        is_own: Whether the limit is the user's own, which no group exceeds.
    """
    if total <= limit.alone:
        return limit.alone
    room = 0 if is_own else max(_BYTES_BESIDE_SUMS, weight_bytes)
    fits = largest <= limit.tokens or largest * row_bytes <= room
    return limit.tokens if fits else 0


def group_cuts(sizes: Sequence[int], tokens: int) -> list[int]:
    """Where chunks of neighbouring groups begin and end.

    They have about as many tokens each: a small last one would waste a pass over the weight.

    Args:
        sizes: Tokens of each group.
        tokens: Of a chunk at most, but for a group that is larger.
    """
    cuts, held = [0], 0
    even = -(-sum(sizes) // max(-(-sum(sizes) // tokens), 1))
    for at, size in enumerate(sizes):
        if at > cuts[-1] and (held >= even or held + size > tokens):
            cuts.append(at)
            held = 0
        held += size
    return [*cuts, len(sizes)] if sizes else []


def even_chunk(tokens: int, most: int) -> int:
    """Tokens of chunks of one size: a short last one would waste a pass over the weight."""
    if tokens <= most:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // most))
    rounded = -(-even // 16) * 16
    return rounded if rounded <= most else even
