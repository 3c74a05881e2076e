"""A discriminator and a generator against each other, over the scores that one gives the other.

A score is a real number, larger for what looks real: a logit, not a probability. Text is discrete;
its generator gets a gradient through `llmloss_ext.losses.linear_gumbel_embeddings`, or by
`policy_gradient_loss` of the log-probabilities of what it sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..composite import real_of
from .bounded import check_same_shape, finite, valid_tokens, where_valid

__all__ = [
    "DiscriminatorLoss",
    "GeneratorLoss",
    "PolicyGradientLoss",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "policy_gradient_loss",
    "r1_penalty",
]

Items = int | Tensor | None
KINDS = ("logistic", "hinge", "least_squares", "wasserstein")


class DiscriminatorLoss(NamedTuple):
    """A discriminator's loss, and its metrics, detached and 0-d."""

    loss: Tensor
    """0-d, with its gradient."""
    real_score: Tensor
    """The mean score of what is real."""
    fake_score: Tensor
    """The mean score of what was generated."""
    accuracy: Tensor
    """The mean of the shares of real and of generated that lie on their side of the boundary."""


class GeneratorLoss(NamedTuple):
    """A generator's loss, and the mean score that it reached, detached."""

    loss: Tensor
    """0-d, with its gradient."""
    fake_score: Tensor


class PolicyGradientLoss(NamedTuple):
    """A policy gradient's surrogate, and its metrics, detached and 0-d."""

    loss: Tensor
    """0-d, with its gradient. Its value says nothing: only its gradient does."""
    reward: Tensor
    """The mean over the tokens that count."""
    baseline: Tensor
    """The mean over the tokens that count."""


def discriminator_loss(
    real_scores: Tensor,
    fake_scores: Tensor,
    *,
    kind: str = "logistic",
    real_mask: Tensor | None = None,
    fake_mask: Tensor | None = None,
    num_items: Items | tuple[Items, Items] = None,
) -> DiscriminatorLoss:
    """What a discriminator minimises: the mean over what is real plus that over what is not.

    With r and f the scores:

    - ``"logistic"``: softplus(-r) + softplus(f), which is -log D(r) - log(1 - D(f)) of
      D = sigmoid(score) (Goodfellow et al. 2014);
    - ``"hinge"``: max(0, 1 - r) + max(0, 1 + f) (Lim and Ye 2017; Miyato et al. 2018);
    - ``"least_squares"``: (r - 1)^2 / 2 + f^2 / 2 (Mao et al. 2017);
    - ``"wasserstein"``: f - r (Arjovsky et al. 2017), with `gradient_penalty`.

    Args:
        real_scores: Of any shape: one a sequence, or one a token.
        fake_scores: Of any shape. For this player, what was generated is usually detached.
        kind: See above.
        real_mask: Of ``real_scores``'s shape: which count; others may hold anything.
        fake_mask: Of ``fake_scores``'s shape.
        num_items: Replaces the numbers of scores of both means, by those of all micro-batches; a
            pair if real and generated are not as many. Of 0 items, a mean is 0.

    Returns:
        A `DiscriminatorLoss`, float32 for 16-bit scores. The boundary of ``accuracy`` is a score of
        0, for "least_squares" 1/2, and for "wasserstein", whose scores have no origin, the middle
        between the two means. Without ``num_items``, a mean of nothing is nan.

    Raises:
        ValueError: A shape does not fit, or there is no such kind.
    """
    _check_kind(kind)
    for_real, for_fake = (
        num_items if isinstance(num_items, (tuple, list)) else (num_items, num_items)
    )
    real, is_real = _scores(real_scores, real_mask)
    fake, is_fake = _scores(fake_scores, fake_mask)
    on_real, on_fake = _of_discriminator(kind, real, fake)
    loss = _mean(on_real, is_real, for_real) + _mean(on_fake, is_fake, for_fake)
    r, f = real.detach(), fake.detach()
    real_score, fake_score = _mean(r, is_real), _mean(f, is_fake)
    boundary: Tensor | float = {"least_squares": 0.5}.get(kind, 0.0)
    if kind == "wasserstein":
        boundary = (real_score + fake_score) / 2
    above, below = (r > boundary).to(r.dtype), (f < boundary).to(f.dtype)
    accuracy = (_mean(above, is_real) + _mean(below, is_fake)) / 2
    return DiscriminatorLoss(finite(loss), real_score, fake_score, accuracy)


