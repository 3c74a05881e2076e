"""The policy losses as the papers write them, a token at a time in float64: no code of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Problem", "by_definition"]


def number(x: Tensor) -> float:
    """Without its gradient."""
    return float(x.detach())


class Problem:
    """A batch of sequences of different lengths, with all that a policy loss may ask for."""

    def __init__(self, seed: int = 0, sequences: int = 5, length: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (sequences, length)
        self.log_probs = -normal(*shape).abs() - 0.1
        self.old = self.log_probs + 0.4 * normal(*shape)
        self.reference = self.log_probs + 0.5 * normal(*shape)
        self.sampling = self.old + 0.2 * normal(*shape)
        self.entropy = normal(*shape).abs()
        self.rollout = torch.exp(0.3 * normal(*shape))
        self.advantages = normal(sequences)
        self.advantages[:2] = torch.tensor([1.0, -1.0])
        lengths = torch.randint(1, length + 1, (sequences,), generator=generator)
        self.mask = torch.arange(length) < lengths[:, None]
        self.mask[0] = True
        self.entropy_mask = torch.rand(shape, generator=generator) < 0.7

    def part(self, at: Any) -> Problem:
        """Some of the sequences."""
        part = Problem.__new__(Problem)
        vars(part).update({name: x[at] for name, x in vars(self).items()})
        return part

    def spoilt(self, value: float) -> Problem:
        """Something else wherever the mask leaves tokens out."""
        other = self.part(slice(None))
        for name, x in vars(self).items():
            if x.shape == self.mask.shape and x.is_floating_point():
                vars(other)[name] = torch.where(self.mask, x, value)
        return other

    def to(self, where: Any) -> Problem:
        """On a device, or of a dtype."""
        other = self.part(slice(None))
        for name, x in vars(self).items():
            if not isinstance(where, torch.dtype) or x.is_floating_point():
                vars(other)[name] = x.to(where)
        return other


def by_definition(
    x: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float = math.inf,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True,
    entropy_coef: float = 0.0,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    max_completion_length: int = 0,
    off_policy_mask_threshold: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """The loss, and that of each token (B, S) without the entropy bonus."""
    high = epsilon if epsilon_high is None else epsilon_high
    if old is None:
        old = x.detach()
    sequences, length = mask.shape
    losses: list[list[Tensor | None]] = [[None] * length for _ in range(sequences)]
    bonuses = []
    for i in range(sequences):
        of = [t for t in range(length) if mask[i, t]]
        if not of:
            continue
        log_ratios = [x[i, t] - old[i, t] for t in of]
        mean_log_ratio = torch.stack(log_ratios).mean()
        sampled = old if sampling_log_probs is None else sampling_log_probs
        fallen = sum(number(sampled[i, t] - x[i, t]) for t in of) / len(of)
        for t, log_ratio in zip(of, log_ratios, strict=True):
            a = advantages[i] if advantages.dim() == 1 else advantages[i, t]
            if importance_sampling_level == "token":
                r = torch.exp(log_ratio)
            elif importance_sampling_level == "sequence":
                r = torch.exp(mean_log_ratio)
            else:  # s_i without a gradient times pi / sg(pi)
                r = torch.exp(mean_log_ratio).detach() * torch.exp(x[i, t] - x[i, t].detach())
            if loss_type == "cispo":
                loss = -min(number(r), high) * a * x[i, t]
            elif loss_type == "sapo":
                tau = sapo_temperature_pos if a > 0 else sapo_temperature_neg
                loss = -4 / tau / (1 + torch.exp(-tau * (r - 1))) * a
            elif loss_type == "vespo":
                w = math.exp(sum(number(y) for y in log_ratios))
                if importance_sampling_ratio is not None:
                    w *= math.prod(float(importance_sampling_ratio[i, s]) for s in of)
                k, rate = (
                    (vespo_k_pos, vespo_lambda_pos) if a >= 0 else (vespo_k_neg, vespo_lambda_neg)
                )
                loss = -math.exp(rate) * w**k * math.exp(-rate * w) * a * x[i, t]
            else:
                clipped = min(max(number(r), 1 - epsilon), 1 + high)
                within = r if clipped == number(r) else x.new_tensor(clipped)
                r_two_sided = r if number(r) < delta else x.new_tensor(delta)
                candidates = r_two_sided * a, within * a
                loss = -min(candidates, key=number)
            if off_policy_mask_threshold < fallen and a < 0:
                loss = 0.0 * loss
            acts = entropy_mask is None or bool(entropy_mask[i, t])
            if not acts:
                loss = 0.0 * loss
            elif entropy is not None:
                bonuses.append(entropy[i, t])
            if importance_sampling_ratio is not None and loss_type != "vespo":
                loss = loss * importance_sampling_ratio[i, t]
            if beta and reference_log_probs is not None:
                d = reference_log_probs[i, t] - x[i, t]
                kl = {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - d - 1}[kl_estimator]
                loss = loss + beta * kl * (r if use_bias_correction_kl else 1.0)
            losses[i][t] = loss
    rows = [[loss for loss in row if loss is not None] for row in losses]
    whole = [loss for row in rows for loss in row]
    zero = 0.0 * x[mask.bool()].sum()
    if loss_type in ("grpo", "sapo"):
        total = sum((torch.stack(row).mean() for row in rows if row), zero) / sequences
    elif loss_type == "luspo":
        total = sum(whole, zero) / sequences
    elif loss_type == "dr_grpo":
        total = sum(whole, zero) / (sequences * max_completion_length)
    else:
        total = sum(whole, zero) / max(len(whole), 1)
    if entropy_coef and bonuses:
        total = total - entropy_coef * torch.stack(bonuses).mean()
    each = [[zero if loss is None else loss for loss in row] for row in losses]
    return total, torch.stack([torch.stack(row) for row in each])
