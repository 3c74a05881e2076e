"""Preference losses straight from hidden states, and no N x V logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..options import documented, spelled_out
from .from_hidden import HIDDEN_OPTIONS, LOG_PROB, HiddenOptions, PolicyTokens, is_of_tokens
from .pairs import PreferenceLoss
from .preference import dpo_loss
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

    Chosen and rejected sequences go through the projection together, a chunk of tokens at a time.
    A token's gradient is known only with its pair's log-probabilities: backward computes each
    chunk's logits again, four matrix products for the policy. A reference that is given by its
    hidden states takes one more, before.

    Args:
        input: The policy's hidden states (2 B, S, D): B chosen sequences, then the B rejected, in
            the same order.
        linear_weight: The policy's projection (V, D).
        target: (2 B, S) int64 or int32; ``ignore_index`` at prompts and padding.
        loss: ``"dpo"``, ``"cpo"``, ``"simpo"`` or ``"orpo"``.
        ld_alpha: LD-DPO: see `length_desensitized_log_probs`. For dpo, with a reference of tokens.
        use_weighting: WPO: each pair is weighted by its two `wpo_weights`. For dpo.
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
    names = (*LOG_PROB, "log_sum_sq_probs") if use_weighting else LOG_PROB
    stats = policy.statistics(names)
    log_probs = stats.log_prob

    kinds = given.get("kind", "sigmoid")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    vectors = [*_scores(log_probs, valid, ld_alpha, bool({*entry.of_means} & {*kinds}))]
    if reference is not None:
        vectors += _reference_scores(reference, valid, ld_alpha)
    if use_weighting:
        weights = wpo_weights(log_probs, stats.log_sum_sq_probs, valid)
        chosen, rejected = weights.chunk(2)
        given["pair_weight"] = chosen * rejected
    if is_dpo and {"ipo", "sigmoid_norm"} & set(kinds):
        given["chosen_lengths"], given["rejected_lengths"] = valid.sum(-1).chunk(2)
    if _has_nll(loss, kinds, given) and "nll_loss" not in given:
        given["nll_loss"] = _nll(log_probs, valid, items_tensor(nll_items, "mean", input))
    elif nll_items is not None:
        raise ValueError("nll_items belongs to a loss that has a cross entropy of these tokens")
    return entry.function(*vectors, **given)


spelled_out(linear_preference_loss, HIDDEN_OPTIONS, HIDDEN_OPTIONS, with_others=True)
documented(linear_preference_loss, HIDDEN_OPTIONS, HIDDEN_OPTIONS)


def _scores(
    log_probs: Tensor, valid: Tensor, ld_alpha: float | None, of_means: bool
) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected sequences, (B) each."""
    if ld_alpha is not None:
        (chosen, rejected), masks = log_probs.chunk(2), valid.chunk(2)
        return length_desensitized_log_probs(chosen, rejected, *masks, ld_alpha=ld_alpha)
    scores = sequence_log_probs(log_probs, valid)
    if of_means:
        scores = scores / valid.sum(-1).clamp_min(1)
    chosen, rejected = scores.chunk(2)
    return chosen, rejected


def _reference_scores(
    reference: Tensor, valid: Tensor, ld_alpha: float | None
) -> tuple[Tensor, Tensor]:
    if is_of_tokens(reference, valid, must=ld_alpha is not None):
        return _scores(reference, valid, ld_alpha, False)
    chosen, rejected = reference.chunk(2)
    return chosen, rejected


def _has_nll(loss: str, kinds: tuple[str, ...], options: dict[str, Any]) -> bool:
    """Whether the loss takes the cross entropy of the chosen sequences."""
    if loss == "dpo":
        return "sft" in kinds
    return loss == "orpo" or (loss == "cpo" and options.get("cpo_alpha", 1.0) != 0)


def _nll(log_probs: Tensor, valid: Tensor, num_items: Tensor | None) -> Tensor:
    """The mean cross entropy of the chosen sequences' tokens; of no token 0."""
    chosen, mask = (x.chunk(2)[0] for x in (log_probs, valid))
    rows = torch.where(mask, -chosen, 0.0)
    return composite.mean(rows, mask.sum().clamp_min(1), num_items)
