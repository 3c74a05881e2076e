"""The surrogates of policy losses, token by token: what each token adds to the loss.

The seam between the losses and whoever has a batch's log-probabilities in parts:

1. `prepare` makes `Tokens` of masks, advantages and stored log-probabilities: all that is known
   before the policy's log-probabilities, among it what each token's loss is divided by.
2. Where `PolicyOptions.by_sequences`, `with_sequences` adds what is a number of a whole sequence,
   from the log-probabilities of all tokens. Elsewhere it is left out.
3. `contribution` of any part of the tokens (`Tokens.flat`, `Tokens.chunk`), in any order: a sum
   over its tokens, differentiable in their log-probabilities and entropies. The loss and each
   metric is the sum of its parts' contributions; nothing remains to be divided.

A walk over chunks of tokens is thus, for token-level ratios,

    tokens = prepare(mask, options, dtype, advantages=..., old_log_probs=...).flat()
    for at in chunks:  # slices
        part = contribution(log_probs[at], entropy[at], tokens.chunk(at), options)

Log-probabilities of 16 bits are read as float32; their gradients stay within their own type, see
`bounded.Bounds`. What stands at tokens that do not count may be nan: it is read nowhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from .bounded import Bounds, check_same_shape, of_tokens_or_sequences, where_valid
from .policy_options import BY_SEQUENCES, CLIPPED, PolicyOptions
from .policy_weights import off_policy_mask

__all__ = [
    "Contribution",
    "PolicyMetrics",
    "Terms",
    "Tokens",
    "added_up",
    "contribution",
    "normalizing_weights",
    "prepare",
    "surrogate",
    "token_losses",
    "with_sequences",
]


class Tokens(NamedTuple):
    """What is known of each token; every tensor that is there has the shape of ``valid``."""

    valid: Tensor
    """bool: which count. Elsewhere the others hold 0 or nothing that matters."""
    advantages: Tensor
    weights: Tensor
    """What the token's loss is multiplied by, known from the masks alone; 0 where not valid."""
    entropy_weights: Tensor
    """The same for its entropy: 1 over the number of those that count."""
    mean_weights: Tensor
    """Of the mean over the tokens of this call, for metrics."""
    ratio_weights: Tensor
    """Of the mean over whatever has an importance ratio: tokens, or sequences."""
    old: Tensor | None = None
    """None: the policy itself."""
    reference: Tensor | None = None
    factor: Tensor | None = None
    """Of the surrogate, without the KL: rollout weights and masks."""
    log_rollout: Tensor | None = None
    """Of vespo: the logarithm of the sequence's rollout weight."""
    log_ratio: Tensor | None = None
    """The logarithm of the importance ratio, with its gradient; None: the token's own."""
    phi: Tensor | None = None
    """Of vespo: what log pi is multiplied by."""

    def flat(self) -> Tokens:
        """The same as vectors of length N."""
        return Tokens._make(None if x is None else x.reshape(-1) for x in self)

    def rows(self) -> Tokens:
        """The same as (B, S), a sequence each."""
        shape = (math.prod(self.valid.shape[:-1]), self.valid.shape[-1])
        return Tokens._make(None if x is None else x.reshape(shape) for x in self)

    def chunk(self, at: slice | Tensor) -> Tokens:
        """Some of the tokens, of `flat`, or of the sequences, of `rows`."""
        return Tokens._make(None if x is None else x[at] for x in self)


