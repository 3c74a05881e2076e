"""Samples of a distribution over tokens that have a gradient: Gumbel-softmax.

(Jang et al. 2017; Maddison et al. 2017.) The noise of a token is a function of a seed, its row and
its column, so backward makes it again, for the rows of a chunk: it is never in memory whole, and
how the rows are cut into chunks changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_all_dense, check_dense
from ..composite import real_of
from ..divergence import COPIES
from ..entry import entry_point
from ..linear.planning import plan
from ..linear.projection import check_projection
from ..linear.row_functions import OF_WALK, Rows, linear_rows, row_function
from ..ops import in_transform
from ..options import OPTIONS, LogitOptions, Option, documented, spelled_out, with_defaults

__all__ = ["GumbelEmbeddings", "gumbel_softmax", "linear_gumbel_embeddings"]

_MOST_CLASSES = 1 << 24
"""Up to here float32, in which the operators return ids beside embeddings, has every integer."""


class GumbelEmbeddings(NamedTuple):
    """Sampled tokens, as ids and as what the next layer reads."""

    embeddings: Tensor
    """(..., E), with a gradient."""
    ids: Tensor
    """(...) int64: the tokens; -1 where masked."""


GUMBEL_OPTIONS = {
    "temperature": Option("float", 1.0, "> 0."),
    "hard": Option("bool", True, "See `gumbel_softmax`."),
    "mask": Option(
        "Tensor | None",
        None,
        "(...): which rows are sampled. Others are 0, with a gradient of exactly zero, whatever "
        "they hold.",
    ),
    "softcap": OPTIONS["softcap"],
    "vocab_size": Option(
        "int | None",
        None,
        "Classes from here on are padding: never drawn, and without a gradient.",
    ),
    "generator": Option(
        "torch.Generator | None", None, "Of the seed, for repeatability: on the input's device."
    ),
}
"""The options of a sample."""


class _Sampling(NamedTuple):
    """The options of a sample, checked."""

    temperature: float
    softcap: float
    """0: none."""
    hard: bool
    used: int
    """The classes from which tokens are drawn."""
    valid: Tensor | None
    """(...) bool; None: all."""
    seed: Tensor

    @classmethod
    def of(cls, options: Mapping[str, Any], rows: Tensor, columns: int) -> _Sampling:
        """Of rows (..., D) that have so many columns.

        Raises:
            ValueError: The mask does not fit, or an option is out of range.
            TypeError: There are other options.
        """
        temperature, hard, mask, softcap, vocab_size, generator = with_defaults(
            options, GUMBEL_OPTIONS, GUMBEL_OPTIONS
        ).values()
        check_dense("mask", mask, optional=True)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
        if mask is not None and mask.shape != rows.shape[:-1]:
            raise ValueError(
                f"mask must have one number per token, shape {tuple(rows.shape[:-1])}, got "
                f"{tuple(mask.shape)}"
            )
        checked = LogitOptions.of(softcap, 1.0, vocab_size, -100, columns)
        valid = None if mask is None else mask.bool()
        seed = torch.randint(0, 2**62, (), generator=generator, device=rows.device)
        return cls(temperature, checked.softcap, hard, checked.vocab_size, valid, seed)

    @property
    def how(self) -> _How:
        """Without the tensors."""
        return _How(*self[:4])


@partial(documented, names=GUMBEL_OPTIONS, table=GUMBEL_OPTIONS)
@partial(spelled_out, names=GUMBEL_OPTIONS, table=GUMBEL_OPTIONS)
def gumbel_softmax(logits: Tensor, **options: Any) -> Tensor:
    """Samples softmax((logits + g) / temperature), with g of the standard Gumbel distribution.

    With ``hard`` the sample is a one-hot row, of a token drawn from softmax(logits), and its
    gradient is that of the relaxed row (straight-through): biased, and less so, but of more
    variance, at a lower temperature. Without, it is the relaxed row, whose gradient is exact.

    Args:
        logits: (..., V). Their rows need not lie beside each other.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        (..., V), of the logits' dtype. It is the only tensor of that size that is made; backward
        makes the gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    check_dense("logits", logits)
    if not logits.dim() or not logits.is_floating_point():
        raise ValueError(f"expected logits (..., V), got {tuple(logits.shape)} of {logits.dtype}")
    sampling = _Sampling.of(options, logits, logits.shape[-1])
    how, seed, valid = sampling.how, sampling.seed, sampling.valid
    rows, valid = logits.reshape(-1, logits.shape[-1]), None if valid is None else valid.reshape(-1)
    if in_transform() or torch.compiler.is_compiling() or not rows.numel():
        return _sample(rows, _numbers(rows), valid, seed, how).reshape(logits.shape)
    sample: Tensor = _GumbelSoftmax.apply(rows, valid, seed, how)  # type: ignore[no-untyped-call]
    return sample.reshape(logits.shape)