def generator_loss(
    fake_scores: Tensor,
    *,
    kind: str = "logistic",
    mask: Tensor | None = None,
    num_items: Items = None,
) -> GeneratorLoss:
    """What a generator minimises: the mean over what it made, with f the scores.

    ``"logistic"``: softplus(-f) = -log D(f), the form that does not saturate (Goodfellow et al.
    2014); ``"hinge"`` and ``"wasserstein"``: -f; ``"least_squares"``: (f - 1)^2 / 2.

    Args:
        fake_scores: Of any shape: one a sequence, or one a token.
        kind: That of the discriminator.
        mask: Of the same shape: which count; others may hold anything.
        num_items: Replaces the number of scores, by that of all micro-batches.

    Returns:
        A `GeneratorLoss`, float32 for 16-bit scores. Without ``num_items``, a mean of nothing is
        nan.

    Raises:
        ValueError: A shape does not fit, or there is no such kind.
    """
    _check_kind(kind)
    fake, counts = _scores(fake_scores, mask)
    if kind == "logistic":
        each = -F.logsigmoid(fake)
    elif kind == "least_squares":
        each = _half_square(fake - 1)
    else:
        each = -fake
    return GeneratorLoss(finite(_mean(each, counts, num_items)), _mean(fake.detach(), counts))


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _of_discriminator(kind: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "logistic":
        return -F.logsigmoid(real), -F.logsigmoid(-fake)
    if kind == "hinge":
        return torch.relu(1 - real), torch.relu(1 + fake)
    if kind == "least_squares":
        return _half_square(real - 1), _half_square(fake)
    return -real, fake


def _half_square(x: Tensor) -> Tensor:
    """Flat where the square would be no number of its type."""
    most = math.sqrt(torch.finfo(x.dtype).max) / 2
    return x.clamp(-most, most).square() / 2


def _scores(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In float32 or float64, with 0 where they do not count; and which count, None: all."""
    if mask is None:
        return scores.to(real_of(scores)), None
    counts = valid_tokens(mask, scores)
    return where_valid(counts, scores.to(real_of(scores))), counts


def _mean(each: Tensor, counts: Tensor | None, num_items: Items = None) -> Tensor:
    """Over those that count, or over ``num_items``."""
    items = items_tensor(num_items, "mean", each)
    if counts is None:
        return composite.mean(each, each.numel(), items)
    return composite.mean(where_valid(counts, each), counts.sum(), items)


# ---------------------------------------------------------------------------------- penalties


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_items: Items = None,
) -> Tensor:
    """The mean of (|d D(x) / d x| - 1)^2 at x between real and fake (Gulrajani et al. 2017).

    Both sides of 1 are penalised. x = u real + (1 - u) fake, u uniform in [0, 1], one for each
    sample. Its weight is usually 10. Text is compared as embeddings, or as rows of probabilities.

    Args:
        discriminator: Of (B, ...): scores, whose sum over a sample is its score. A sample's score
            must depend on no other sample: no batch normalisation.
        real: (B, ...), floating point.
        fake: As ``real``. Neither gets a gradient: the penalty is the discriminator's.
        mask: Of the shape of the first dimensions of ``real``, (B) or (B, S): which positions
            count. Others are 0 in x and may hold anything; what D's gradient is there does not
            matter. A sample without any takes no part.
        generator: Of u, for repeatability, on the device of ``real``.
        num_items: Replaces the number of samples that take part, by that of all micro-batches.

    Returns:
        0-d, float32 for 16-bit samples, with a gradient for the discriminator's parameters. Without
        ``num_items``, the mean of no sample is nan.

    Raises:
        ValueError: The shapes do not fit.
        RuntimeError: Under torch.compile, which has no gradient of a gradient.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    counts = _positions(real, mask)
    one, other = (_without_garbage(t.detach(), counts) for t in (real, fake))
    size = (len(real), *(1,) * (real.dim() - 1))
    u = torch.rand(size, generator=generator, dtype=real_of(real), device=real.device)
    x = (u * one + (1 - u) * other).to(real.dtype)
    norms = torch.linalg.vector_norm(_slopes(discriminator, x, counts), dim=-1)
    return _mean_of_samples((norms - 1).square(), counts, num_items)


def r1_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    *,
    mask: Tensor | None = None,
    num_items: Items = None,
) -> Tensor:
    """The mean of |d D(x) / d x|^2 / 2 at what is real (Mescheder et al. 2018).

    Its weight is their gamma, usually between 0.1 and 10.

    Args:
        discriminator: As in `gradient_penalty`.
        real: (B, ...), floating point; it gets no gradient.
        mask: As in `gradient_penalty`.
        num_items: As in `gradient_penalty`.

    Returns:
        0-d, float32 for 16-bit samples, with a gradient for the discriminator's parameters.

    Raises:
        ValueError: The shapes do not fit.
        RuntimeError: Under torch.compile, which has no gradient of a gradient.
    """
    counts = _positions(real, mask)
    slopes = _slopes(discriminator, _without_garbage(real.detach(), counts), counts)
    return _mean_of_samples(slopes.square().sum(-1) / 2, counts, num_items)


def _positions(samples: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bool; None: all positions count."""
    if not samples.is_floating_point() or not samples.dim():
        raise ValueError(
            "a penalty needs samples (B, ...) of floating point, such as embeddings; got "
            f"{tuple(samples.shape)} of {samples.dtype}"
        )
    if mask is None:
        return None
    if not mask.dim() or mask.shape != samples.shape[: mask.dim()]:
        raise ValueError(
            f"mask must have the shape of the first dimensions of {tuple(samples.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    return mask.bool()


def _without_garbage(samples: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return samples
    shape = (*counts.shape, *(1,) * (samples.dim() - counts.dim()))
    return torch.where(counts.reshape(shape), samples, 0.0)


def _slopes(
    discriminator: Callable[[Tensor], Tensor], samples: Tensor, counts: Tensor | None
) -> Tensor:
    """(B, k): the gradient of each sample's score, 0 where it does not count."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "a gradient penalty differentiates a gradient, which torch.compile cannot: call it "
            "outside of the compiled function"
        )
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = samples.detach().requires_grad_()
        scores = discriminator(x)
        if not scores.dim() or len(scores) != len(x):
            raise ValueError(
                f"the discriminator must give scores of {len(x)} samples, got shape "
                f"{tuple(scores.shape)}"
            )
        score = scores.to(real_of(scores)).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=with_graph)
    return _without_garbage(gradient.to(real_of(gradient)), counts).flatten(1)


