"""Unlikelihood: tokens that a model should not produce, such as those that it repeats.

Welleck et al. 2020. All are terms beside the likelihood: `combined_loss` adds them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composite
from ..checks import check_all_dense, items_tensor
from ..columns import Distribution
from ..composite import real_of
from ..linear.row_functions import RowOptions, Rows, linear_rows, row_function
from ..options import as_integer, documented, spelled_out, with_defaults
from ..rowwise import by_rows
from ..sequences import Sequences
from .bounded import check_same_shape, finite, valid_tokens, where_valid
from .objective import check_projection
from .pairs import working

__all__ = ["repeated_ngrams", "sequence_unlikelihood_loss", "unlikelihood_loss"]


_OPTIONS = (*Sequences._fields, *RowOptions._fields)


@partial(documented, names=_OPTIONS)
@partial(spelled_out, names=_OPTIONS)
def unlikelihood_loss(
    input: Tensor,
    input_ids: Tensor,
    linear_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    labels: Tensor | None = None,
    context: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Token-level unlikelihood: what stands in the context is not to be said again.

    The mean over tokens of -sum over c in C of log(1 - p_c), where C are the different tokens of
    the context, of the same document, but for the next one itself (Welleck et al. 2020; the sum and
    the mean are those of their fairseq code). 1 - p_c is made of the other probabilities, and keeps
    its digits as p_c goes to 1.

    Args:
        input: Hidden states (..., S, D) if ``linear_weight`` is given, else logits (..., S, V).
            From hidden states, logits exist for a chunk of tokens at a time; four products.
        input_ids: (..., S): position i predicts i + 1, from the context of the tokens 0 to i.
        linear_weight: The projection (V, D).
        linear_bias: (V), with ``linear_weight``.
        labels: (..., S): what is predicted, ``input_ids`` by default; ``ignore_index`` where there
            is no loss, such as in a prompt, whose tokens are context all the same.
        context: Only so many of the last tokens, >= 1; None: all.
        ignore_index: Of ``labels``. A token of this id, or of none in [0, vocab_size), is not
            penalised either.
        reduction: ``"mean"`` over the tokens that have a next one, ``"sum"`` or ``"none"``.
        num_items: Replaces the number of tokens of the mean, by that of all micro-batches.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        0-d in nats, or (..., S) for ``"none"``, where the loss of a label stands at the position
        that predicts it; float32 for 16-bit inputs. The mean of no token is nan.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    check_all_dense(
        {"input": input, "input_ids": input_ids},
        {"linear_weight": linear_weight, "linear_bias": linear_bias, "labels": labels},
    )
    given = with_defaults(options, _OPTIONS)
    how = RowOptions(**{name: given[name] for name in RowOptions._fields})
    sequences = Sequences(**{name: given[name] for name in Sequences._fields})
    check_projection(linear_weight, linear_bias=linear_bias, **how.walk)
    if not input_ids.dim() or input_ids.shape != input.shape[:-1]:
        raise ValueError(
            f"input_ids must have one token per row, shape {tuple(input.shape[:-1])}, got "
            f"{tuple(input_ids.shape)}"
        )
    labels = input_ids if labels is None else labels
    check_same_shape(input_ids, labels=labels)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    length = input_ids.shape[-1]
    width = 0 if context is None else as_integer("context", context)  # 0: all
    if context is not None and width < 1:
        raise ValueError(f"context must be >= 1, got {context}")
    items = items_tensor(num_items, reduction, input)
    columns = input.shape[-1] if linear_weight is None else linear_weight.shape[0]
    checked, scale = how.checked(ignore_index, columns, input)
    used = checked.vocab_size
    targets = sequences.targets(labels, 1, ignore_index)
    valid = targets != ignore_index
    may_be = (input_ids >= 0) & (input_ids < used) & (input_ids != ignore_index)
    if sequences.attention_mask is not None:
        may_be = may_be & sequences.attention_mask.bool()
    documents = [d.expand(input_ids.shape) for d in sequences.documents(input_ids)]
    count = input_ids.numel() // max(length, 1)
    texts = [t.reshape(count, length) for t in (input_ids, may_be, *documents)]
    places = torch.arange(input_ids.numel(), device=input.device).reshape(input_ids.shape)
    others = [targets.unsqueeze(-1), places.unsqueeze(-1)]
    numbers = [checked.softcap, width]
    if linear_weight is not None:
        rows = linear_rows(
            unlikelihood_rows, 1, input, linear_weight, linear_bias, others=others,
            shared=[scale, *texts], numbers=numbers, valid=valid, vocab_size=used, **how.walk,
        ).squeeze(-1)  # fmt: skip
    else:

        def of_logits(x: Tensor, target: Tensor, place: Tensor, scale: Tensor) -> Tensor:
            flat = [t.reshape(-1, t.shape[-1]) for t in (x, target, place)]
            found = unlikelihood_rows(Rows(flat[0], flat[1:], [scale, *texts], numbers))
            return found.reshape(x.shape[:-1])

        rows = by_rows(of_logits, input[..., :used], tuple(others), valid, (scale,))
    if reduction == "none":
        return rows
    if reduction == "sum":
        return composite.total(rows)
    return composite.mean(rows, valid.sum(), items)


@row_function
def unlikelihood_rows(rows: Rows) -> Tensor:
    """(n, 1): -sum of log(1 - p) over the different tokens of each row's context."""
    (target, place), (scale, ids, may_be, *documents) = rows.others, rows.shared
    softcap, context = rows.numbers
    classes, length = rows.logits.shape[-1], ids.shape[-1]
    text = torch.div(place, length, rounding_mode="floor")
    at = place - text * length
    width = min(int(context), length) if context else length
    before = at - torch.arange(width, device=at.device)  # the position itself, and earlier
    inside, before = before >= 0, before.clamp_min(0)
    candidates = ids[text, before]
    counts = inside & may_be[text, before] & (candidates != target)
    for document in documents:
        counts = counts & (document[text, before] == document[text, at])
    # One column more takes those that are none.
    chosen = torch.zeros(target.shape[0], classes + 1, dtype=torch.bool, device=at.device)
    chosen = chosen.scatter(-1, torch.where(counts, candidates, classes).long(), True)
    distribution = Distribution.of(rows.logits, scale.reshape(()), softcap)
    return -distribution.log_rest(chosen[:, :classes]).unsqueeze(-1)


