"""Divergences between two distributions over the vocabulary: the mathematics, in plain torch.

The dense losses (`llmloss_ext.losses.distillation`) and the linear one (`llmloss_ext.linear`) share
it. P is the teacher, Q the student, T the temperature.

A new divergence is an entry of `DIVERGENCES`, and a sentence in the losses' docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .composite import real_of
from .options import OPTIONS, Option, as_integer, with_defaults

COPIES = 8
"""Tensors of the size of its logits that a divergence and its gradient hold at once."""


class Divergence(NamedTuple):
    """A divergence of log-probabilities (..., V), and by hand its gradient.

    Both functions take log_p, log_q and the share: the one number that some divergences have.
    """

    rows: Callable[[Tensor, Tensor, float], Tensor]
    """(...), differentiable. A probability of zero in the distribution that is averaged over counts
    as nothing."""
    with_gradient: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """The rows, and their gradient with respect to logits whose log-softmax is log_q."""


class DivergenceOptions(NamedTuple):
    """Which divergence, checked."""

    name: str
    """A key of `DIVERGENCES`."""
    share: float
    temperature: float
    is_log_probs: bool = False
    """Whether the teacher's numbers are log-probabilities at ``temperature``, and no logits."""

    @classmethod
    def of(
        cls,
        direction: str,
        beta: float,
        skew_alpha: float,
        temperature: float,
        *,
        is_log_probs: bool = False,
    ) -> DivergenceOptions:
        """From the options of the losses.

        At its ends the JSD itself is 0. The field's trainers (TRL, Liger) have the KLs there, to
        which it tends when divided by beta or 1 - beta: "forward" for 0, "reverse" for 1. A skewed
        KL of ``skew_alpha`` 0 is the KL.

        Raises:
            ValueError: An option is out of range.
        """
        if direction not in DIVERGENCES:
            *names, last = (f'"{name}"' for name in DIVERGENCES)
            raise ValueError(f"direction must be {', '.join(names)} or {last}, got {direction!r}")
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must be between 0 and 1, got {beta}")
        if not 0.0 <= skew_alpha < 1.0:  # of 1 the divergence is 0
            raise ValueError(f"skew_alpha must be in [0, 1), got {skew_alpha}")
        share = beta
        if direction == "jsd" and beta in (0.0, 1.0):
            direction = "forward" if beta == 0 else "reverse"
        elif direction.startswith("skew_"):
            share = skew_alpha
            if skew_alpha == 0:
                direction = direction.removeprefix("skew_")
        return cls(direction, float(share), float(temperature), is_log_probs)


def common_classes(student: int, teacher: int, vocab_size: int | None) -> int:
    """The classes over which two distributions are compared: by default all that both have.

    Models of one family are padded to different numbers of classes.

    Raises:
        ValueError: ``vocab_size`` is more than that, or less than 1.
        TypeError: It is not an integer.
    """
    most = min(student, teacher)
    if vocab_size is None:
        return most
    vocab_size = as_integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= most:
        raise ValueError(
            f"vocab_size must be in [1, {most}], the classes that student ({student}) and teacher "
            f"({teacher}) share, got {vocab_size}"
        )
    return vocab_size


def divergence(student: Tensor, teacher: Tensor, options: DivergenceOptions) -> Tensor:
    """Each row's divergence times T^2, from logits (..., V), in float32 or float64."""
    log_q, log_p = _log_probs(student, teacher, options)
    rows = DIVERGENCES[options.name].rows(log_p, log_q, options.share)
    return rows * options.temperature**2


def divergence_with_gradient(
    student: Tensor, teacher: Tensor, options: DivergenceOptions
) -> tuple[Tensor, Tensor]:
    """`divergence` and its gradient with respect to the student's logits."""
    log_q, log_p = _log_probs(student, teacher, options)
    rows, gradient = DIVERGENCES[options.name].with_gradient(log_p, log_q, options.share)
    return rows * options.temperature**2, gradient * options.temperature


def _log_probs(
    student: Tensor, teacher: Tensor, options: DivergenceOptions
) -> tuple[Tensor, Tensor]:
    # Log-probabilities stay what they are, but for what padding or rounding took from their sum.
    temperature = 1.0 if options.is_log_probs else options.temperature
    real = real_of(student)
    log_q = torch.log_softmax(student.to(real) / options.temperature, -1)
    return log_q, torch.log_softmax(teacher.to(real) / temperature, -1)


def coarse_divergence(
    student: Tensor, ids: Tensor, log_p: Tensor, options: DivergenceOptions, add_tail: bool
) -> Tensor:
    """`divergence` from logits (..., V) and the log-probabilities (..., k) of a teacher's tokens.

    ``add_tail``: what these leave is one more outcome; else both are renormalised over the k.
    """
    coarse = _Coarse.of(student, ids, log_p, options, add_tail)
    rows = DIVERGENCES[options.name].rows(coarse.log_p, coarse.log_q, options.share)
    return rows * options.temperature**2