def _mean_of_samples(each: Tensor, counts: Tensor | None, num_items: Items) -> Tensor:
    takes_part = None if counts is None else counts.reshape(len(each), -1).any(-1)
    return finite(_mean(each, takes_part, num_items))


# ---------------------------------------------------------------------------------- the policy


def policy_gradient_loss(
    log_probs: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    baseline: str | Tensor | None = "mean",
    num_items: Items = None,
) -> PolicyGradientLoss:
    """REINFORCE for sampled text, the score of a discriminator as its reward (Yu et al. 2017).

    The mean over tokens of -(reward - baseline) log pi(token), whose gradient is that of the
    expected reward. SeqGAN's reward is D(x) in [0, 1], that is ``discriminator(x).sigmoid()``, of
    the whole text or, by rollouts, of each token.

    Args:
        log_probs: (B, S) of the sampled tokens, in nats: of `llmloss_ext.linear_log_probs` or
            `llmloss_ext.token_stats`.
        rewards: (B), one for each text, or (B, S), one for each token; without a gradient.
        mask: (B, S): which tokens count; others may hold anything.
        baseline: What is subtracted from rewards, and lowers the variance: ``"mean"``, over the
            batch (for rewards of tokens, over the batch at each position);
            ``"leave_one_out"``, that of the other texts, which leaves the gradient unbiased (Kool
            et al. 2019), and is the reward itself where there is no other; a tensor, 0-d or of the
            shape of the rewards, such as a critic's or a moving mean; None: 0.
        num_items: Replaces the number of tokens, by that of all micro-batches; the number of texts
            gives the sum over each text's tokens, as the paper has it. A baseline of the batch
            is that of the micro-batch: where these must equal the batch, give a tensor.

    Returns:
        A `PolicyGradientLoss`, float32 for 16-bit log-probabilities. Without ``num_items``, the
        mean of no token is nan.

    Raises:
        ValueError: The shapes do not fit, or there is no such baseline.
    """
    valid = valid_tokens(mask, log_probs)
    if log_probs.dim() != 2 or rewards.shape not in (log_probs.shape, log_probs.shape[:1]):
        raise ValueError(
            "expected log-probabilities (B, S), and rewards (B) or (B, S); got "
            f"{tuple(log_probs.shape)} and {tuple(rewards.shape)}"
        )
    real = real_of(log_probs)
    counts = valid if rewards.dim() == 2 else valid.any(-1)
    given = where_valid(counts, rewards.detach().to(real))
    subtracted = where_valid(counts, _baseline(given, counts, baseline))
    advantages = given - subtracted

    def of_tokens(x: Tensor) -> Tensor:
        return where_valid(valid, x if x.dim() == 2 else x.unsqueeze(-1))

    losses = finite(-of_tokens(advantages) * where_valid(valid, log_probs.to(real)))
    return PolicyGradientLoss(
        finite(_mean(losses, valid, num_items)),
        _mean(of_tokens(given), valid),
        _mean(of_tokens(subtracted), valid),
    )


def _baseline(rewards: Tensor, counts: Tensor, baseline: str | Tensor | None) -> Tensor:
    """Of rewards that are 0 where they do not count; the first dimension is the batch's."""
    if baseline is None:
        return torch.zeros_like(rewards)
    if isinstance(baseline, Tensor):
        if baseline.dim():
            check_same_shape(rewards, baseline=baseline)
        return baseline.detach().to(rewards.dtype).expand_as(rewards)
    number = counts.sum(0)
    if baseline == "mean":
        return (rewards.sum(0) / number.clamp_min(1)).expand_as(rewards)
    if baseline == "leave_one_out":
        others = (rewards.sum(0) - rewards) / (number - 1).clamp_min(1)
        return torch.where(number > 1, others, rewards)
    raise ValueError(
        f'baseline must be "mean", "leave_one_out", a tensor or None, got {baseline!r}'
    )
