"""Multi-token prediction: each position predicts several of the tokens that follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..checks import check_all_dense, check_range, check_token_weight, items_tensor
from ..columns import Distribution
from ..composite import real_of
from ..functional import cross_entropy
from ..linear import linear_cross_entropy
from ..linear.row_functions import OF_WALK, RowOptions, Rows, linear_rows, row_function
from ..ops import can_read
from ..options import LossOptions, as_integer, documented, spelled_out, with_defaults
from ..sequences import Sequences, moved
from ..statistics import FloatStats
from .objective import check_projection

__all__ = ["MultiTokenLoss", "count_multi_token_items", "multi_token_prediction_loss"]

Items = int | Tensor | Sequence[int | Tensor] | None


class MultiTokenLoss(NamedTuple):
    """The weighted sum over offsets, and what it is made of."""

    loss: Tensor
    """0-d, with its gradient."""
    losses: Tensor
    """(K), detached: the mean of each offset, before its weight."""


_OF_LOSS = ("ignore_index", "label_smoothing", "z_loss", "focal_gamma")
_OPTIONS = ("token_weight", *Sequences._fields, *_OF_LOSS, *RowOptions._fields)


@partial(documented, names=_OPTIONS)
@partial(spelled_out, names=_OPTIONS)
def multi_token_prediction_loss(
    input: Tensor | Sequence[Tensor],
    labels: Tensor,
    linear_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    offsets: int | Sequence[int],
    weights: Sequence[float] | None = None,
    linear_bias: Tensor | Sequence[Tensor] | None = None,
    num_items: Items = None,
    **options: Any,
) -> MultiTokenLoss:
    """The sum over offsets k of weight_k times the mean cross entropy of the token k ahead.

    K heads over shared hidden states (Gloeckle et al. 2024), K hidden states before one head
    (DeepSeek-V3's MTP modules), K of both, or one of both, which is then projected once for all
    offsets. A position predicts a label if all tokens from the one to the other are real and of one
    document. From hidden states, the logits of a chunk of tokens are in memory at a time.

    Args:
        input: Hidden states (..., S, D) if ``linear_weight`` is given, else logits (..., S, V); or
            K of them.
        labels: (..., S): not shifted; ``ignore_index`` where there is no loss.
        linear_weight: The projection (V, D), or K of them.
        offsets: Those of the K predictions, >= 1 each; a number: 1 to K.
        weights: Of each offset, finite; 1 by default (Gloeckle et al.). DeepSeek-V3 has 1 for the
            next token and lambda / (K - 1) for each of the others. An offset of weight 0 is
            computed only where that costs nothing, and its loss is 0 else.
        linear_bias: (V), or K of them.
        num_items: Replaces the numbers of tokens of the K means, by those of all micro-batches: one
            number for all, or K, of `count_multi_token_items`.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `MultiTokenLoss` in nats, float32 for 16-bit inputs. An offset that has no label, as in
        short texts, counts as 0.

    Raises:
        ValueError: The shapes or numbers of things do not fit, or an option is out of range.
        TypeError: An offset is not an integer.

    Example:
        >>> hidden = model.body(tokens)  # (B, S, D)
        >>> heads = [head.weight for head in model.heads]
        >>> multi_token_prediction_loss(hidden, tokens, heads, offsets=len(heads)).loss.backward()
    """
    ahead = _offsets(offsets)
    factors = _factors(weights, len(ahead))
    given = with_defaults(options, _OPTIONS)
    how = RowOptions(**{name: given[name] for name in RowOptions._fields})
    sequences = Sequences(**{name: given[name] for name in Sequences._fields})
    of_loss = {name: given[name] for name in _OF_LOSS}
    ignore_index, token_weight = of_loss.pop("ignore_index"), given["token_weight"]
    check_projection(None if linear_weight is None else labels, linear_bias=linear_bias, **how.walk)
    inputs = _each("input", input, len(ahead))
    heads = _each("linear_weight", linear_weight, len(ahead))
    biases = _each("linear_bias", linear_bias, len(ahead))
    check_all_dense({"labels": labels}, {"token_weight": token_weight})
    for each in inputs:
        if not isinstance(each, Tensor) or each.shape[:-1] != labels.shape or not labels.dim():
            raise ValueError(
                "expected hidden states (..., S, D) or logits (..., S, V) and labels (..., S), got "
                f"{tuple(each.shape)} and {tuple(labels.shape)}"
            )
    targets = [sequences.targets(labels, k, ignore_index) for k in ahead]
    token_weights: list[Tensor | None] = [None] * len(ahead)
    if token_weight is not None:
        if token_weight.requires_grad:
            raise ValueError("token_weight must not require a gradient here: pass it detached")
        checked = check_token_weight(token_weight, labels.shape, labels)
        token_weights = [moved(checked, k, 0.0) for k in ahead]
    items = _items(num_items, targets, token_weights, ignore_index, inputs[0])
    is_one = isinstance(input, Tensor) and isinstance(linear_weight, Tensor)
    if is_one and len(ahead) > 1 and not isinstance(linear_bias, Sequence):
        losses = _one_projection(
            inputs[0], heads[0], biases[0], targets, ahead, token_weights, items, ignore_index,
            LossOptions.of(**of_loss, reduction="none"), how,
        )  # fmt: skip
    else:
        of_logits = how._asdict()
        of_walk = {name: of_logits.pop(name) for name in OF_WALK}
        losses = [
            _one_offset(
                x, w, b, target, ignore_index=ignore_index, token_weight=t, num_items=n,
                **of_loss, **of_logits, **(of_walk if w is not None else {}),
            )
            if factor != 0
            else torch.zeros((), dtype=real_of(x), device=x.device)
            for x, w, b, target, t, n, factor in zip(
                inputs, heads, biases, targets, token_weights, items, factors, strict=True
            )
        ]  # fmt: skip
    parts = [loss * factor for loss, factor in zip(losses, factors, strict=True) if factor != 0]
    if not parts:  # a loss of 0 has a backward, too
        tensors = [x for x in (*inputs, *heads, *biases) if x is not None]
        parts = [x[:0].sum().to(losses[0].dtype) for x in tensors]
    return MultiTokenLoss(torch.stack(parts).sum(), torch.stack([loss.detach() for loss in losses]))


@partial(documented, names=Sequences._fields)
@partial(spelled_out, names=Sequences._fields)
def count_multi_token_items(
    labels: Tensor,
    offsets: int | Sequence[int],
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """How many labels each offset has, (K) int64: summed over micro-batches, their ``num_items``.

    Args:
        labels: (..., S), as in `multi_token_prediction_loss`, like all else.
        offsets: Those of the K predictions; a number: 1 to K.
        ignore_index: Labels that do not count.
        Options: each is described in `llmloss_ext.options`.

    Raises:
        ValueError: The shapes do not fit, or an offset is out of range.
    """
    sequences = Sequences(**with_defaults(options, Sequences._fields))
    return torch.stack(
        [
            (sequences.targets(labels, k, ignore_index) != ignore_index).sum()
            for k in _offsets(offsets)
        ]
    )


def _offsets(offsets: int | Sequence[int]) -> list[int]:
    if isinstance(offsets, Sequence):
        ahead = [as_integer("offsets", k) for k in offsets]
    else:
        ahead = list(range(1, as_integer("offsets", offsets) + 1))
    if not ahead or min(ahead) < 1:
        raise ValueError(f"offsets must be integers >= 1, or their number, got {offsets}")
    return ahead


def _factors(weights: Sequence[float] | None, count: int) -> list[float]:
    factors = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(factors) != count:
        raise ValueError(f"expected {count} weights, one for each offset, got {len(factors)}")
    if not all(abs(w) < math.inf for w in factors):
        raise ValueError(f"weights must be finite, got {factors}")
    return factors


def _each(name: str, given: Any, count: int) -> list[Any]:
    """One for each offset."""
    if given is None or isinstance(given, Tensor):
        return [given] * count
    each = list(given)
    if len(each) != count:
        raise ValueError(f"expected one {name}, or {count}, one for each offset; got {len(each)}")
    return each


def _items(
    num_items: Items,
    targets: list[Tensor],
    token_weights: list[Tensor | None],
    ignore_index: int,
    like: Tensor,
) -> list[Tensor]:
    """What each mean is divided by; 0: its loss is 0."""
    if num_items is None:
        real = real_of(like)
        return [
            composite.row_weights(t, target, ignore_index, real).sum().detach()
            for t, target in zip(token_weights, targets, strict=True)
        ]
    if isinstance(num_items, Tensor) and num_items.dim() and num_items.numel() > 1:
        num_items = list(num_items.unbind())
    given = list(num_items) if isinstance(num_items, Sequence) else [num_items] * len(targets)
    if len(given) != len(targets):
        raise ValueError(f"expected one num_items, or {len(targets)}, got {len(given)}")
    found = [items_tensor(n, "mean", like) for n in given]
    return [n for n in found if n is not None]


def _one_offset(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, **options: Any
) -> Tensor:
    if weight is None:
        return cross_entropy(input, target, class_dim=-1, **options)
    return linear_cross_entropy(input, weight, target, linear_bias=bias, **options)


def _one_projection(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: list[Tensor],
    ahead: list[int],
    token_weights: list[Tensor | None],
    items: list[Tensor],
    ignore_index: int,
    loss: LossOptions,
    how: RowOptions,
) -> list[Tensor]:
    """The loss of each offset, from the statistics of rows that are projected once for all."""
    options, scale = how.checked(ignore_index, weight.shape[0], hidden)
    if token_weights[0] is not None:
        targets = [
            composite.without_weightless(target, w, options, is_learned=False)
            for target, w in zip(targets, token_weights, strict=True)
            if w is not None
        ]
    for target, k in zip(targets, ahead, strict=True):
        if can_read(target):
            check_range(target, ignore_index, options.vocab_size, k)
    valid = [target != ignore_index for target in targets]
    classes = [composite.is_class(target, options) for target in targets]
    labels = torch.stack([torch.where(c, y, 0) for c, y in zip(classes, targets, strict=True)], -1)
    rows = linear_rows(
        statistics_of_labels, len(targets) + 2, hidden, weight, bias, others=[labels.long()],
        shared=[scale], numbers=[options.softcap], valid=torch.stack(valid).any(0),
        vocab_size=options.vocab_size, **how.walk,
    )  # fmt: skip
    *log_probs, lse, mean_log_prob = rows.unbind(-1)
    found = []
    for log_prob, target, is_valid, is_class, w, n in zip(
        log_probs, targets, valid, classes, token_weights, items, strict=True
    ):
        # Elsewhere than on a CPU, a target out of range is nan, as the kernels have it.
        log_prob = torch.where(is_class, log_prob, math.nan)
        stats = FloatStats(
            *(torch.where(is_valid, x, 0.0) for x in (log_prob, lse, lse, mean_log_prob, lse))
        )
        w_y = composite.target_weights(target, None, ignore_index, lse.dtype)
        w_t = None if w is None else composite.row_weights(w, target, ignore_index, lse.dtype)
        found.append(composite.mean(composite.losses_of(stats, w_y, w_t, loss), 1, n))
    return found


@row_function
def statistics_of_labels(rows: Rows) -> Tensor:
    """(n, K + 2): log p of K labels, the log-sum-exp, and the mean log p."""
    (labels,), (scale,) = rows.others, rows.shared
    distribution = Distribution.of(rows.logits, scale.reshape(()), rows.numbers[0])
    mean = distribution.x.mean(-1, keepdim=True) - distribution.lse
    return torch.cat([distribution.log_probs(labels), distribution.lse, mean], -1)
