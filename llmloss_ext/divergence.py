"""Divergences between two distributions over the vocabulary: the mathematics, in plain torch.

The dense losses (`llmloss_ext.losses.distillation`) and the linear one (`llmloss_ext.linear`) share
it. P is the teacher, Q the student, T the temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .composite import real_of
from .options import as_integer

COPIES = 8
"""Tensors of the size of its logits that a divergence and its gradient hold at once."""


def checked_direction(direction: str, beta: float, temperature: float) -> str:
    """The direction; that of a KL divergence where ``beta`` makes one of "jsd".

    At its ends the divergence itself is 0. The field's trainers (TRL, Liger) have the KLs there, to
    which it tends when divided by beta or 1 - beta: "forward" for 0, "reverse" for 1.

    Raises:
        ValueError: An option is out of range.
    """
    if direction not in ("forward", "reverse", "jsd"):
        raise ValueError(f'direction must be "forward", "reverse" or "jsd", got {direction!r}')
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    if direction == "jsd" and beta in (0.0, 1.0):
        return "forward" if beta == 0 else "reverse"
    return direction


def check_teacher(*tensors: Tensor | None) -> None:
    """Raises a RuntimeError if the teacher expects a gradient, which it does not get."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("the teacher gets no gradient; pass it detached")


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


def divergence(
    student: Tensor, teacher: Tensor, direction: str, beta: float, temperature: float
) -> Tensor:
    """Each row's divergence times T^2, from logits (..., V), in float32 or float64."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return divergence_of(log_p, log_q, direction, beta) * temperature**2


def divergence_of(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> Tensor:
    """Each row's divergence, P the teacher and Q the student, from log-probabilities (..., V).

    A probability of zero in the distribution that is averaged over counts as nothing.
    """
    if direction == "forward":
        return _kl(log_p, log_q)
    if direction == "reverse":
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    real = real_of(student)
    log_q, log_p = (torch.log_softmax(t.to(real) / temperature, -1) for t in (student, teacher))
    return log_q, log_p


def _log_ratio(log_p: Tensor, p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), and 0 where p = 0: what is not averaged over has no gradient either."""
    return torch.where(p == 0, 0.0, log_p - log_q)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * _log_ratio(log_p, p, log_q)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Log(beta p + (1 - beta) q); log 0 is the lowest number, since -inf has no gradient here."""
    least = torch.finfo(log_p.dtype).min / 4
    one, other = log_p.clamp_min(least), log_q.clamp_min(least)
    return torch.logaddexp(one + math.log(beta), other + math.log1p(-beta))


def divergence_with_gradient(
    student: Tensor, teacher: Tensor, direction: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """`divergence` and its gradient with respect to the student's logits.

    With d = log q - log p ("reverse") or log q - log m ("jsd"): T (q - p) for "forward", else
    T q (d - sum q d), for "jsd" times 1 - beta.
    """
    log_q, log_p = _log_probs(student, teacher, temperature)
    q = log_q.exp()
    if direction == "forward":
        rows, gradient = _kl(log_p, log_q), q - log_p.exp()
    else:
        other = log_p if direction == "reverse" else _log_mixture(log_p, log_q, beta)
        ratio = _log_ratio(log_q, q, other)
        rows = (q * ratio).sum(-1)
        gradient = q * (ratio - rows.unsqueeze(-1))
        if direction == "jsd":
            rows = beta * _kl(log_p, other) + (1 - beta) * rows
            gradient *= 1 - beta
    return rows * temperature**2, gradient * temperature
