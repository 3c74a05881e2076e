"""Policy losses straight from hidden states: one walk, and no N x V logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import items_tensor
from ..linear import linear_log_probs
from ..linear.functional import HowChunks, HowLogits, LinearCall
from ..ops.rows import Rows
from ..options import OPTIONS, documented, option_names, spelled_out
from ..sequences import Sequences
from ..shard import Shard
from ..statistics import FloatStats, asked
from .policy import PolicyLoss, grpo_loss
from .policy_options import POLICY_OPTIONS, PolicyOptions
from .surrogates import PolicyMetrics, Tokens, contribution, prepare

__all__ = ["linear_policy_loss"]

_TABLE = OPTIONS | POLICY_OPTIONS


class _Surrogate(NamedTuple):
    """A policy loss whose tokens know theirs by themselves, as an `Objective`."""

    tokens: Tokens
    """Flat."""
    options: PolicyOptions

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What some tokens add to the loss and to each of `PolicyMetrics`."""
        part = contribution(stats.log_prob, stats.entropy, self.tokens.chunk(rows), self.options)
        return part.loss, tuple(part.metrics)


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    advantages: Tensor,
    old_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    reference_input: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    with_entropy: bool = False,
    entropy_mask: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    num_items: int | Tensor | None = None,
    entropy_items: int | Tensor | None = None,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    shard: Shard | None = None,
    **options: Any,
) -> PolicyLoss:
    """`grpo_loss` of hidden states: GRPO, DAPO, Dr. GRPO, CISPO, SAPO, GSPO, VESPO and PPO.

    Where a token's loss is a function of its own log-probability (and entropy), its gradient is
    formed with it, chunk by chunk: three matrix products. Where it needs those of its whole
    sequence (``importance_sampling_level`` other than "token", vespo, an off-policy mask), and
    under torch.compile, backward computes each chunk's logits again: four. The reference, if it is
    given by its hidden states, takes one more, before the policy's chunks.

    Args:
        input: The policy's hidden states (..., S, D), in rows of one sequence.
        linear_weight: The policy's projection (V, D).
        target: (..., S) int64 or int32: the tokens that were sampled, ``ignore_index`` elsewhere.
        advantages: (...) or (..., 1), one a sequence, or (..., S).
        old_log_probs: (..., S) of the policy that acted; None: the policy itself.
        mask: (..., S): which tokens count; None: all whose target is not ignored. Like everything
            else of a token, with a ``shift`` it stands where `linear_log_probs` has the token.
        reference_log_probs: (..., S) of the reference policy, or:
        reference_input: Its hidden states (..., S, E), with its
        reference_weight: (V, E) and
        reference_bias: (V). None of them gets a gradient.
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
    checked = PolicyOptions.of(**options)
    logits = HowLogits(ignore_index, softcap, logit_scale, vocab_size, temperature, logits_dtype)
    walk = HowChunks(chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype)
    call = LinearCall(
        input, linear_weight, target, linear_bias, None, logits, shift, Sequences(), shard
    )
    valid = call.leave_out(mask)
    if reference_input is not None:
        if reference_weight is None or reference_log_probs is not None:
            raise ValueError(
                "a reference is reference_log_probs, or reference_input with reference_weight"
            )
        labels = call.targets.reshape(call.shape)
        with torch.no_grad():
            reference_log_probs = linear_log_probs(
                reference_input, reference_weight, labels, linear_bias=reference_bias,
                ignore_index=call.options.ignore_index, softcap=softcap,
                logit_scale=logit_scale, temperature=temperature, vocab_size=vocab_size,
                chunk_tokens=chunk_tokens, max_chunk_bytes=max_chunk_bytes,
                drop_ignored=drop_ignored, logits_dtype=logits_dtype, shard=shard,
            )  # fmt: skip
    elif reference_weight is not None or reference_bias is not None:
        raise ValueError("reference_weight and reference_bias need reference_input")
    known: dict[str, Any] = {
        "reference_log_probs": reference_log_probs,
        "importance_sampling_ratio": importance_sampling_ratio,
        "entropy_mask": entropy_mask,
        "num_items": items_tensor(num_items, "mean", input),
        "entropy_items": items_tensor(entropy_items, "mean", input),
    }
    names = ["log_prob", "lse"]
    if with_entropy or checked.entropy_coef:
        names.append("entropy")
    wanted, chunks = asked(names), call.chunk_options(walk)
    if checked.by_sequences:
        stats = call.stats(wanted, chunks).floats.only(wanted)
        log_probs, entropy = (
            None if x is None else x.reshape(call.shape) for x in (stats.log_prob, stats.entropy)
        )
        assert log_probs is not None
        return grpo_loss(
            log_probs, old_log_probs, advantages, valid, entropy=entropy,
            sampling_log_probs=sampling_log_probs, **known, **options,
        )  # fmt: skip
    if sampling_log_probs is not None:
        raise ValueError("sampling_log_probs belongs to off_policy_mask_threshold")
    tokens = prepare(
        valid, checked, call.real, advantages=advantages, old_log_probs=old_log_probs, **known
    )
    objective = _Surrogate(tokens.flat(), checked)
    found = call.walk(objective, wanted, chunks)
    return PolicyLoss(found.loss, PolicyMetrics._make(found.metrics))


spelled_out(linear_policy_loss, POLICY_OPTIONS, POLICY_OPTIONS)
documented(
    linear_policy_loss,
    [name for name in option_names(linear_policy_loss, _TABLE) if name != "num_items"],
    _TABLE,
)
