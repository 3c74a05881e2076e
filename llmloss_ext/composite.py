"""The mathematics of the losses in plain torch, differentiable as often as asked.

The kernels give values and first-order gradients. Whatever asks for more (second-order gradients,
forward-mode derivatives, gradients under ``vmap``) is derived by torch from the few lines here.
They keep several copies of the logits: slower, never wrong. The losses of rows whose statistics
are known (`losses_of`) are used in production too: from hidden states and over several ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import MEAN, NONE, LogitOptions, LossOptions
from .statistics import FloatStats

_LOWEST = 4
"""A logit of -inf stands as the lowest finite number over this: the difference of two is finite."""
_LINEAR = 40
"""From here on log(1 + e^x) is x, to float64's last place."""


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


def is_class(target: Tensor, options: LogitOptions) -> Tensor:
    """Which targets are classes that are not ignored."""
    return (target != options.ignore_index) & (target >= 0) & (target < options.vocab_size)


def only(counts: Tensor, rows: Tensor) -> Tensor:
    """The rows (..., k) that count, and zeros for the others, whatever stands there."""
    return torch.where(counts.unsqueeze(-1), rows, 0.0)


def spared(rows: Tensor, *upstream: Tensor) -> Tensor:
    """The rows, with zeros for those that hold nan or inf and whose gradients from above are 0.

    The kernels do not read rows without a gradient; torch would multiply what they hold by 0.
    """
    idle = torch.stack([grad.reshape(rows.shape[:-1]) == 0 for grad in upstream]).all(0)
    return only(~(idle & (rows.isnan() | rows.isposinf()).any(-1)), rows)


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
    if is_indices(target):
        x = only(target != options.ignore_index, x)
    lowest = torch.finfo(real).min / _LOWEST
    x = x.clamp_min(lowest)  # before the scale too, whose gradient would be inf * 0
    x = x * (logit_scale.to(real) if logit_scale is not None else options.scale)
    if options.softcap > 0:
        x = options.softcap * torch.tanh(x / options.softcap)
    x = x.clamp_min(lowest)
    lse = torch.logsumexp(x, dim=-1)
    log_p = x - lse.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    sum_sq = torch.logsumexp(2 * log_p, dim=-1)
    class_weight = None if weight is None else weight[: options.vocab_size].to(real)
    if is_indices(target):
        valid = target != options.ignore_index
        index = torch.where(is_class(target, options), target, 0).long().unsqueeze(-1)
        # From a sum without the target, as the kernels do: it keeps its digits as p_y -> 1.
        near_0 = x - x.detach().amax(-1, keepdim=True)
        others = torch.logsumexp(near_0.scatter(-1, index, lowest), dim=-1)
        log_prob = -F.softplus(others - near_0.gather(-1, index).squeeze(-1), threshold=_LINEAR)
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


def row_weights(
    token_weight: Tensor | None, target: Tensor, ignore_index: int, real: torch.dtype
) -> Tensor:
    """The weight of each token, 1 if None is given; 0 at ignored ones, whatever was given there."""
    if not is_indices(target):
        shape = target.shape[:-1]
        ones = torch.ones(shape, dtype=real, device=target.device)
        return ones if token_weight is None else token_weight.to(real)
    valid = target != ignore_index
    return valid.to(real) if token_weight is None else torch.where(valid, token_weight.to(real), 0)


def without_weightless(
    target: Tensor, token_weight: Tensor, options: LogitOptions, is_learned: bool
) -> Tensor:
    """Class indices whose tokens of weight 0 are ignored.

    A learned weight of 0 keeps its gradient, as far as its target is a class.
    """
    drop = token_weight == 0
    if is_learned:
        drop = drop & ~is_class(target, options)
    return torch.where(drop, options.ignore_index, target)


def denominator(w_y: Tensor | None, weights: Tensor, loss: LossOptions) -> Tensor:
    """What the mean divides by, and what the z-loss is multiplied by: MeanDenominator of loss.h.

    Args:
        w_y: The class weight of each target; None: probability targets.
        weights: Of the tokens, 0 where ignored.
        loss: Whether there is a z-loss.
    """
    tokens = weights.sum()
    total, factor = tokens, torch.ones_like(tokens)
    if w_y is not None:
        total = (w_y * weights).sum()
        if loss.z_loss != 0:
            factor = torch.where(tokens == 0, 1.0, total / tokens)
    return torch.stack([total, factor])


def counted(
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    logits: LogitOptions,
    loss: LossOptions,
    real: torch.dtype,
) -> Tensor:
    """`denominator` of tokens with these targets, class weights and weights."""
    w_y = None
    if is_indices(target):
        w_y = target_weights(target, weight, logits.ignore_index, real)
    return denominator(w_y, row_weights(token_weight, target, logits.ignore_index, real), loss)


def items_denominator(num_items: Tensor, real: torch.dtype) -> Tensor:
    """`denominator` by the caller's number of items; of 0 items, loss and gradients are 0.

    A whole denominator stays what it is.
    """
    numbers = num_items.to(real).reshape(-1)
    if numbers.numel() > 1:
        return numbers
    items = torch.where(numbers == 0, math.inf, numbers)
    return torch.cat([items, torch.ones_like(items)])