def coarse_divergence_with_gradient(
    student: Tensor, ids: Tensor, log_p: Tensor, options: DivergenceOptions, add_tail: bool
) -> tuple[Tensor, Tensor]:
    """`coarse_divergence` and its gradient with respect to the student's logits."""
    coarse = _Coarse.of(student, ids, log_p, options, add_tail)
    rows, of_outcomes = DIVERGENCES[options.name].with_gradient(
        coarse.log_p, coarse.log_q, options.share
    )
    k = ids.shape[-1]
    if coarse.others is None:
        gradient = torch.zeros(student.shape, dtype=rows.dtype, device=rows.device)
    else:
        # The outcome's logit is the lse of its columns: each has its share of the gradient.
        there = coarse.log_q[..., k:] != -math.inf
        shares = (coarse.others - torch.where(there, coarse.log_q[..., k:], 0.0)).exp()
        gradient = shares * torch.where(there, of_outcomes[..., k:], 0.0)
    gradient = gradient.scatter(-1, ids, of_outcomes[..., :k])
    return rows * options.temperature**2, gradient * options.temperature


class _Coarse(NamedTuple):
    """Two distributions over k tokens, and with a tail over one outcome more."""

    log_p: Tensor
    log_q: Tensor
    others: Tensor | None
    """(..., V): the student's log-probabilities without the k tokens; None: no tail."""

    @classmethod
    def of(
        cls, student: Tensor, ids: Tensor, log_p: Tensor, options: DivergenceOptions, add_tail: bool
    ) -> _Coarse:
        real = real_of(student)
        log_p = log_p.to(real)
        if not add_tail:
            kept = student.gather(-1, ids).to(real) / options.temperature
            return cls(torch.log_softmax(log_p, -1), torch.log_softmax(kept, -1), None)
        log_q = torch.log_softmax(student.to(real) / options.temperature, -1)
        kept = log_q.gather(-1, ids)
        if ids.shape[-1] >= student.shape[-1]:
            return cls(log_p, kept, None)
        # From the other columns themselves: 1 - sum q would cancel.
        least = torch.finfo(real).min / 4  # -inf alone would have no gradient
        others = log_q.scatter(-1, ids, -math.inf).clamp_min(least)
        rest = torch.logsumexp(others, -1, keepdim=True)
        rest = torch.where(rest < least / 2, -math.inf, rest)
        log_p = torch.cat([log_p, _log_rest(log_p, options.name)], -1)
        return cls(log_p, torch.cat([kept, rest], -1), others)


def _log_rest(log_p: Tensor, name: str) -> Tensor:
    """Log(1 - sum p), where that is more than the sum's rounding."""
    eps = torch.finfo(log_p.dtype).eps
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    # "reverse" divides by it: as much as may be lost in rounding, rather than nothing.
    least = math.log(eps) if name == "reverse" else -math.inf
    is_rounding = rest <= eps * log_p.shape[-1]
    return torch.where(is_rounding, least, torch.log(torch.where(is_rounding, 1.0, rest)))


def _log_ratio(log_p: Tensor, p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), and 0 where p = 0: what is not averaged over has no gradient either."""
    return torch.where(p == 0, 0.0, log_p - log_q)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * _log_ratio(log_p, p, log_q)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Log(share p + (1 - share) q); log 0 is the lowest number: -inf has no gradient here."""
    least = torch.finfo(log_p.dtype).min / 4
    one, other = log_p.clamp_min(least), log_q.clamp_min(least)
    return torch.logaddexp(one + math.log(share), other + math.log1p(-share))


def _through_softmax(q: Tensor, weighted: Tensor) -> Tensor:
    """The gradient of the logits, where q times that of q is ``weighted`` (but for a constant)."""
    return weighted - q * weighted.sum(-1, keepdim=True)