_TABLE = OPTIONS | GUMBEL_OPTIONS
_OF_BOTH = (*GUMBEL_OPTIONS, *OF_WALK)


@entry_point("input", "mask")
@partial(documented, names=_OF_BOTH, table=_TABLE)
@partial(spelled_out, names=_OF_BOTH, table=_TABLE)
def linear_gumbel_embeddings(
    input: Tensor,
    linear_weight: Tensor,
    embedding: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> GumbelEmbeddings:
    """``gumbel_softmax(input @ linear_weight.T + linear_bias) @ embedding``, without N x V numbers.

    What a generator feeds to its next step and to a discriminator: the embeddings of sampled
    tokens, with a gradient for the hidden states and the weight that they were sampled from. Of the
    embedding, sampled (``hard``) tokens' rows get theirs.

    Args:
        input: Hidden states (..., D).
        linear_weight: The projection (V, D).
        embedding: (W, E), W >= vocab_size, of any floating point: for several readers at once, such
            as a generator and a discriminator, their tables side by side.
        linear_bias: (V).
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `GumbelEmbeddings`, the embeddings of the embedding's dtype.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
        RuntimeError: A wrong dtype or device.
    """
    check_all_dense(
        {"input": input, "linear_weight": linear_weight, "embedding": embedding},
        {"linear_bias": linear_bias},
    )
    walk = {name: options.pop(name, None) for name in OF_WALK}
    check_projection(input, linear_weight, linear_bias, walk["logits_dtype"])
    sampling = _Sampling.of(options, input, linear_weight.shape[0])
    used, valid = sampling.used, sampling.valid
    if embedding.dim() != 2 or len(embedding) < used or not embedding.is_floating_point():
        raise ValueError(
            f"embedding must have the rows of {used} tokens, got {tuple(embedding.shape)} of "
            f"{embedding.dtype}"
        )
    if embedding.device != input.device:
        raise RuntimeError(f"expected embedding on {input.device}, got {embedding.device}")
    if used > _MOST_CLASSES:
        raise ValueError(f"vocab_size must be at most {_MOST_CLASSES}, got {used}")
    flat = input.reshape(-1, input.shape[-1])
    numbers = _numbers(flat).reshape(*input.shape[:-1], 1)
    rows = linear_rows(
        gumbel_rows, embedding.shape[1] + 1, input, linear_weight, linear_bias, others=[numbers],
        shared=[sampling.seed, embedding],
        numbers=[sampling.temperature, sampling.softcap, sampling.hard], valid=valid,
        vocab_size=used, **walk,
    )  # fmt: skip
    ids = rows[..., -1].detach().long()
    if valid is not None:
        ids = torch.where(valid, ids, -1)
    return GumbelEmbeddings(rows[..., :-1].to(embedding.dtype), ids)


class _How(NamedTuple):
    temperature: float
    softcap: float
    """0: none."""
    hard: bool
    used: int
    """The classes from which tokens are drawn."""


# ---------------------------------------------------------------------------------- the noise


def _numbers(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device)


_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit words, in int64, in which each bit depends on all (Wellons 2018).

    Its factors are below 2^31: no product overflows.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def _gumbel(seed: Tensor, numbers: Tensor, columns: int, real: torch.dtype) -> Tensor:
    """(n, columns): noise of the rows of these numbers, the same whenever it is asked for."""
    low, high = seed & _WORD, seed >> 32
    key = _mix(_mix(low ^ (numbers & _WORD)) ^ high ^ (numbers >> 32)).unsqueeze(-1)
    other = _mix(key ^ 0x5BD1E995)
    column = torch.arange(columns, device=numbers.device)
    word = _mix(_mix(key ^ _mix(column)) ^ other)
    # u in (0, 1): so small where it matters (the largest noise) that it has all its digits there.
    u = ((word.to(real) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def _perturbed(x: Tensor, numbers: Tensor, seed: Tensor, softcap: float) -> Tensor:
    """The logits with their noise, in float32 or float64."""
    real = real_of(x)
    x = x.to(real)
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    return x + _gumbel(seed, numbers, x.shape[-1], real)


# ---------------------------------------------------------------------------------- from logits


def _sample(rows: Tensor, numbers: Tensor, valid: Tensor | None, seed: Tensor, how: _How) -> Tensor:
    """Of rows (n, V), with every derivative."""
    kept = rows[:, : how.used]
    if valid is not None:
        kept = torch.where(valid.unsqueeze(-1), kept, 0.0)
    noisy = _perturbed(kept, numbers, seed, how.softcap)
    sample = torch.softmax(noisy / how.temperature, -1)
    if how.hard:
        token = noisy.detach().argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(sample).scatter(-1, token, 1.0)
        sample = one_hot + (sample - sample.detach())  # whose difference is exactly 0
    if valid is not None:
        sample = torch.where(valid.unsqueeze(-1), sample, 0.0)
    padding = rows.shape[1] - how.used
    return torch.nn.functional.pad(sample.to(rows.dtype), (0, padding))


class _GumbelSoftmax(Function):
    """`_sample` of some rows at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, valid: Tensor | None, seed: Tensor, how: _How) -> Tensor:
        ctx.save_for_backward(rows, valid, seed)
        ctx.how = how
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for at, numbers, keep in _chunks(rows, valid):
            result[at] = _sample(rows[at], numbers, keep, seed, how)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, valid, seed = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            sample = _sample(rows, _numbers(rows), valid, seed, ctx.how)
            (gradient,) = torch.autograd.grad(sample, rows, upstream, create_graph=True)
            return gradient, None, None, None
        # Rows without a gradient from above have none, whatever they hold.
        has_gradient = (upstream != 0).any(-1)
        valid = has_gradient if valid is None else valid & has_gradient
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for at, numbers, keep in _chunks(rows, valid):
            with torch.enable_grad():
                leaf = rows[at].detach().requires_grad_()
                sample = _sample(leaf, numbers, keep, seed, ctx.how._replace(hard=False))
            (gradient[at],) = torch.autograd.grad(sample, leaf, upstream[at])
        return gradient, None, None, None


def _chunks(rows: Tensor, valid: Tensor | None) -> list[tuple[slice, Tensor, Tensor | None]]:
    """Rows, their numbers, and which are valid."""
    tokens, columns = rows.shape
    planned = plan(tokens, 1, columns, real_of(rows), rows.device, needs_grad=(True, False))
    step, numbers = max(planned.chunk_tokens // COPIES, 1), _numbers(rows)
    pieces = [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]
    return [(at, numbers[at], None if valid is None else valid[at]) for at in pieces]


# ---------------------------------------------------------------------------- from hidden states


@row_function
def gumbel_rows(rows: Rows) -> Tensor:
    """(n, E + 1): the embeddings of sampled tokens, and the tokens."""
    (number,), (seed, embedding) = rows.others, rows.shared
    temperature, softcap, hard = rows.numbers
    noisy = _perturbed(rows.logits, number.squeeze(-1), seed, softcap)
    table = embedding[: noisy.shape[-1]].to(noisy.dtype)
    token = noisy.detach().argmax(-1)
    relaxed = torch.softmax(noisy / temperature, -1)
    if not hard:
        read = relaxed @ table
    elif in_transform():
        one_hot = torch.zeros_like(relaxed).scatter(-1, token.unsqueeze(-1), 1.0)
        read = (one_hot + (relaxed - relaxed.detach())) @ table
    else:
        read = _StraightThrough.apply(relaxed, table, token)  # type: ignore[no-untyped-call]
    return torch.cat([read, token.unsqueeze(-1).to(noisy.dtype)], -1)


class _StraightThrough(Function):
    """The embeddings of tokens, with the gradient of the relaxed rows: no product in forward."""

    @staticmethod
    def forward(ctx: Any, relaxed: Tensor, table: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(table, token)
        return table.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        table, token = ctx.saved_tensors
        of_table = torch.zeros_like(table).index_add(0, token, upstream)
        return upstream @ table.t(), of_table, None