def prepare(
    mask: Tensor,
    options: PolicyOptions,
    dtype: torch.dtype,
    *,
    advantages: Tensor,
    old_log_probs: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    entropy_items: int | Tensor | None = None,
) -> Tokens:
    """All that is known before the policy's log-probabilities.

    Args:
        mask: (..., S): which tokens count.
        options: Of the loss.
        dtype: Of the log-probabilities that are to come.
        advantages: (...), (..., 1) or (..., S).
        old_log_probs: (..., S), or None: the policy is the one that acted.
        reference_log_probs: (..., S).
        importance_sampling_ratio: (..., S) or (..., 1): see `rollout_weights`.
        entropy_mask: (..., S): which tokens have a surrogate and an entropy bonus.
        num_items: What the loss is divided by: the sequences or the tokens of a step.
        entropy_items: What the entropies' sum is divided by.

    Raises:
        ValueError: The shapes do not fit, or what an option needs is not there.
    """
    valid = mask.bool()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    check_same_shape(
        mask, old_log_probs=old_log_probs, reference_log_probs=reference_log_probs,
        entropy_mask=entropy_mask,
    )  # fmt: skip
    if options.beta and reference_log_probs is None:
        raise ValueError("beta needs reference_log_probs")
    acting = valid if entropy_mask is None else valid & entropy_mask.bool()
    rollout = log_rollout = None
    if importance_sampling_ratio is not None:
        rollout = of_tokens_or_sequences(
            "importance_sampling_ratio", importance_sampling_ratio, mask
        )
        rollout = rollout.detach().to(real)
    factor = None if entropy_mask is None else acting.to(real)
    if rollout is not None and options.loss_type == "vespo":
        log_rollout = _log_rollout(rollout, valid).expand(valid.shape)
    elif rollout is not None:
        rollout = where_valid(valid, rollout)
        factor = rollout if factor is None else rollout * factor
    lengths = valid.sum(-1, keepdim=True)
    count = valid.sum().clamp_min(1)
    mean_weights = valid / count.to(real)
    by_sequence = options.importance_sampling_level == "sequence"
    return Tokens(
        valid=valid,
        advantages=where_valid(
            valid, of_tokens_or_sequences("advantages", advantages, mask).detach().to(real)
        ),
        weights=normalizing_weights(valid, options, num_items, real),
        entropy_weights=_entropy_weights(acting, options, num_items, entropy_items, real),
        mean_weights=mean_weights,
        ratio_weights=(
            valid / lengths.clamp_min(1).to(real) / _sequences(valid, real)
            if by_sequence
            else mean_weights
        ),
        old=_stored(old_log_probs, valid, real),
        reference=_stored(reference_log_probs, valid, real),
        factor=factor,
        log_rollout=log_rollout,
    )


def _stored(log_probs: Tensor | None, valid: Tensor, real: torch.dtype) -> Tensor | None:
    return None if log_probs is None else where_valid(valid, log_probs.detach().to(real))


def _sequences(valid: Tensor, real: torch.dtype) -> Tensor:
    """How many there are, at least 1."""
    number = math.prod(valid.shape[:-1])
    return torch.full((), number, dtype=real, device=valid.device).clamp_min(1)


def normalizing_weights(
    valid: Tensor,
    options: PolicyOptions,
    num_items: int | Tensor | None,
    real: torch.dtype,
) -> Tensor:
    """(..., S): what each token's loss is multiplied by before all are added up.

    Of no token, and of 0 items, all are 0.

    Args:
        valid: bool, (..., S): which tokens count.
        options: Of the loss.
        num_items: The sequences (of `BY_SEQUENCES`) or the tokens of all micro-batches of a step;
            None: those of this one.
        real: The dtype of the weights.

    Raises:
        ValueError: ``num_items`` cannot be one, or the loss does not have it.
    """
    items = items_tensor(num_items, "mean", valid)
    if items is not None and options.loss_type == "bnpo":
        raise ValueError('bnpo divides by the tokens of one call: num_items is of "dapo"')
    if items is not None:
        scale = 1 / composite.items_denominator(items, real)[0]
    elif options.loss_type in BY_SEQUENCES:
        scale = 1 / _sequences(valid, real)
    else:
        scale = 1 / valid.sum().clamp_min(1).to(real)
    if options.loss_type in ("grpo", "sapo"):
        scale = scale / valid.sum(-1, keepdim=True).clamp_min(1)
    elif options.loss_type == "dr_grpo":
        scale = scale / options.max_completion_length
    return torch.where(valid, scale, 0.0)


def _entropy_weights(
    acting: Tensor,
    options: PolicyOptions,
    num_items: int | Tensor | None,
    entropy_items: int | Tensor | None,
    real: torch.dtype,
) -> Tensor:
    """(..., S): the mean over the tokens that have a bonus; of no token, all are 0."""
    items = items_tensor(entropy_items, "mean", acting)
    if items is not None:
        return acting / composite.items_denominator(items, real)[0]
    if options.entropy_coef and num_items is not None:
        raise ValueError(
            "with num_items, an entropy bonus needs entropy_items: the number of tokens of all "
            "micro-batches that have a bonus"
        )
    return acting / acting.sum().clamp_min(1).to(real)


def _log_rollout(rollout: Tensor, valid: Tensor) -> Tensor:
    """(..., 1): of a sequence, from its tokens' or its own, bounded as in TRL."""
    logs = rollout.log().clamp(_LOWEST_LOG_W, _LARGEST_LOG_W)
    if rollout.shape == valid.shape:
        logs = where_valid(valid, logs)
    return logs.sum(-1, keepdim=True)


_LOWEST_LOG_W, _LARGEST_LOG_W = math.log(1e-8), 20.0
"""Between them vespo's weight is kept, in TRL and by its authors."""