def _forward(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return _kl(log_p, log_q)


def _forward_gradient(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return _kl(log_p, log_q), log_q.exp() - log_p.exp()


def _reverse(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return _kl(log_q, log_p)


def _reverse_gradient(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    ratio = _log_ratio(log_q, q, log_p)
    rows = (q * ratio).sum(-1)
    return rows, q * (ratio - rows.unsqueeze(-1))


def _jsd(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    log_m = _log_mixture(log_p, log_q, share)
    return share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)


def _jsd_gradient(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    # That of KL(Q || M), as if M were a constant: the rest adds up to one.
    log_m = _log_mixture(log_p, log_q, share)
    rows, gradient = _reverse_gradient(log_m, log_q, share)
    return share * _kl(log_p, log_m) + (1 - share) * rows, gradient * (1 - share)


def _tvd(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return (log_q.exp() - log_p.exp()).abs().sum(-1) / 2


def _tvd_gradient(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs().sum(-1) / 2, _through_softmax(q, q * difference.sign() / 2)


def _skew_forward(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return _kl(log_p, _log_mixture(log_p, log_q, share))


def _skew_forward_gradient(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, share)
    weighted = (share - 1) * (log_p + log_q - log_m).exp()
    return _kl(log_p, log_m), _through_softmax(log_q.exp(), weighted)


def _skew_reverse(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return _kl(log_q, _log_mixture(log_q, log_p, share))


def _skew_reverse_gradient(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    log_m = _log_mixture(log_q, log_p, share)
    terms = q * _log_ratio(log_q, q, log_m)
    weighted = terms - share * (2 * log_q - log_m).exp()
    return terms.sum(-1), _through_softmax(q, weighted)


DIVERGENCES = {
    "forward": Divergence(_forward, _forward_gradient),
    "reverse": Divergence(_reverse, _reverse_gradient),
    "jsd": Divergence(_jsd, _jsd_gradient),
    "tvd": Divergence(_tvd, _tvd_gradient),
    "skew_forward": Divergence(_skew_forward, _skew_forward_gradient),
    "skew_reverse": Divergence(_skew_reverse, _skew_reverse_gradient),
}
"""What the losses' ``direction`` may be."""

DIVERGENCE_OPTIONS = OPTIONS | {
    "direction": Option(
        "str",
        "forward",
        'With P the teacher and Q the student: ``"forward"``, KL(P || Q) = sum P (log P - log Q); '
        '``"reverse"``, KL(Q || P); ``"jsd"``, beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P '
        '+ (1 - beta) Q (Agarwal et al. 2024); ``"tvd"``, the total variation sum |P - Q| / 2 (Wen '
        'et al. 2023; Liger); ``"skew_forward"``, KL(P || a P + (1 - a) Q), and '
        '``"skew_reverse"``, KL(Q || a Q + (1 - a) P), a = skew_alpha (DistiLLM, Ko et al. 2024).',
    ),
    "beta": Option(
        "float",
        0.5,
        "The teacher's share of M, in [0, 1]. At 0 and 1 the two KLs are taken, as trainers have "
        'it: "forward" and "reverse".',
    ),
    "skew_alpha": Option(
        "float",
        0.1,
        "The share of the distribution that a skewed KL averages over in the one that it is "
        "compared with, in [0, 1); at 0 it is the KL.",
    ),
    "temperature": Option(
        "float",
        1.0,
        "T > 0, by which logits are divided. The divergence is multiplied by T^2, which keeps its "
        "gradient's size (Hinton et al. 2015; TRL and Liger leave that out).",
    ),
    "add_tail": Option(
        "bool",
        True,
        "Whether what the k tokens leave counts as one more outcome (TRL's ``loss_add_tail``); "
        "else both distributions are renormalised over the k.",
    ),
    "weight_hard_loss": Option(
        "float",
        0.5,
        "Factor of the cross entropy with the labels, whose temperature is 1, >= 0. A term of "
        "weight 0 is not computed, and is 0.",
    ),
    "weight_soft_loss": Option("float", 0.5, "Factor of the divergence, >= 0."),
    "ignore_index": Option(
        "int",
        -100,
        "Tokens with this label take no part, whatever the other arguments hold there; their "
        "gradient is exactly zero.",
    ),
    "reduction": Option(
        "str", "mean", '``"mean"`` over the tokens that take part, ``"sum"`` or ``"none"``.'
    ),
    "num_items": Option(
        "int | Tensor | None",
        None,
        "Replaces the number of tokens of the mean, e.g. by that of all micro-batches; of 0 items "
        "the loss is 0.",
    ),
    "vocab_size": Option(
        "int | None",
        None,
        "The distributions are over the first ``vocab_size`` classes, by default over all that "
        "both have: the heads of one family may be padded differently.",
    ),
}
"""The options of distillation, beside those that all losses have."""


class Distillation(NamedTuple):
    """The options of a hard and a soft loss, as users give them."""

    weight_hard_loss: float
    weight_soft_loss: float
    add_tail: bool
    direction: str
    beta: float
    skew_alpha: float
    temperature: float
    ignore_index: int
    reduction: str
    num_items: int | Tensor | None
    vocab_size: int | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Distillation:
        """Those that are given, and defaults.

        Raises:
            ValueError: A weight is negative, or both are 0.
            TypeError: There are other options.
        """
        found = cls(**with_defaults(options, cls._fields, DIVERGENCE_OPTIONS))
        check_weights(
            weight_hard_loss=found.weight_hard_loss, weight_soft_loss=found.weight_soft_loss
        )
        return found

    def divergence(self) -> DivergenceOptions:
        """Which divergence, checked."""
        return DivergenceOptions.of(self.direction, self.beta, self.skew_alpha, self.temperature)


class DistillationLoss(NamedTuple):
    """The weighted sum of a hard and a soft loss, and the two."""

    loss: Tensor
    hard_loss: Tensor
    """The cross entropy with the labels, without its weight, detached."""
    soft_loss: Tensor
    """The divergence from the teacher, without its weight, detached."""

    def backward(self) -> None:
        """As ``loss.backward()``."""
        self.loss.backward()  # type: ignore[no-untyped-call]


def check_weights(**weights: float) -> None:
    """Raises a ValueError if a weight is negative, or all are 0."""
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"one of {' and '.join(weights)} must be > 0")
