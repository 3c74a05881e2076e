"""Weights of tokens by how difficult they are, for ``token_weight`` of a cross entropy.

They are made of the tokens' own losses, as ``reduction="none"`` gives them, and have no gradient;
a weight by (1 - p)^gamma, which has one, is ``focal_gamma``. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composite import real_of
from ..options import as_integer
from .bounded import check_same_shape, finite, valid_tokens, where_valid

__all__ = ["difficulty_weights", "select_difficult_tokens"]

_ROUNDING = 1e-9
"""0.7 times 10 is a little more than 7."""


def difficulty_weights(
    losses: Tensor, mask: Tensor | None = None, *, power: float = 1.0, shift: int = 0
) -> Tensor:
    """Weights proportional to the tokens' losses, whose mean over the tokens that count is 1.

    w = loss^power / mean(loss^power): hard tokens count for more, and easy ones for less.

    Args:
        losses: (..., S): of each token in nats, as ``reduction="none"`` gives them. Negative ones
            count as 0.
        mask: (..., S): which tokens count; others may hold anything, and get the weight 0. None:
            all.
        power: >= 0; 0 weighs all alike.
        shift: That of the function which gave the losses, and is given the weights: a loss stands
            at the position that predicts a label, its weight ``shift`` later, with the label.

    Returns:
        (..., S), detached, float32 for 16-bit losses. Where all losses are 0, all weights are 1.

    Raises:
        ValueError: The mask's shape is another, ``power`` is out of range, or ``shift`` < 0.
    """
    if not 0.0 <= power < math.inf:
        raise ValueError(f"power must be a finite number >= 0, got {power}")
    losses = losses.detach().to(real_of(losses))
    counts = torch.ones_like(losses, dtype=torch.bool)
    if mask is not None:
        counts = valid_tokens(mask, losses)
    positive = where_valid(counts, losses).clamp_min(0.0)
    # By the largest: powers of what lies in [0, 1] neither overflow nor all vanish.
    largest = positive.amax() if positive.numel() else positive.sum()
    relative = torch.where(largest > 0, positive / largest, 1.0).pow(power)
    relative = where_valid(counts, relative)
    mean = relative.sum() / counts.sum().clamp_min(1)
    weights = where_valid(counts, finite(relative / torch.where(mean > 0, mean, 1.0)))
    return _with_labels(weights, shift)


def select_difficult_tokens(
    losses: Tensor,
    mask: Tensor | None = None,
    *,
    reference_losses: Tensor | None = None,
    fraction: float = 0.6,
    by_sequence: bool = False,
    shift: int = 0,
) -> Tensor:
    """The weight 1 for the tokens from which most is to be learned, and 0 for the others.

    With a reference model's losses, these are the tokens of the largest excess loss, the model's
    minus the reference's (Rho-1, Lin et al. 2024); without, those of the largest loss. A mean with
    these weights is over the selected tokens, as in the paper.

    Args:
        losses: (..., S): of each token in nats, as ``reduction="none"`` gives them.
        mask: (..., S): which tokens count; others may hold anything, and are never selected. None:
            all.
        reference_losses: (..., S): of a model trained on what is wanted.
        fraction: In (0, 1]: the share of the tokens that count which is selected, rounded up to a
            whole number of tokens.
        by_sequence: Whether it is the share of each row (..., S), and not of the batch.
        shift: As in `difficulty_weights`.

    Returns:
        (..., S), 1 or 0, float32 for 16-bit losses. Of equal ones the first are taken. A loss of
        nan is larger than any other, so that it is seen.

    Raises:
        ValueError: A shape is another, ``fraction`` is out of range, or ``shift`` < 0.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    check_same_shape(losses, mask=mask, reference_losses=reference_losses)
    scores = losses.detach().to(real_of(losses))
    if reference_losses is not None:
        scores = scores - reference_losses.detach().to(scores.dtype)
    counts = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    length = losses.shape[-1] if by_sequence and losses.dim() else losses.numel()
    rows = (losses.numel() // max(length, 1), length)
    ranked, among = scores.reshape(rows), counts.reshape(rows)
    # Stable, so that equal scores keep their order: first by score, then those that count first.
    by_score = ranked.argsort(dim=-1, descending=True, stable=True)
    first = among.gather(-1, by_score).long().argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(-1, first)
    number = torch.ceil(among.sum(-1, keepdim=True).double() * fraction - _ROUNDING)
    place = torch.arange(ranked.shape[-1], device=ranked.device)
    selected = torch.zeros_like(ranked).scatter(-1, order, (place < number).to(ranked.dtype))
    return _with_labels(selected.reshape(losses.shape), shift)


def _with_labels(weights: Tensor, shift: int) -> Tensor:
    """What stands where a label is predicted, moved to where the label is given."""
    shift = as_integer("shift", shift)
    if shift < 0 or (shift and not weights.dim()):
        raise ValueError(f"shift must be an integer >= 0, for losses (..., S); got {shift}")
    if not shift:
        return weights
    length = weights.shape[-1]
    return F.pad(weights[..., : max(length - shift, 0)], (min(shift, length), 0))
