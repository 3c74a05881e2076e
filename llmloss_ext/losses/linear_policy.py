"""Policy losses straight from hidden states: one walk, and no N x V logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import items_tensor
from ..linear.groups import Groups
from ..ops.rows import Rows
from ..options import documented, spelled_out
from ..statistics import FloatStats
from .bounded import check_same_shape
from .from_hidden import HIDDEN_OPTIONS, LOG_PROB, HiddenOptions, PolicyTokens
from .policy import PolicyLoss
from .policy_options import POLICY_OPTIONS, PolicyOptions
from .surrogates import PolicyMetrics, Tokens, contribution, prepare, with_sequences

__all__ = ["linear_policy_loss"]


class _Surrogate(NamedTuple):
    """A policy loss whose tokens know theirs by themselves, as an `Objective`."""

    tokens: Tokens
    """Flat."""
    options: PolicyOptions

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What some tokens add to the loss and to each of `PolicyMetrics`."""
        part = contribution(stats.log_prob, stats.entropy, self.tokens.chunk(rows), self.options)
        return part.loss, tuple(part.metrics)


class _OfSequences(NamedTuple):
    """A policy loss whose sequences know theirs by themselves, as an `Objective` over them."""

    tokens: Tokens
    """(B, S)."""
    options: PolicyOptions
    sampling_log_probs: Tensor | None

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What some sequences add to the loss and to each of `PolicyMetrics`."""
        log_probs: Tensor = stats.log_prob[0]
        entropy = None if stats.entropy is None else stats.entropy[0]
        sampling = None if self.sampling_log_probs is None else self.sampling_log_probs[rows]
        tokens = with_sequences(log_probs, self.tokens.chunk(rows), self.options, sampling)
        part = contribution(log_probs, entropy, tokens, self.options)
        return part.loss, tuple(part.metrics)


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    advantages: Tensor,
    old_log_probs: Tensor | None = None,
    with_entropy: bool = False,
    entropy_mask: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    num_items: int | Tensor | None = None,
    entropy_items: int | Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """`grpo_loss` of hidden states: GRPO, DAPO, Dr. GRPO, CISPO, SAPO, GSPO, VESPO and PPO.

    Where a token's loss is a function of its own log-probability (and entropy), its gradient is
    formed with it, chunk by chunk: three matrix products. Where it needs those of its whole
    sequence (``importance_sampling_level`` other than "token", vespo, an off-policy mask), chunks
    have whole sequences. Where the logits of the longest take more than 1 GiB (or the weight, if
    that is more), or than ``chunk_tokens`` or ``max_chunk_bytes`` allow, chunks cut sequences, and
    backward computes the logits again: four products, as under torch.compile. The reference, if it
    is given by its hidden states, takes one more, before the policy's chunks.

    Args:
        input: The policy's hidden states (..., S, D), in rows of one sequence.
        linear_weight: The policy's projection (V, D).
        target: (..., S) int64 or int32: the tokens that were sampled, ``ignore_index`` elsewhere.
        advantages: (...) or (..., 1), one a sequence, or (..., S).
        old_log_probs: (..., S) of the policy that acted; None: the policy itself.
        with_entropy: Whether to compute the entropy as a metric; with ``entropy_coef`` it is.
        entropy_mask: As in `grpo_loss`.
        importance_sampling_ratio: As in `grpo_loss`.
        sampling_log_probs: As in `grpo_loss`.
        num_items: As in `grpo_loss`.
        entropy_items: As in `grpo_loss`.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `PolicyLoss`.

    Raises:
        ValueError: Shapes that do not fit, an option out of range or not of this loss, or two
            references.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.

    Example:
        >>> hidden = model.body(tokens)[:, prompt - 1 : -1]  # (B, S, D), of the completions
        >>> loss = linear_policy_loss(
        ...     hidden, model.head.weight, tokens[:, prompt:], mask=mask, advantages=advantages,
        ...     old_log_probs=old, loss_type="dapo", num_items=tokens_of_the_step,
        ... ).loss
    """
    hidden, options = HiddenOptions.split(options)
    checked = PolicyOptions.of(**options)
    policy = PolicyTokens(input, linear_weight, target, hidden)
    known: dict[str, Any] = {
        "reference_log_probs": policy.reference(),
        "importance_sampling_ratio": importance_sampling_ratio,
        "entropy_mask": entropy_mask,
        "num_items": items_tensor(num_items, "mean", input),
        "entropy_items": items_tensor(entropy_items, "mean", input),
    }
    has_entropy = with_entropy or checked.entropy_coef
    names = (*LOG_PROB, "entropy") if has_entropy else LOG_PROB
    check_same_shape(policy.valid, sampling_log_probs=sampling_log_probs)
    if sampling_log_probs is not None and checked.off_policy_mask_threshold is None:
        raise ValueError("sampling_log_probs belongs to off_policy_mask_threshold")
    tokens = prepare(
        policy.valid, checked, policy.call.real, advantages=advantages,
        old_log_probs=old_log_probs, **known,
    )  # fmt: skip
    number = math.prod(policy.shape[:-1])
    items = number if checked.loss_type == "luspo" else None  # which adds up a sequence's tokens
    if checked.by_sequences:
        sequences = Groups(1, number, policy.shape[-1])
        sampling = sampling_log_probs
        if sampling is not None:
            sampling = sampling.reshape(number, policy.shape[-1])
        of_sequences = _OfSequences(tokens.rows(), checked, sampling)
        found = policy.walk(of_sequences, names, sequences, items=items)
    else:
        found = policy.walk(_Surrogate(tokens.flat(), checked), names, items=items)
    return PolicyLoss(found.loss, PolicyMetrics._make(found.metrics))


_TABLE = HIDDEN_OPTIONS | POLICY_OPTIONS
documented(spelled_out(linear_policy_loss, _TABLE, _TABLE), _TABLE, _TABLE)
