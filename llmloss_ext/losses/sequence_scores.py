"""One number for each sequence, from the log-probabilities of its tokens.

They take what `llmloss_ext.token_stats` and `llmloss_ext.linear_log_probs` return, so that they
work from logits and from hidden states alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bounded import bounded_exponent, check_same_shape, valid_tokens, where_valid
from .pairs import constant, working

__all__ = ["length_desensitized_log_probs", "sequence_log_probs", "wpo_weights"]


def sequence_log_probs(
    log_probs: Tensor, mask: Tensor | None = None, *, average: bool = False
) -> Tensor:
    """The log-probability of each sequence: the sum (or mean) over its tokens of log p.

    Args:
        log_probs: (..., S), in nats, 0 where a token takes no part.
        mask: (..., S): which tokens count; None: all (ignored ones are 0 already).
        average: Whether to divide by the number of tokens, which then needs the mask.

    Returns:
        (...), in nats, float32 for 16-bit tokens, whose digits a long sum would lose; nan for the
        mean of no token. What masked tokens hold does not matter.

    Raises:
        ValueError: The shapes do not fit, or ``average`` has no mask.
    """
    if mask is None:
        if average:
            raise ValueError("the mean over a sequence needs the mask of its tokens")
        return working(log_probs).sum(-1)
    total = where_valid(valid_tokens(mask, log_probs), working(log_probs)).sum(-1)
    return total / mask.bool().sum(-1) if average else total


def length_desensitized_log_probs(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    ld_alpha: float,
) -> tuple[Tensor, Tensor]:
    """LD-DPO: what is beyond the shorter sequence of a pair counts less (Liu et al. 2024).

    The sum of log p over as many tokens as both have, plus ld_alpha times that over the rest. Use
    it in place of `sequence_log_probs`, for the policy and for the reference.

    Args:
        chosen_log_probs: (..., S), in nats.
        rejected_log_probs: (..., T); a pair for each of the chosen.
        chosen_mask: (..., S): which tokens count.
        rejected_mask: (..., T).
        ld_alpha: In [0, 1]; 1: DPO.

    Returns:
        Of the chosen and of the rejected, (...) each, float32 for 16-bit tokens. What masked tokens
        hold does not matter.

    Raises:
        ValueError: The shapes do not fit, or ``ld_alpha`` is out of range.
    """
    if not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")
    if chosen_log_probs.shape[:-1] != rejected_log_probs.shape[:-1]:
        raise ValueError(
            "expected a rejected sequence for each chosen one, got shapes "
            f"{tuple(chosen_log_probs.shape)} and {tuple(rejected_log_probs.shape)}"
        )
    masks = (
        valid_tokens(chosen_mask, chosen_log_probs),
        valid_tokens(rejected_mask, rejected_log_probs),
    )
    shared = torch.minimum(*(mask.sum(-1) for mask in masks)).unsqueeze(-1)

    def score(log_probs: Tensor, valid: Tensor) -> Tensor:
        in_both, x = valid.cumsum(-1) <= shared, working(log_probs)
        both = where_valid(valid & in_both, x).sum(-1)
        if ld_alpha == 0:  # not 0 times what may be -inf
            return both
        return both + ld_alpha * where_valid(valid & ~in_both, x).sum(-1)

    return score(chosen_log_probs, masks[0]), score(rejected_log_probs, masks[1])


def wpo_weights(log_probs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO: how much the policy would say a sequence itself (Zhou et al. 2024, eq. 2).

    exp of the mean over the sequence's tokens of log p_y - log sum_j p_j^2. The weight of a pair is
    the product of those of its chosen and its rejected: ``pair_weight`` of
    `llmloss_ext.losses.dpo_loss`.

    Args:
        log_probs: (..., S), in nats.
        log_sum_sq_probs: (..., S): the statistic of that name of `llmloss_ext.token_stats`.
        mask: (..., S): which tokens count.

    Returns:
        (...), without a gradient, float32 for 16-bit tokens; 1 for a sequence of no token, as in
        TRL. What masked tokens hold does not matter.

    Raises:
        ValueError: The shapes do not fit.
    """
    valid = valid_tokens(mask, log_probs)
    check_same_shape(log_probs, log_sum_sq_probs=log_sum_sq_probs)
    of_tokens, of_models = (
        where_valid(valid, constant(x)).sum(-1) for x in (log_probs, log_sum_sq_probs)
    )
    return torch.exp(bounded_exponent((of_tokens - of_models) / valid.sum(-1).clamp_min(1)))
