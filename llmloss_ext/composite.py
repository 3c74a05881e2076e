"""The mathematics of the losses in plain torch, differentiable as often as asked.

The kernels give values and first-order gradients. Whatever asks for more (second-order gradients,
forward-mode derivatives, gradients under ``vmap``) is derived by torch from the few lines here.
They keep several copies of the logits: slower, never wrong. The losses of rows whose statistics
are known (`losses_of`) are used in production too: from hidden states and over several ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import MEAN, NONE, LogitOptions, LossOptions
from .statistics import FloatStats

_LOWEST = 4
"""A logit of -inf stands as the lowest finite number over this: the difference of two is finite."""


class ColumnWeights(NamedTuple):
    """Of probability targets: ``class_weight * (share_of_target * target + uniform_share)``."""

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
    weights: ColumnWeights | None = None,
) -> FloatStats:
    """Statistics of the rows of ``input`` (..., columns), for their derivatives.

    A logit of -inf stands as the lowest finite number here: its probability is 0 all the same, and
    no derivative meets inf - inf.
    """
    real = real_of(input)
    x = input[..., : options.vocab_size].to(real)
    x = x * (logit_scale.to(real) if logit_scale is not None else options.scale)
    if options.softcap > 0:
        x = options.softcap * torch.tanh(x / options.softcap)
    x = x.clamp_min(torch.finfo(real).min / _LOWEST)
    lse = torch.logsumexp(x, dim=-1)
    log_p = x - lse.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    sum_sq = torch.logsumexp(2 * log_p, dim=-1)
    class_weight = None if weight is None else weight[: options.vocab_size].to(real)
    if is_indices(target):
        valid = target != options.ignore_index
        is_class = valid & (target >= 0) & (target < options.vocab_size)
        index = torch.where(is_class, target, 0).long().unsqueeze(-1)
        log_prob = log_p.gather(-1, index).squeeze(-1)
        terms = log_p if class_weight is None else log_p * class_weight
        mean = terms.sum(-1) / options.vocab_size
        stats = FloatStats(log_prob, lse, entropy, mean, sum_sq)
        zero = torch.zeros((), dtype=real, device=input.device)
        return FloatStats(*(torch.where(valid, x, zero) for x in stats))
    assert weights is not None
    a = weights.share_of_target * target[..., : options.vocab_size].to(real) + weights.uniform_share
    mean = ((a if class_weight is None else a * class_weight) * log_p).sum(-1)
    return FloatStats(torch.zeros_like(lse), lse, entropy, mean, sum_sq)


def target_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, real: torch.dtype
) -> Tensor:
    """The class weight of each row's target: 1 without class weights, 0 where ignored.

    A target out of range reads the first weight: the kernels report it, with its position.
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
    if token_weight is None:
        return rows
    return rows * weight_tokens(token_weight, target, ignore, real)


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
    shares = ColumnWeights(1.0 - eps, eps / options.vocab_size)
    stats = token_stats(input, target, weight, logit_scale, options, shares)
    w_y = None
    if is_indices(target):
        w_y = target_weights(target, weight, options.ignore_index, real_of(input))
        if token_weight is not None:
            token_weight = weight_tokens(token_weight, target, options.ignore_index, w_y.dtype)
    return losses_of(stats, w_y, token_weight, loss)


def losses_of(
    stats: FloatStats, w_y: Tensor | None, token_weight: Tensor | None, loss: LossOptions
) -> Tensor:
    """The losses of rows: row_loss of csrc/core/loss.h.

    Args:
        stats: Those that `LossOptions.statistics` names.
        w_y: The class weight of each target, 0 where ignored; None: probability targets.
        token_weight: Of each row, 0 where ignored.
        loss: The options; the reduction is not read.
    """
    if w_y is None:
        rows = -stats.mean_log_prob
    else:
        eps = loss.label_smoothing
        # A share of 0 leaves its term out, so that log 0 does not become 0 * inf.
        rows = -(1.0 - eps) * w_y * stats.log_prob if eps != 1 else torch.zeros_like(stats.lse)
        if eps != 0:
            rows = rows - eps * stats.mean_log_prob
        if loss.focal_gamma != 0:
            rows = rows * _difficulty(stats.log_prob, loss.focal_gamma)
    if loss.z_loss != 0:
        rows = rows + loss.z_loss * stats.lse.square()
    return rows if token_weight is None else rows * token_weight.to(rows.dtype)


def _difficulty(log_prob: Tensor, gamma: float) -> Tensor:
    """(1 - p_y)^gamma (Lin et al. 2017); no derivative is infinite where p_y is 0 or 1."""
    p_else = -torch.expm1(log_prob)
    inside = (p_else > 0) & (p_else < 1)
    return torch.where(inside, torch.where(inside, p_else, 0.5).pow(gamma), p_else.detach().sign())


def losses_and_gradients(
    stats: FloatStats, w_y: Tensor, token_weight: Tensor, upstream: Tensor, loss: LossOptions
) -> tuple[Tensor, FloatStats]:
    """`losses_of`, and the gradients of their sum times ``upstream``; None: no such gradient."""
    names = loss.statistics()
    with torch.enable_grad():
        leaves = {name: getattr(stats, name).detach().requires_grad_() for name in names}
        rows = losses_of(FloatStats(**leaves), w_y, token_weight, loss)
        gradients = torch.autograd.grad(
            rows, list(leaves.values()), upstream.expand_as(rows), allow_unused=True
        )
    return rows.detach(), FloatStats(**dict(zip(names, gradients, strict=True)))


def loss_of(
    stats: FloatStats,
    w_y: Tensor,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    loss: LossOptions,
) -> Tensor:
    """`losses_of`, reduced: (N) or 0-d."""
    rows = losses_of(stats, w_y, token_weight, loss)
    if loss.reduction == MEAN and num_items is None:
        num_items = (w_y if token_weight is None else w_y * token_weight).sum()
    return reduce(rows, num_items, loss.reduction)


def reduce(rows: Tensor, denominator: Tensor | None, reduction: int) -> Tensor:
    """Applies the reduction; ``denominator`` is read for the mean only."""
    if reduction == NONE:
        return rows
    whole = total(rows)
    if reduction != MEAN:
        return whole
    assert denominator is not None
    return whole / denominator


def total(rows: Tensor) -> Tensor:
    """The sum of one number per token, 0-d, which zeros among them do not change.

    Added up in float64 and rounded once: on a CPU one after the other, so that ignored tokens
    change no bit; elsewhere in torch's order, where they change none but of the float64 sum.
    """
    flat = rows.flatten().double()
    if rows.device.type != "cpu":
        return flat.sum().to(rows.dtype)
    return torch.nn.functional.pad(flat, (1, 0)).cumsum(0)[-1].to(rows.dtype)