def with_sequences(
    log_probs: Tensor,
    tokens: Tokens,
    options: PolicyOptions,
    sampling_log_probs: Tensor | None = None,
) -> Tokens:
    """The tokens, with what is a number of a whole sequence where `by_sequences`.

    Args:
        log_probs: (..., S) of all tokens, with their gradient.
        tokens: Of `prepare`.
        options: Of the loss.
        sampling_log_probs: (..., S), with ``off_policy_mask_threshold``; None: the old ones.

    Raises:
        ValueError: The shapes differ.
    """
    valid, real = tokens.valid, tokens.advantages.dtype
    x = where_valid(valid, log_probs.to(real))
    old = x.detach() if tokens.old is None else tokens.old
    difference = Bounds.of(log_probs.dtype).finite(x - old)
    lengths = valid.sum(-1, keepdim=True).clamp_min(1)
    level = options.importance_sampling_level
    if level != "token":
        mean = difference.sum(-1, keepdim=True) / lengths
        if level == "sequence_token":
            mean = mean.detach() + x - x.detach()
        tokens = tokens._replace(log_ratio=mean.expand(valid.shape))
    if options.loss_type == "vespo":
        tokens = tokens._replace(phi=_phi(difference.detach(), tokens, options))
    if options.off_policy_mask_threshold is not None:
        sampling = old if sampling_log_probs is None else sampling_log_probs
        keep = off_policy_mask(
            x, sampling.to(real), tokens.advantages, valid, options.off_policy_mask_threshold
        ).to(real)
        tokens = tokens._replace(factor=keep if tokens.factor is None else tokens.factor * keep)
    return tokens


def _phi(difference: Tensor, tokens: Tokens, options: PolicyOptions) -> Tensor:
    """e^lambda w^k e^(-lambda w), w the sequence's ratio; bounded as TRL bounds it."""
    log_w = difference.clamp(-20.0, 20.0).sum(-1, keepdim=True)
    if tokens.log_rollout is not None:
        log_w = log_w + tokens.log_rollout
    log_w = log_w.clamp(_LOWEST_LOG_W, _LARGEST_LOG_W)
    is_good = tokens.advantages >= 0
    k = _either(is_good, options.vespo_k_pos, options.vespo_k_neg, log_w)
    rate = _either(is_good, options.vespo_lambda_pos, options.vespo_lambda_neg, log_w)
    phi = torch.exp(rate + k * log_w - rate * log_w.exp())
    return phi.nan_to_num(nan=0.0, posinf=0.0)


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of another tensor."""
    return torch.full(condition.shape, no, dtype=like.dtype, device=like.device).masked_fill(
        condition, yes
    )


class Terms(NamedTuple):
    """What a policy loss is made of, token by token."""

    policy: Tensor
    """The surrogate, with beta times the KL."""
    ratio: Tensor
    """The importance ratio."""
    log_ratio: Tensor
    """log pi - log pi_old of the token."""
    kl: Tensor | None
    """The estimate of KL(pi || ref), detached; with its bias correction."""


def surrogate(log_probs: Tensor, tokens: Tokens, options: PolicyOptions) -> Terms:
    """The terms of tokens, not yet divided by anything.

    Args:
        log_probs: Of the policy, in nats, of the shape of the tokens.
        tokens: Of `prepare` and, where `PolicyOptions.by_sequences`, of `with_sequences`.
        options: Of the loss.

    Returns:
        Float32 or float64; finite, with finite gradients, for finite log-probabilities.
    """
    bounds = Bounds.of(log_probs.dtype)
    a = tokens.advantages
    if tokens.factor is not None:  # on them, not on the loss: then it is in the bounds of gradients
        a = bounds.finite(a * tokens.factor)
    x = where_valid(tokens.valid, log_probs.to(a.dtype))
    difference = bounds.finite(x - (x.detach() if tokens.old is None else tokens.old))
    ratio = bounds.exp(difference if tokens.log_ratio is None else tokens.log_ratio)
    if options.loss_type in CLIPPED:
        losses = _clipped(ratio, a, options, bounds)
    elif options.loss_type == "sapo":
        losses = _sapo(ratio, a, options, bounds)
    else:
        factor = tokens.phi if tokens.phi is not None else ratio.clamp_max(options.epsilon_high)
        losses = -bounds.finite(bounds.finite(factor.detach() * a) * x)
    kl = None
    if tokens.reference is not None:
        estimate = _kl(tokens.reference, x, options.kl_estimator, bounds)
        corrects = options.use_bias_correction_kl
        if options.beta:
            penalty = bounds.finite(options.beta * estimate)
            if corrects:  # each factor is bounded: so is what backward multiplies them by
                weight = ratio.clamp_max(bounds.largest / max(options.beta, 1.0))
                penalty = bounds.finite(penalty * weight)
            losses = losses + penalty
        kl = bounds.finite(ratio * estimate if corrects else estimate).detach()
    return Terms(losses, ratio, difference, kl)


def _clipped(ratio: Tensor, a: Tensor, options: PolicyOptions, bounds: Bounds) -> Tensor:
    within = ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high)
    if options.delta < math.inf:
        ratio = ratio.clamp_max(options.delta)
    return -torch.minimum(bounds.finite(ratio * a), bounds.finite(within * a))


def _sapo(ratio: Tensor, a: Tensor, options: PolicyOptions, bounds: Bounds) -> Tensor:
    t = _either(a > 0, options.sapo_temperature_pos, options.sapo_temperature_neg, a)
    return -bounds.finite(torch.sigmoid(t * (ratio - 1)) * 4 / t * a)


def _kl(reference: Tensor, x: Tensor, estimator: str, bounds: Bounds) -> Tensor:
    d = bounds.finite(reference - x)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return bounds.finite(0.5 * d * d)
    d = d.clamp_max(bounds.exponent)
    return bounds.finite(torch.expm1(d) - d)


def token_losses(
    terms: Terms, entropy: Tensor | None, tokens: Tokens, options: PolicyOptions
) -> Tensor:
    """The loss of each token, not divided; 0 where it does not count."""
    losses = terms.policy
    if options.entropy_coef and entropy is not None:
        acts = tokens.entropy_weights != 0
        losses = losses - options.entropy_coef * where_valid(acts, entropy.to(losses.dtype))
    return where_valid(tokens.valid, losses)


class PolicyMetrics(NamedTuple):
    """What trainers log, 0-d and detached. Of parts of a batch: each is the sum of the parts'."""

    policy_loss: Tensor
    """The loss without its entropy bonus."""
    clip_low: Tensor
    """The fraction of tokens (of sequences, with their ratio) clipped below, where A < 0."""
    clip_high: Tensor
    """The fraction clipped above, where A > 0. Sapo and vespo clip nothing."""
    ratio: Tensor
    """The mean importance ratio."""
    approx_kl: Tensor
    """The mean over tokens of log pi_old - log pi: how far the policy has gone since it acted."""
    kl: Tensor | None
    """The mean estimate of KL(pi || ref), as it stands in the loss; None without a reference."""
    entropy: Tensor | None
    """The mean entropy over all tokens; None if it is not given."""


