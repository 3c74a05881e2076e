"""DPO against its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import losses


def test_sequence_log_probs():
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -1.0, math.nan]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert losses.sequence_log_probs(log_probs, mask).tolist() == [-7.0, -2.0]
    assert losses.sequence_log_probs(log_probs[:1]).tolist() == [-7.0]
    assert losses.sequence_log_probs(log_probs, mask, average=True)[1] == -1
    with pytest.raises(ValueError):
        losses.sequence_log_probs(log_probs, average=True)
    with pytest.raises(ValueError):
        losses.sequence_log_probs(log_probs, mask[:, :2])


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo(device, kind):
    pc, pr, rc, rr = torch.randn(4, 6, device=device).double() * 3
    pc.requires_grad_()
    eps = 0.1 if kind == "sigmoid" else 0.0
    result = losses.dpo_loss(pc, pr, rc, rr, beta=0.2, label_smoothing=eps, kind=kind)
    h = (pc - rc) - (pr - rr)
    expected = {
        "sigmoid": -(0.9 * torch.log(torch.sigmoid(0.2 * h))
                     + 0.1 * torch.log(1 - torch.sigmoid(0.2 * h))),
        "hinge": (1 - 0.2 * h).clamp_min(0),
        "ipo": (h - 2.5) ** 2,
    }[kind].mean()  # fmt: skip
    assert_close(result.loss.detach(), expected.detach(), 1e-10)
    (grad,), (want,) = (torch.autograd.grad(z, pc) for z in (result.loss, expected))
    assert_close(grad, want, 1e-10)
    assert_close(result.chosen_rewards, 0.2 * (pc - rc).detach(), 1e-12)
    same = losses.dpo_loss(rc, rr, rc, rr)
    assert float(same.loss) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.dpo_loss(x, x, x, x, beta=0.0),
        lambda x: losses.dpo_loss(x, x, x, x, label_smoothing=0.6),
        lambda x: losses.dpo_loss(x, x, x, x, kind="other"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="ipo", label_smoothing=0.1),
        lambda x: losses.dpo_loss(x, x, x, x[:1]),
    ],
)
def test_preference_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.zeros(3))
