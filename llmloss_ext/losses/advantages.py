"""Advantages: how much better a token or a sequence was than expected. Without a gradient.

Vector operations over the batch; nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composite
from ..sequences import moved
from .bounded import check_same_shape, valid_tokens, where_valid

__all__ = ["Advantages", "gae", "group_advantages", "masked_whiten", "rloo_advantages"]

_EPSILON = 1e-4
"""What TRL adds to a standard deviation of rewards."""


_SCALES: dict[str | bool, str] = {
    "group": "group", True: "group", "batch": "batch", "none": "none", False: "none",
}  # fmt: skip


class Advantages(NamedTuple):
    """(..., S) of tokens; 0 where the mask leaves them out."""

    advantages: Tensor
    returns: Tensor
    """What the critic should have said: the advantages plus its values."""


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016), over the tokens of the mask.

    A_t = d_t + gamma lam A_t', d_t = r_t + gamma V_t' - V_t, where t' is the next token that counts
    and both are 0 after the last one. As verl, the mask may have gaps (what a tool has said); as
    TRL without them. Not whitened, see `masked_whiten`.

    Args:
        rewards: (..., S) of tokens; mostly the sequence's at its last token.
        values: (..., S) of the critic.
        mask: (..., S): which tokens count; others may hold anything.
        gamma: The discount, in [0, 1].
        lam: In [0, 1]; 1: the returns less the values.

    Returns:
        `Advantages`, float32, or float64 for float64. Takes log2(S) vector operations.

    Raises:
        ValueError: The shapes do not fit, or an option is out of range.
    """
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma and lam must be in [0, 1], got {gamma} and {lam}")
    check_same_shape(values, rewards=rewards)
    valid = valid_tokens(mask, values)
    r, v = (_only(valid, x) for x in (rewards, values))
    found = where_valid(valid, r + gamma * _next(valid, v) - v)
    factor = torch.ones_like(found).masked_fill(valid, gamma * lam)
    reach = 1
    while reach < valid.shape[-1]:  # each holds what the next 2 reach tokens add to it
        found = found + factor * moved(found, reach, 0.0)
        factor = factor * moved(factor, reach, 0.0)
        reach *= 2
    found = where_valid(valid, found)
    return Advantages(found, found + v)


def _only(valid: Tensor, x: Tensor) -> Tensor:
    return where_valid(valid, x.detach().to(composite.real_of(x)))


def _next(valid: Tensor, values: Tensor) -> Tensor:
    """What stands at the next token that counts, 0 where there is none."""
    length = valid.shape[-1]
    places = torch.arange(length, device=valid.device).expand(valid.shape)
    here = torch.where(valid, places, length).flip(-1).cummin(-1).values.flip(-1)
    return F.pad(values, (0, 1)).gather(-1, moved(here, 1, length))


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Of mean 0 and variance 1 over the tokens that count, as TRL and verl whiten advantages.

    Args:
        x: (..., S).
        mask: (..., S): which tokens count; others may hold anything.
        shift_mean: Whether the mean becomes 0; else it stays.

    Returns:
        (..., S), 0 where the mask leaves tokens out. (x - mean) / sqrt(variance + 1e-8), the
        variance unbiased.

    Raises:
        ValueError: The shapes differ.
    """
    valid = valid_tokens(mask, x)
    x = _only(valid, x)
    count = valid.sum()
    mean = x.sum() / count.clamp_min(1)
    centred = where_valid(valid, x - mean)
    variance = centred.square().sum() / (count - 1).clamp_min(1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else where_valid(valid, whitened + mean)


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale_rewards: str | bool = "group"
) -> Tensor:
    """GRPO's: a reward less the mean of its prompt's, over their standard deviation.

    (r - mean) / (std + 1e-4), as TRL, the standard deviation unbiased.

    Args:
        rewards: (B): those of one prompt follow each other; nan: not scored, has advantage 0 and no
            part in the mean.
        num_generations: How many each prompt has.
        scale_rewards: ``"group"`` or True; ``"batch"``: the standard deviation of all rewards
            (Liu et al. 2025, PPO Lite); ``"none"`` or False: not divided (Dr. GRPO).

    Returns:
        (B), float32, or float64 for float64. A group of equal rewards has 0, but for rounding.

    Raises:
        ValueError: The number does not divide the batch, or there is no such scale.
    """
    grouped = _grouped(rewards, num_generations)
    scale = _SCALES.get(scale_rewards)
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(grouped) + _EPSILON)
    elif scale == "batch":
        centred = centred / (_nanstd(grouped.reshape(1, -1)) + _EPSILON)
    elif scale is None:
        raise ValueError(f'scale_rewards must be "group", "batch" or "none", got {scale_rewards!r}')
    return centred.reshape(-1).nan_to_num(nan=0.0)


def rloo_advantages(
    rewards: Tensor, num_generations: int, *, normalize_advantages: bool = False
) -> Tensor:
    """A reward less the mean of the others of its prompt (RLOO, Ahmadian et al. 2024), as TRL.

    Args:
        rewards: (B): those of one prompt follow each other; nan: not scored, has advantage 0 and no
            part in the mean.
        num_generations: How many each prompt has.
        normalize_advantages: Whether all are then made to have mean 0 and standard deviation 1.

    Returns:
        (B), float32, or float64 for float64; 0 where a prompt has no other.

    Raises:
        ValueError: The number does not divide the batch.
    """
    grouped = _grouped(rewards, num_generations)
    others = (~grouped.isnan()).sum(-1, keepdim=True) - 1
    total = grouped.nansum(-1, keepdim=True)
    found = grouped - (total - grouped) / others
    if normalize_advantages:
        found = (found - found.nanmean()) / (_nanstd(found.reshape(1, -1)) + _EPSILON)
    return found.reshape(-1).nan_to_num(nan=0.0)


def _grouped(rewards: Tensor, num_generations: int) -> Tensor:
    """(prompts, num_generations)."""
    if rewards.dim() != 1 or num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(
            f"expected rewards (B) of groups of {num_generations}, got {tuple(rewards.shape)}"
        )
    return rewards.detach().to(composite.real_of(rewards)).view(-1, num_generations)


def _nanstd(x: Tensor) -> Tensor:
    """(rows, 1): unbiased, of what is not nan; nan for one number, whose advantage becomes 0."""
    count = (~x.isnan()).sum(-1, keepdim=True)
    squares = (x - x.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return torch.sqrt(squares / (count - 1))
