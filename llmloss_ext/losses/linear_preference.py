"""Preference losses straight from hidden states, and no N x V logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..linear.groups import Groups
from ..ops.rows import Rows
from ..options import documented, spelled_out
from ..statistics import FloatStats
from .from_hidden import (
    HIDDEN_OPTIONS,
    LOG_PROB,
    HiddenOptions,
    PolicyTokens,
    is_of_tokens,
    options_of_part,
)
from .pairs import PreferenceLoss, check_vectors
from .preference import KINDS, dpo_loss
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .sequence_scores import length_desensitized_log_probs, sequence_log_probs, wpo_weights

__all__ = ["linear_preference_loss"]


class _Loss(NamedTuple):
    """A loss over pairs, and what it takes."""

    function: Callable[..., PreferenceLoss]
    of_means: tuple[str, ...] = ()
    """The kinds that are of the mean log-probability of a sequence's tokens, not of the sum."""


_LOSSES = {
    "dpo": _Loss(dpo_loss),
    "cpo": _Loss(cpo_loss, ("simpo", "ipo")),
    "simpo": _Loss(simpo_loss, ("sigmoid",)),
    "orpo": _Loss(orpo_loss, ("sigmoid",)),
}


class _OfPairs(NamedTuple):
    """A preference loss as an `Objective` over pairs, whose statistics are (2, pairs, S)."""

    function: Callable[..., PreferenceLoss]
    options: dict[str, Any]
    valid: Tensor
    """(2, B, S): the chosen sequences' tokens that count, and the rejected ones'."""
    reference: tuple[Tensor, ...]
    """The scores of the chosen and of the rejected sequences, (B) each, if there is a reference."""
    ld_alpha: float | None
    use_weighting: bool
    of_means: bool
    has_nll: bool
    nll_items: Tensor | None

    def is_a_sum(self, kinds: tuple[str, ...]) -> bool:
        """Whether the loss is a sum over pairs, each known by itself."""
        in_one = self.options.get("reduction", "mean") == "mean" and self.valid.shape[1] > 0
        of_ranks = any(kind in KINDS and KINDS[kind].of_ranks for kind in kinds)
        return in_one and not of_ranks and self.options.get("nll_loss") is None

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What some pairs add to the loss and to each metric of `PreferenceLoss`."""
        assert isinstance(rows, slice)
        pairs, count = rows, self.valid.shape[1]
        log_probs, valid = stats.log_prob, self.valid[:, pairs]
        options = options_of_part(self.options, _OF_PAIRS, pairs, count)
        vectors = [*_scores(log_probs, valid, self.ld_alpha, self.of_means)]
        vectors += [scores[pairs] for scores in self.reference]
        if self.use_weighting:
            chosen, rejected = wpo_weights(log_probs, stats.log_sum_sq_probs, valid)
            options["pair_weight"] = chosen * rejected
        if self.has_nll:
            options["nll_loss"] = self._nll(log_probs[0], valid[0])
        loss, *metrics = self.function(*vectors, **options)
        around = (pairs.start, count - pairs.stop)
        return loss, tuple(F.pad(x, around) if x is not None and x.dim() else x for x in metrics)

    def _nll(self, log_probs: Tensor, valid: Tensor) -> Tensor:
        """The cross entropy of some chosen sequences over the tokens of all; of no token 0."""
        rows = torch.where(valid, -log_probs, 0.0)
        return composite.mean(rows, self.valid[0].sum().clamp_min(1), self.nll_items)


_LENGTHS = ("chosen_lengths", "rejected_lengths")
_OF_PAIRS = ("pair_weight", *_LENGTHS)
"""The options that are a number for each pair."""


def linear_preference_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    loss: str = "dpo",
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    nll_items: int | Tensor | None = None,
    **options: Any,
) -> PreferenceLoss:
    """`dpo_loss`, `cpo_loss`, `simpo_loss` or `orpo_loss` of hidden states.

    A token's gradient is known with its pair's log-probabilities. So whole pairs go through the
    projection, one or more in a chunk: three matrix products for the policy. Where the logits of
    the longest pair take more than 1 GiB (or the weight, if that is more), or than ``chunk_tokens``
    or ``max_chunk_bytes`` allow, chunks cut pairs, and backward computes the logits again: four.
    So it does for kinds that compare all pairs (aot, aot_unpaired), ``reduction="none"``, an
    ``nll_loss`` that is given, and compiled graphs. A reference that is given by its hidden states
    takes one product more, before.

    Args:
        input: The policy's hidden states (2 B, S, D): B chosen sequences, then the B rejected, in
            the same order.
        linear_weight: The policy's projection (V, D).
        target: (2 B, S) int64 or int32; ``ignore_index`` at prompts and padding.
        loss: ``"dpo"``, ``"cpo"``, ``"simpo"`` or ``"orpo"``.
        ld_alpha: LD-DPO: see `length_desensitized_log_probs`. For dpo, with a reference of tokens.
        use_weighting: WPO: each pair is weighted by its two `wpo_weights`, which are then its
            ``pair_weight``. For dpo.
        nll_items: The chosen sequences' tokens of all micro-batches, by which the cross entropy
            term is divided; None: those of this one.
        **options: Those of the function that ``loss`` names (kind, beta, label_smoothing,
            num_items, reduction ...). Lengths come from the tokens, where the loss takes them, and
            so does ``nll_loss`` if it is not given: the mean over the chosen sequences' tokens of
            ``target`` (TRL's ORPO and CPO average over their prompts too).
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `PreferenceLoss`.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range or not of this loss.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.

    Example:
        >>> hidden = model.body(torch.cat([chosen, rejected]))
        >>> linear_preference_loss(
        ...     hidden, model.head.weight, labels, shift=1, reference_input=reference.body(ids),
        ...     reference_weight=reference.head.weight, beta=0.1,
        ... ).loss
    """
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
    entry, is_dpo = _LOSSES[loss], loss == "dpo"
    if not is_dpo and (ld_alpha is not None or use_weighting):
        raise ValueError(f'ld_alpha and use_weighting belong to loss="dpo", got {loss!r}')
    hidden, given = HiddenOptions.split(options)
    policy = PolicyTokens(input, linear_weight, target, hidden)
    valid = policy.valid
    if valid.dim() != 2 or len(valid) % 2:
        raise ValueError(
            "expected hidden states (2 B, S, D), the chosen sequences before the rejected, got "
            f"{tuple(input.shape)}"
        )
    reference = policy.reference()
    if (reference is not None) != is_dpo:
        raise ValueError(f"loss={loss!r} {'needs a' if is_dpo else 'has no'} reference")
    for name in (*_LENGTHS, *(["pair_weight"] if use_weighting else [])):
        if given.get(name) is not None:  # what is made here would take its place
            raise ValueError(f"{name} comes from the tokens here: leave it out")
    kinds = given.get("kind", "sigmoid")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    pairs = Groups(2, len(valid) // 2, valid.shape[1])
    reference_scores: tuple[Tensor, ...] = ()
    if reference is not None:
        reference_scores = _reference_scores(reference, valid, ld_alpha)
    if is_dpo and {"ipo", "sigmoid_norm"} & set(kinds):
        given |= dict(zip(_LENGTHS, valid.sum(-1).chunk(2), strict=True))
    has_nll = _has_nll(loss, kinds, given) and given.get("nll_loss") is None
    if nll_items is not None and not has_nll:
        raise ValueError("nll_items belongs to a loss that has a cross entropy of these tokens")
    objective = _OfPairs(
        entry.function, given, valid.reshape(pairs), reference_scores, ld_alpha, use_weighting,
        of_means=bool({*entry.of_means} & {*kinds}), has_nll=has_nll,
        nll_items=items_tensor(nll_items, "mean", input),
    )  # fmt: skip
    of_pairs = {name: given.get(name) for name in _OF_PAIRS}
    check_vectors(pairs=valid.new_empty(pairs.number), **of_pairs)
    names = (*LOG_PROB, "log_sum_sq_probs") if use_weighting else LOG_PROB
    found = policy.walk(
        objective, names, pairs, in_parts=objective.is_a_sum(kinds), items=pairs.number
    )
    return PreferenceLoss(found.loss, *found.metrics)  # type: ignore[arg-type]


spelled_out(linear_preference_loss, HIDDEN_OPTIONS, HIDDEN_OPTIONS, with_others=True)
documented(linear_preference_loss, HIDDEN_OPTIONS, HIDDEN_OPTIONS)


def _scores(
    log_probs: Tensor, valid: Tensor, ld_alpha: float | None, of_means: bool
) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected sequences, (B) each; the tokens' are (2, B, S)."""
    if ld_alpha is not None:
        return length_desensitized_log_probs(*log_probs, *valid, ld_alpha=ld_alpha)
    scores = sequence_log_probs(log_probs, valid)
    if of_means:
        scores = scores / valid.sum(-1).clamp_min(1)
    chosen, rejected = scores
    return chosen, rejected


def _reference_scores(
    reference: Tensor, valid: Tensor, ld_alpha: float | None
) -> tuple[Tensor, Tensor]:
    if is_of_tokens(reference, valid, must=ld_alpha is not None):
        of_pairs = (2, len(valid) // 2, valid.shape[-1])
        return _scores(reference.reshape(of_pairs), valid.reshape(of_pairs), ld_alpha, False)
    chosen, rejected = reference.chunk(2)
    return chosen, rejected


def _has_nll(loss: str, kinds: tuple[str, ...], options: dict[str, Any]) -> bool:
    """Whether the loss takes the cross entropy of the chosen sequences."""
    if loss == "dpo":
        return "sft" in kinds
    return loss == "orpo" or (loss == "cpo" and options.get("cpo_alpha", 1.0) != 0)
