"""Rows whose target has a probability near 1, and what keeps its digits there: from sums, in
float64, that never held the target's own 1."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROBABILITIES = (0.5, 0.99, 0.9999, 1 - 1e-6, 1 - 1e-9)
"""Of the targets, about: logits are rounded."""
COLUMNS = 5003
"""Three blocks of a CPU kernel, the last of them odd."""
CAP = 50.0

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "large offset": {"offset": 500.0},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": CAP},
    "weight": {"weighted": True},
    "label smoothing": {"label_smoothing": 0.03, "weighted": True},
    "z-loss": {"z_loss": 1e-4},
    "focal loss": {"focal_gamma": 0.5},
    "all": {"softcap": CAP, "logit_scale": 1.3, "label_smoothing": 0.03, "z_loss": 1e-4,
            "weighted": True},
}  # fmt: skip

VALUE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""Relative, of a loss."""
GRADIENT = VALUE | {torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Relative, of a number of a gradient: rounded to the logits' dtype, once."""
UPSTREAM = {torch.float16: 2.0**15}
"""A loss scale, without which a gradient of 1e-9 is no float16."""


class Row(NamedTuple):
    """One row of logits (1, COLUMNS), its target (1), and the options of its loss."""

    logits: Tensor
    target: Tensor
    options: dict[str, Any]


def row(probability: float, dtype: torch.dtype, option: str, columns: int = COLUMNS) -> Row:
    """A row whose target has about that probability."""
    options = dict(OPTIONS[option])
    generator = torch.Generator().manual_seed(int(-1000 * math.log(1 - probability)))
    x = 2 * torch.randn(columns, generator=generator, dtype=torch.float64)
    target = torch.randint(columns, (1,), generator=generator)
    others = x.index_fill(0, target, -math.inf).logsumexp(0)
    x[target] = others + math.log(probability / (1 - probability))
    if "softcap" in options:
        x = options["softcap"] * torch.atanh(x / options["softcap"])
    x = x / options.get("logit_scale", 1.0) + options.pop("offset", 0.0)
    if options.pop("weighted", False):
        options["weight"] = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.5
        options["weight"] = options["weight"].float()
    return Row(x.to(dtype)[None], target, options)


def exact(given: Row) -> tuple[Tensor, Tensor]:
    """The loss (1) and its gradient (1, COLUMNS), in float64."""
    options = given.options
    z = given.logits.detach().double().requires_grad_()
    x = z * options.get("logit_scale", 1.0)
    if "softcap" in options:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    index = given.target.unsqueeze(1)
    others = x.scatter(1, index, -math.inf).logsumexp(1) - x.gather(1, index).squeeze(1)
    # log p_y = -log(1 + e^others)
    log_prob = -torch.logaddexp(torch.zeros_like(others), others)
    lse = x.logsumexp(1)
    weight = options.get("weight", torch.ones(x.shape[1])).double()
    eps = options.get("label_smoothing", 0.0)
    loss = -(1 - eps) * weight[given.target] * log_prob
    loss = loss - eps * (weight * (x - lse.unsqueeze(1))).mean(1)
    loss = loss * (-torch.expm1(log_prob)) ** options.get("focal_gamma", 0.0)
    loss = loss + options.get("z_loss", 0.0) * lse.square()
    (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
    return loss.detach(), grad


def check(given: Row, loss: Tensor, grad: Tensor, upstream: float = 1.0, step: float = 0.0) -> None:
    """The loss, and the gradient of ``upstream`` times it: relative errors, of the target's alone.

    The other columns' gradients are small where p is near 1, and have their digits without effort.
    step: Of the smallest numbers that the gradient was rounded to, before ``upstream``.
    """
    dtype = given.logits.dtype
    wanted_loss, wanted = exact(given)
    torch.testing.assert_close(
        loss.detach().double().cpu().reshape(1), wanted_loss, rtol=VALUE[dtype], atol=0
    )
    torch.testing.assert_close(
        grad.double().cpu().reshape(-1)[given.target] / upstream,
        wanted[0, given.target],
        rtol=GRADIENT[dtype],
        atol=step,
    )
