"""Log-probabilities of several tokens for each position, from logits and from hidden states."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..checks import check_all_dense, check_range, check_scale
from ..columns import Distribution, columns_of
from ..composite import real_of
from ..linear.row_functions import RowOptions, Rows, linear_rows, row_function
from ..ops import can_read
from ..options import LogitOptions, documented, spelled_out, tempered

__all__ = ["linear_selected_log_probs", "selected_log_probs"]

_OF_LOGITS = ("softcap", "logit_scale", "temperature", "vocab_size")
_NOBODY = -1
"""Stands for a position that has no token."""


@partial(documented, names=_OF_LOGITS)
def selected_log_probs(
    input: Tensor,
    index: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Log p of K tokens for each position: of a teacher's top k, of candidates, of labels ahead.

    The lse is that of the kernels, from one read of the logits; beside it there are K numbers a
    position. At most one token of a row has more than half of its probability: that of the largest
    selected logit is made of the other columns alone, and keeps its digits as p goes to 1.

    Args:
        input: Logits (..., V); float32, bfloat16, float16 or float64.
        index: (..., K) int64 or int32: the tokens of each position. One may be named twice.
        ignore_index: At such places the result is 0, without a gradient; a position of nothing else
            may hold anything.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        (..., K) in nats, float32 (float64 for float64), differentiable as often as asked. A token
        whose logit is -inf has -inf, without a gradient. Backward makes one tensor of the logits'
        size beside their gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
        IndexError: A token outside [0, vocab_size) (on CUDA, its result is nan instead).
        RuntimeError: A wrong dtype or device.
    """
    check_all_dense({"input": input, "index": index}, {})
    columns = input.shape[-1] if input.dim() else 0
    _check_index(index, input)
    options = LogitOptions.of(softcap, logit_scale, vocab_size, ignore_index, columns, temperature)
    scale = tempered(check_scale(logit_scale, input), temperature)
    scale = None if scale is None else scale.reshape(())
    valid, known, safe = _tokens(index, options)
    if not index.shape[-1] or not columns:
        return input.new_zeros(index.shape, dtype=real_of(input))
    # Zeros before the arithmetic: a padding's nan gets into no product.
    raw = torch.where(known, columns_of(input, safe).to(real_of(input)), 0.0)
    impossible = raw == -math.inf
    factor = options.scale if scale is None else scale.to(raw.dtype)
    x = torch.where(impossible, 0.0, raw) * factor
    if options.softcap > 0:
        x = options.softcap * torch.tanh(x / options.softcap)
    best = torch.where(known & ~impossible, x.detach(), -math.inf).argmax(-1, keepdim=True)
    target = safe.gather(-1, best)
    has_any = known.any(-1)
    stats = functional.token_stats(
        input, torch.where(has_any, target.squeeze(-1), _NOBODY), ignore_index=_NOBODY,
        softcap=options.softcap or None, logit_scale=options.scale if scale is None else scale,
        vocab_size=options.vocab_size, class_dim=-1,
    )  # fmt: skip
    found = torch.where(safe == target, stats.log_prob.unsqueeze(-1), x - stats.lse.unsqueeze(-1))
    return _placed(torch.where(impossible, -math.inf, found), valid, known)


@partial(documented, names=("linear_bias", *RowOptions._fields))
@partial(spelled_out, names=RowOptions._fields)
def linear_selected_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """`selected_log_probs` of ``input @ linear_weight.T + linear_bias``, a chunk at a time.

    Differentiable with respect to input, linear_weight, linear_bias and a tensor logit_scale.
    Backward computes each chunk's logits again: four products in all.

    Args:
        input: Hidden states (..., D); float32, bfloat16, float16 or float64.
        linear_weight: The projection (V, D).
        index: (..., K) int64 or int32: the tokens of each position.
        ignore_index: At such places the result is 0, without a gradient; a position of nothing else
            may hold anything.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        (..., K) in nats, float32 (float64 for float64). A token whose logit is -inf has -inf,
        without a gradient.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
        IndexError: A token outside [0, vocab_size) (on CUDA, its result is nan instead).
        RuntimeError: A wrong dtype or device.
    """
    check_all_dense(
        {"input": input, "linear_weight": linear_weight, "index": index},
        {"linear_bias": linear_bias},
    )
    columns = linear_weight.shape[0] if linear_weight.dim() else 0
    _check_index(index, input)
    how = RowOptions.of(options)
    checked, scale = how.checked(ignore_index, columns, input)
    valid, known, safe = _tokens(index, checked)
    if not index.shape[-1]:
        return input.new_zeros(index.shape, dtype=real_of(input))
    rows = linear_rows(
        selected_rows, index.shape[-1], input, linear_weight, linear_bias, others=[safe],
        shared=[scale], numbers=[checked.softcap], valid=known.any(-1),
        vocab_size=checked.vocab_size, **how.walk,
    )  # fmt: skip
    return _placed(rows, valid, known)


@row_function
def selected_rows(rows: Rows) -> Tensor:
    """(n, K): log p of the columns, -inf where a logit is."""
    (index,), (scale,), (softcap,) = rows.others, rows.shared, rows.numbers
    found = Distribution.of(rows.logits, scale.reshape(()), softcap).log_probs(index)
    return torch.where(rows.logits.gather(-1, index) == -math.inf, -math.inf, found)


def _check_index(index: Tensor, input: Tensor) -> None:
    if index.is_floating_point() or index.dtype == torch.bool:
        raise RuntimeError(f"expected an index of int64 or int32, got {index.dtype}")
    if index.device != input.device:
        raise RuntimeError(
            f"expected input and index on the same device, got {input.device} and {index.device}"
        )
    if not input.dim() or index.dim() != input.dim() or index.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            "index must have K tokens for each position, shape "
            f"{(*input.shape[:-1], 'K')}, got {tuple(index.shape)}"
        )


def _tokens(index: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Which places are not ignored, which of them name a class, and the classes (0 elsewhere)."""
    if can_read(index):
        check_range(index, options.ignore_index, options.vocab_size)
    index = index.long()
    valid = index != options.ignore_index
    known = valid & (index >= 0) & (index < options.vocab_size)
    return valid, known, torch.where(known, index, 0)


def _placed(found: Tensor, valid: Tensor, known: Tensor) -> Tensor:
    """0 at what is ignored, and nan at what is no class."""
    return torch.where(known, found, torch.where(valid, math.nan, 0.0).to(found.dtype))
