"""The statistics as differentiable torch arithmetic.

The kernels give values and first-order gradients. Whatever asks for more, that is second-order
gradients, forward-mode derivatives and gradients under ``vmap``, is derived by torch from the few
lines here. They keep several copies of the logits: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LogitOptions(NamedTuple):
    """How an operator reads the logits. ``softcap`` 0 means none."""

    scale: float
    softcap: float
    ignore_index: int
    vocab_size: int


class Stats(NamedTuple):
    """The differentiable statistics, one number per row."""

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor
    mean_log_prob: Tensor


class Weights(NamedTuple):
    """The column weights a: ``class_weight * (share_of_target * target + uniform_share)``."""

    share_of_target: float
    uniform_share: float


def real_of(tensor: Tensor) -> torch.dtype:
    """The dtype of losses and statistics: float32, but float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def is_indices(target: Tensor) -> bool:
    """Whether a target holds class indices (as opposed to probabilities)."""
    return not target.is_floating_point()


def token_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    options: LogitOptions,
    weights: Weights | None = None,
) -> Stats:
    """Statistics of the rows of ``input`` (..., columns), for their derivatives.

    A logit of -inf stands as the lowest finite number here: its probability is 0 all the same, and
    no derivative meets inf - inf.
    """
    real = real_of(input)
    x = input[..., : options.vocab_size].to(real)
    x = x * (logit_scale.to(real) if logit_scale is not None else options.scale)
    if options.softcap > 0:
        x = options.softcap * torch.tanh(x / options.softcap)
    x = x.clamp_min(torch.finfo(real).min / 4)
    lse = torch.logsumexp(x, dim=-1)
    log_p = x - lse.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    class_weight = None if weight is None else weight[: options.vocab_size].to(real)
    if is_indices(target):
        valid = target != options.ignore_index
        is_class = valid & (target >= 0) & (target < options.vocab_size)
        index = torch.where(is_class, target, 0).long().unsqueeze(-1)
        log_prob = log_p.gather(-1, index).squeeze(-1)
        terms = log_p if class_weight is None else log_p * class_weight
        mean = terms.sum(-1) / options.vocab_size
        zero = torch.zeros((), dtype=real, device=input.device)
        return Stats(*(torch.where(valid, s, zero) for s in (log_prob, lse, entropy, mean)))
    assert weights is not None
    a = weights.share_of_target * target[..., : options.vocab_size].to(real) + weights.uniform_share
    mean = ((a if class_weight is None else a * class_weight) * log_p).sum(-1)
    return Stats(torch.zeros_like(lse), lse, entropy, mean)


class LossOptions(NamedTuple):
    """What a cross entropy adds to `LogitOptions`. ``reduction``: 0 none, 1 mean, 2 sum."""

    label_smoothing: float
    z_loss: float
    reduction: int


def target_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, real: torch.dtype
) -> Tensor:
    """The class weight of each row's target: 1 without class weights, 0 where ignored.

    A target out of range reads the first weight: it is the kernels' to report, with its position.
    """
    valid = target != ignore_index
    if weight is None:
        return valid.to(real)
    is_class = valid & (target >= 0) & (target < weight.shape[0])
    return torch.where(valid, weight[torch.where(is_class, target, 0).long()].to(real), 0.0)


def weight_tokens(
    token_weight: Tensor, target: Tensor, ignore_index: int, real: torch.dtype
) -> Tensor:
    """The weights of the tokens: 0 at ignored ones, whatever was given for them."""
    return torch.where(target != ignore_index, token_weight.to(real), 0.0)


def denominators(
    input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, ignore: int
) -> Tensor:
    """What each row adds to the mean's denominator: token weight times class weight."""
    real = real_of(input)
    if not is_indices(target):
        rows = torch.ones(input.shape[:-1], dtype=real, device=input.device)
        return rows if token_weight is None else rows * token_weight.to(real)
    rows = target_weights(target, weight, ignore, real)
    return (
        rows if token_weight is None else rows * weight_tokens(token_weight, target, ignore, real)
    )


def row_losses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    logit_scale: Tensor | None,
    options: LogitOptions,
    loss: LossOptions,
) -> Tensor:
    """The loss of every row, 0 where ignored."""
    eps = loss.label_smoothing
    shares = Weights(1.0 - eps, eps / options.vocab_size)
    stats = token_stats(input, target, weight, logit_scale, options, shares)
    return losses_of(stats, target, weight, token_weight, options.ignore_index, loss)


def losses_of(
    stats: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    loss: LossOptions,
) -> Tensor:
    """The losses of rows whose `Stats` are known; those that no term reads may be empty."""
    w_y = None
    if is_indices(target):
        w_y = target_weights(target, weight, ignore_index, stats[1].dtype)
        if token_weight is not None:
            token_weight = weight_tokens(token_weight, target, ignore_index, w_y.dtype)
    return weighted_losses(stats, w_y, token_weight, loss)


def weighted_losses(
    stats: Sequence[Tensor], w_y: Tensor | None, token_weight: Tensor | None, loss: LossOptions
) -> Tensor:
    """The same, with the class weights of the targets; None: probability targets."""
    log_prob, lse, _, mean_log_prob = stats[:4]
    if w_y is None:
        rows = -mean_log_prob
    else:
        eps = loss.label_smoothing
        # A share of 0 leaves its term out, so that log 0 does not become 0 * inf.
        rows = -(1.0 - eps) * w_y * log_prob if eps != 1 else torch.zeros_like(lse)
        if eps != 0:
            rows = rows - eps * mean_log_prob
    if loss.z_loss != 0:
        rows = rows + loss.z_loss * lse.square()
    return rows if token_weight is None else rows * token_weight.to(rows.dtype)


def loss_gradients(
    stats: Sequence[Tensor], w_y: Tensor, upstream: Tensor, loss: LossOptions
) -> tuple[Tensor | None, ...]:
    """Of `weighted_losses` for class indices, with respect to its first four `Stats`; None: 0.

    ``upstream`` is that of each row's loss, times its token's weight.
    """
    eps, z_loss = loss.label_smoothing, loss.z_loss
    return (
        (eps - 1.0) * w_y * upstream,
        2.0 * z_loss * stats[1] * upstream if z_loss != 0 else None,
        None,
        -eps * upstream if eps != 0 else None,
    )


def reduce(rows: Tensor, denominator: Tensor, reduction: int) -> Tensor:
    """Applies the reduction; ``denominator`` is read for the mean only."""
    if reduction == 0:
        return rows
    total = rows.sum()
    return total / denominator if reduction == 1 else total


def total(rows: Tensor) -> Tensor:
    """The sum of one number per token, 0-d, which zeros among them do not change.

    Added up in float64 and rounded once: on a CPU one after the other, so that ignored tokens
    change no bit; elsewhere in torch's order, where they change none but of the float64 sum.
    """
    flat = rows.flatten().double()
    if rows.device.type != "cpu":
        return flat.sum().to(rows.dtype)
    return torch.nn.functional.pad(flat, (1, 0)).cumsum(0)[-1].to(rows.dtype)
