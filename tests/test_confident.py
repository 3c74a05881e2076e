"""A loss and the target's gradient keep their relative precision as the target's p goes to 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from confident import OPTIONS, PROBABILITIES, UPSTREAM, Row, check, row
from helpers import FLOATS
from torch import Tensor

from llmloss_ext import cross_entropy, linear_cross_entropy

Answer = tuple[Tensor, Tensor]


def on(device: torch.device, given: Row) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits that are a leaf, the target and the options."""
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.options.items()}
    logits = given.logits.to(device, copy=True).requires_grad_()
    return logits, given.target.to(device), options


def separate(device: torch.device, given: Row, upstream: float) -> Answer:
    logits, target, options = on(device, given)
    loss = cross_entropy(logits, target, reduction="none", **options)
    return loss, torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))[0]


def in_place(device: torch.device, given: Row, upstream: float) -> Answer:
    logits, target, options = on(device, given)
    loss = cross_entropy(logits * 1, target, inplace=True, reduction="sum", **options)
    return loss, torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))[0]


def differentiable(device: torch.device, given: Row, upstream: float) -> Answer:
    """The gradient that could be differentiated again, by plain torch."""
    logits, target, options = on(device, given)
    loss = cross_entropy(logits, target, reduction="sum", **options)
    upstreams = torch.full_like(loss, upstream)
    return loss, torch.autograd.grad(loss, logits, upstreams, create_graph=True)[0].detach()


def forward_mode(device: torch.device, given: Row, upstream: float) -> Answer:
    """The derivative along the target's logit alone."""
    logits, target, options = on(device, given)
    tangent = torch.zeros_like(logits).index_fill(1, target, 1.0)
    loss, slope = torch.func.jvp(
        lambda x: cross_entropy(x, target, reduction="sum", **options),
        (logits.detach(),),
        (tangent,),
    )
    return loss, upstream * slope.double() * tangent


def from_hidden_states(device: torch.device, given: Row, upstream: float) -> Answer:
    """Of one hidden number, 1: the weights are the logits, and their gradients, too."""
    logits, target, options = on(device, given)
    hidden = torch.ones(1, 1, dtype=logits.dtype, device=device, requires_grad=True)
    weight = logits.detach().T.contiguous().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, reduction="sum", **options)
    return loss, torch.autograd.grad(loss, weight, torch.full_like(loss, upstream))[0]


def rows_from_hidden_states(device: torch.device, given: Row, upstream: float) -> Answer:
    """The statistics' autograd."""
    logits, target, options = on(device, given)
    hidden = torch.ones(1, 1, dtype=logits.dtype, device=device)
    weight = logits.detach().T.contiguous().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, reduction="none", **options)
    return loss, torch.autograd.grad(loss, weight, torch.full_like(loss, upstream))[0]


PATHS: list[Callable[[torch.device, Row, float], Answer]] = [
    separate,
    in_place,
    differentiable,
    forward_mode,
    from_hidden_states,
    rows_from_hidden_states,
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradient(device, path, dtype, option):
    if device.type == "cuda" and "softcap" in OPTIONS[option] and dtype.itemsize == 2:
        pytest.skip("the tanh of 16-bit logits has an absolute error of 2^-22 on GPUs")
    upstream = UPSTREAM.get(dtype, 1.0)
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    if path is not from_hidden_states:  # there the gradient is rounded before the loss is scaled
        step /= upstream
    for probability in PROBABILITIES:
        given = row(probability, dtype, option)
        check(given, *path(device, given, upstream), upstream, step)