def row_losses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    logit_scale: Tensor | None,
    options: LogitOptions,
    loss: LossOptions,
    z_factor: Tensor | None = None,
) -> Tensor:
    """The loss of every row, 0 where ignored."""
    eps = loss.label_smoothing
    shares = ColumnWeights(1.0 - eps, eps / options.vocab_size)
    real, w_y, weights = real_of(input), None, None
    if is_indices(target):
        w_y = target_weights(target, weight, options.ignore_index, real)
    if token_weight is not None:
        weights = row_weights(token_weight, target, options.ignore_index, real)
        input = only(weights != 0, input)
        if w_y is None:
            target = only(weights != 0, target)
    stats = token_stats(input, target, weight, logit_scale, options, shares)
    return losses_of(stats, w_y, weights, loss, z_factor)


def losses_of(
    stats: FloatStats,
    w_y: Tensor | None,
    weights: Tensor | None,
    loss: LossOptions,
    z_factor: Tensor | None = None,
) -> Tensor:
    """The losses of rows: row_loss of csrc/core/loss.h.

    Args:
        stats: Those that `LossOptions.statistics` names.
        w_y: The class weight of each target, 0 where ignored; None: probability targets.
        weights: Of the tokens, 0 where ignored; None: 1 for all.
        loss: The options; the reduction is not read.
        z_factor: Of the z-loss, 0-d: see `denominator`.
    """
    if weights is not None and weights.requires_grad:
        stats = FloatStats(
            *(x if x is None or not x.numel() else without_garbage(x, weights) for x in stats)
        )
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
        z_rows = loss.z_loss * stats.lse.square()
        rows = rows + (z_rows if z_factor is None else z_rows * z_factor)
    return rows if weights is None else rows * weights.to(rows.dtype)


def without_garbage(x: Tensor, weights: Tensor) -> Tensor:
    """A number for each row, with 0 for a nan or inf that a weight of 0 would be multiplied by."""
    return torch.where((weights == 0) & ~x.isfinite(), 0.0, x)


def _difficulty(log_prob: Tensor, gamma: float) -> Tensor:
    """(1 - p_y)^gamma (Lin et al. 2017); no derivative is infinite where p_y is 0 or 1."""
    p_else = -torch.expm1(log_prob)
    inside = (p_else > 0) & (p_else < 1)
    return torch.where(inside, torch.where(inside, p_else, 0.5).pow(gamma), p_else.detach().sign())


def losses_and_gradients(
    stats: FloatStats,
    w_y: Tensor,
    weights: Tensor,
    upstream: Tensor,
    loss: LossOptions,
    z_factor: Tensor,
) -> tuple[Tensor, FloatStats]:
    """`losses_of`, and the gradients of their sum times ``upstream``; None: no such gradient."""
    names = loss.statistics()
    # Inside an operator, which a compiled graph calls, autograd is switched off.
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        leaves = {name: getattr(stats, name).detach().requires_grad_() for name in names}
        rows = losses_of(FloatStats(**leaves), w_y, weights, loss, z_factor)
        gradients = torch.autograd.grad(
            rows, list(leaves.values()), upstream.expand_as(rows), allow_unused=True
        )
    return rows.detach(), FloatStats(**dict(zip(names, gradients, strict=True)))


def loss_of(
    stats: FloatStats,
    w_y: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    loss: LossOptions,
) -> Tensor:
    """`losses_of`, reduced: (N) or 0-d."""
    if loss.reduction != MEAN:
        rows = losses_of(stats, w_y, weights, loss)
        return rows if loss.reduction == NONE else total(rows)
    of_mean = mean_denominator(w_y, weights, num_items, loss)
    rows = losses_of(stats, w_y, weights, loss, of_mean[1])
    return total(rows) / of_mean[0].to(rows.dtype)


def mean_denominator(
    w_y: Tensor | None, weights: Tensor, num_items: Tensor | None, loss: LossOptions
) -> Tensor:
    """`denominator`, or that of the caller's number of items."""
    if num_items is None:
        return denominator(w_y, weights, loss)
    return items_denominator(num_items, weights.dtype)


def mean(rows: Tensor, counts: Tensor | int, num_items: int | Tensor | None) -> Tensor:
    """The sum of rows, 0 where they do not count, over how many count or over ``num_items``.

    Args:
        rows: A loss each.
        counts: How many of them count.
        num_items: The denominator of all micro-batches; 0 gives 0.
    """
    whole = total(rows)
    if num_items is None:
        return whole / counts
    return whole / items_denominator(torch.as_tensor(num_items), rows.dtype)[0]


def total(rows: Tensor) -> Tensor:
    """The sum of one number per token, 0-d, which zeros among them do not change.

    Added up in float64 and rounded once: on a CPU one after the other, so that ignored tokens
    change no bit; elsewhere in torch's order, where they change none but of the float64 sum.
    """
    flat = rows.flatten().double()
    if rows.device.type != "cpu":
        return flat.sum().to(rows.dtype)
    return F.pad(flat, (1, 0)).cumsum(0)[-1].to(rows.dtype)
