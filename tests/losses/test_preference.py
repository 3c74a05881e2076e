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


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize("fill", [math.nan, -math.inf])
def test_what_masked_tokens_hold_does_not_matter(device, kind, fill):
    mask = torch.ones(3, 5, device=device)
    mask[0, 2:] = mask[2] = 0
    tensors = [-torch.rand(3, 5, device=device) for _ in range(4)]
    results = []
    for value in (0.0, fill):
        x, old, reference, entropy = (
            t.masked_fill(mask == 0, value).requires_grad_() for t in tensors
        )
        options = {"entropy": entropy, "entropy_bonus": 0.1}
        if kind == "ppo":
            advantages = torch.ones(3, 5, device=device).masked_fill(mask == 0, value)
            loss = losses.ppo_clip_loss(x, old, advantages, mask, **options)
        else:
            advantages = torch.tensor([1.0, 2.0, value], device=device)
            options["reference_log_probs"] = reference
            loss = losses.grpo_loss(x, old, advantages, mask, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, entropy))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[1][1][mask == 0] == 0).all()


@pytest.mark.parametrize("name", ["old_log_probs", "advantages", "mask", "entropy",
                                  "reference_log_probs"])  # fmt: skip
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 5), (3, 1), (3, 5, 1)])
def test_policy_losses_do_not_broadcast(name, shape):
    whole = dict.fromkeys(("log_probs", "old_log_probs", "mask", "entropy"), torch.ones(3, 5))
    ppo, grpo = {**whole, "advantages": torch.ones(3, 5)}, {**whole, "advantages": torch.ones(3)}
    grpo["reference_log_probs"] = torch.ones(3, 5)
    for function, arguments in ((losses.ppo_clip_loss, ppo), (losses.grpo_loss, grpo)):
        if name not in arguments:
            continue
        function(**arguments)
        if (name, shape, function) == ("advantages", (3, 1), losses.ppo_clip_loss):
            function(**{**arguments, name: torch.ones(shape)})  # one for each sequence
            continue
        with pytest.raises(ValueError, match=name.split("_")[0]):
            function(**{**arguments, name: torch.ones(shape)})


@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.dpo_loss(x, x, x, x, beta=0.0),
        lambda x: losses.dpo_loss(x, x, x, x, label_smoothing=0.6),
        lambda x: losses.dpo_loss(x, x, x, x, kind="other"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="ipo", label_smoothing=0.1),
        lambda x: losses.dpo_loss(x, x, x, x[:1]),
        lambda x: losses.ppo_clip_loss(x, x, x, x, clip=0.0),
        lambda x: losses.ppo_clip_loss(x, x, x, x, entropy_bonus=1.0),
        lambda x: losses.ppo_clip_loss(x, x, x, x[:1]),
        lambda x: losses.grpo_loss(x[None], x[None], x, x[None]),
        lambda x: losses.grpo_loss(x[None], x[None], x[:1], x[None], kl_weight=math.nan),
    ],
)
def test_preference_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.zeros(3))