def sequence_unlikelihood_loss(
    log_probs: Tensor,
    penalised: Tensor,
    mask: Tensor | None = None,
    *,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Sequence-level unlikelihood: some of the tokens that a model has generated were wrong.

    The mean over its tokens of -log(1 - p) of those that are penalised (Welleck et al. 2020).

    Args:
        log_probs: (..., S) of the generated tokens, in nats: of `llmloss_ext.linear_log_probs` or
            `llmloss_ext.token_stats`, whose digits tell 1 - p up to p = 1.
        penalised: (..., S): which, such as `repeated_ngrams`, moved like the log-probabilities.
        mask: (..., S): which tokens were generated, and count in the mean; others may hold
            anything. None: all.
        num_items: Replaces the number of tokens, by that of all micro-batches.

    Returns:
        0-d in nats, float32 for 16-bit log-probabilities. Without ``num_items``, the mean of no
        token is nan. A p of 1 exactly counts as the largest number below it, without a gradient.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_same_shape(log_probs, penalised=penalised)
    counts = torch.ones_like(log_probs, dtype=torch.bool)
    if mask is not None:
        counts = valid_tokens(mask, log_probs)
    wrong = counts & penalised.bool()
    real = real_of(log_probs)
    # Elsewhere log(1 / 2): no log 0, and the gradient is cut off.
    log_p = torch.where(wrong, working(log_probs), -1.0).clamp_max(-torch.finfo(real).tiny)
    losses = where_valid(wrong, -torch.log(-torch.expm1(log_p)))
    items = items_tensor(num_items, "mean", log_probs)
    return finite(composite.mean(losses, counts.sum(), items))


def repeated_ngrams(ids: Tensor, n: int = 4, mask: Tensor | None = None) -> Tensor:
    """Which tokens are part of an n-gram that stands earlier in the same text, too.

    As in the fairseq code of Welleck et al. 2020, the two may overlap. Exact, and without waiting
    for the device.

    Args:
        ids: (..., S), integers.
        n: >= 1.
        mask: (..., S): which tokens count; an n-gram with another among its tokens does not. None:
            all.

    Returns:
        (..., S) bool.

    Raises:
        ValueError: n < 1, or the shapes do not fit.
    """
    n = as_integer("n", n)
    if n < 1 or not ids.dim():
        raise ValueError(f"expected n >= 1 and ids (..., S), got {n} and {tuple(ids.shape)}")
    check_same_shape(ids, mask=mask)
    length = ids.shape[-1]
    if length < n:
        return torch.zeros_like(ids, dtype=torch.bool)
    whole = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    grams = tokens = _ranks(ids.long())
    counts = whole
    for ahead in range(1, n):
        # A number of the (ahead + 1)-gram, from that of the shorter one and of the token behind it.
        later = F.pad(tokens[..., ahead:], (0, ahead))
        grams = _ranks(grams * length + later)
        counts = counts & F.pad(whole[..., ahead:], (0, ahead), value=False)
    # Those that do not count are all different.
    alone = -1 - torch.arange(length, device=ids.device)
    ordered, order = torch.where(counts, grams, alone).sort(dim=-1, stable=True)
    again = F.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0), value=False)
    begins = torch.zeros_like(again).scatter(-1, order, again)
    result = begins
    for behind in range(1, n):
        result = result | F.pad(begins[..., : length - behind], (behind, 0), value=False)
    return result


def _ranks(keys: Tensor) -> Tensor:
    """(..., S): equal keys of a row as equal numbers below S, in their order."""
    ordered, order = keys.sort(dim=-1, stable=True)
    new = F.pad((ordered[..., 1:] != ordered[..., :-1]).long(), (1, 0)).cumsum(-1)
    return torch.zeros_like(keys).scatter(-1, order, new)