class Contribution(NamedTuple):
    """What some of the tokens add to the loss, 0-d, and to the metrics."""

    loss: Tensor
    metrics: PolicyMetrics


def contribution(
    log_probs: Tensor, entropy: Tensor | None, tokens: Tokens, options: PolicyOptions
) -> Contribution:
    """What these tokens add to the loss of all: the sum of what each adds.

    Args:
        log_probs: Of the policy, in nats, of the shape of the tokens.
        entropy: In nats, of the same shape; needed with ``entropy_coef``, else for the metrics.
        tokens: Of `prepare`, or a chunk of them.
        options: Of the loss.
    """
    return added_up(surrogate(log_probs, tokens, options), entropy, tokens, options)


def added_up(
    terms: Terms, entropy: Tensor | None, tokens: Tokens, options: PolicyOptions
) -> Contribution:
    """`contribution`, of terms that are known."""
    bounds = Bounds.of(terms.policy.dtype)

    def added(weights: Tensor, x: Tensor) -> Tensor:
        return bounds.finite(composite.total(weights * where_valid(weights != 0, x)))

    loss = policy_loss = added(tokens.weights, terms.policy)
    if options.entropy_coef and entropy is not None:
        bonus = added(tokens.entropy_weights, entropy.to(loss.dtype))
        loss = loss - options.entropy_coef * bonus
    low, high = _clip_limits(options)
    ratio, a = terms.ratio.detach(), tokens.advantages
    metrics = PolicyMetrics(
        policy_loss=policy_loss.detach(),
        clip_low=added(tokens.ratio_weights, ((ratio < low) & (a < 0)).to(a.dtype)),
        clip_high=added(tokens.ratio_weights, ((ratio > high) & (a > 0)).to(a.dtype)),
        ratio=added(tokens.ratio_weights, ratio),
        approx_kl=added(tokens.mean_weights, -terms.log_ratio.detach()),
        kl=None if terms.kl is None else added(tokens.mean_weights, terms.kl),
        entropy=(
            None if entropy is None else added(tokens.mean_weights, entropy.detach().to(a.dtype))
        ),
    )
    return Contribution(loss, metrics)


def _clip_limits(options: PolicyOptions) -> tuple[float, float]:
    """Beyond which a ratio is clipped."""
    if options.loss_type in CLIPPED:
        return 1 - options.epsilon, 1 + options.epsilon_high
    return -math.inf, options.epsilon_high if options.loss_type == "cispo" else math.inf
