"""KTO and BCO against their formulas, and their properties."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import losses
from llmloss_ext.losses.pairs import PREFERENCE_OPTIONS

B = 6
GOOD = [1, 0, 0, 1, 1, 0]


def sequences(device="cpu"):
    torch.manual_seed(0)
    policy = -20 * torch.rand(B, dtype=torch.float64)
    reference = policy + 2 * torch.randn(B, dtype=torch.float64)
    return policy.to(device).requires_grad_(), reference.to(device), torch.tensor(GOOD).to(device)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kto(d, good, kl, beta, weights):
    value = 1 - sigmoid(beta * (d - kl)) if good else 1 - sigmoid(beta * (kl - d))
    return weights[0 if good else 1] * value


def bco(d, good, shift, beta):
    r = beta * d
    return -math.log(sigmoid(r - shift)) if good else -math.log(sigmoid(-(r - shift)))


def check(found, formula, policy, reference):
    numbers, others = policy.tolist(), reference.tolist()

    def mean(values):
        each = zip(values, others, GOOD, strict=True)
        return sum(formula(x - y, good) for x, y, good in each) / B

    assert float(found.loss.detach()) == pytest.approx(mean(numbers), abs=1e-10)
    (grad,) = torch.autograd.grad(found.loss, policy, retain_graph=True)
    for i in range(B):
        ends = [
            mean([*numbers[:i], numbers[i] + step, *numbers[i + 1 :]]) for step in (1e-6, -1e-6)
        ]
        assert float(grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)
        assert (float(grad[i]) < 0) == bool(GOOD[i])


def check_metrics(found, policy, reference, beta):
    rewards = [beta * (x - y) for x, y in zip(policy.tolist(), reference.tolist(), strict=True)]
    assert_close(found.rewards, torch.tensor(rewards, dtype=torch.float64), 1e-12)
    for values, names in (
        (rewards, ("chosen_rewards", "rejected_rewards")),
        (policy.tolist(), ("chosen_log_probs", "rejected_log_probs")),
    ):
        for name, good in zip(names, (1, 0), strict=True):
            of_those = [v for v, g in zip(values, GOOD, strict=True) if g == good]
            assert float(getattr(found, name)) == pytest.approx(sum(of_those) / len(of_those))
    assert float(found.margins) == pytest.approx(
        float(found.chosen_rewards - found.rejected_rewards)
    )
    assert not any(t.requires_grad for t in found[1:])


def test_kto(device):
    policy, reference, good = sequences(device)
    kl = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    how = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    found = losses.kto_loss(policy, reference, good, kl=kl, **how)
    check(found, lambda d, g: kto(d, g, 0.3, 0.2, (1.3, 0.6)), policy, reference)
    check_metrics(found, policy, reference, 0.2)
    assert torch.autograd.grad(found.loss, kl, allow_unused=True) == (None,)
    assert float(found.shift) == pytest.approx(0.06)
    found = losses.kto_loss(policy, reference, good.bool(), kind="apo_zero_unpaired", **how)
    check(found, lambda d, g: kto(d, g, 0.0, 0.2, (1.3, 0.6)), policy, reference)
    assert found.shift == 0


def test_kl_estimate():
    policy = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    found = losses.kl_estimate(policy, policy.detach() - torch.tensor([1.0, -0.5, 0.4]))
    assert float(found) == pytest.approx(0.3)
    assert not found.requires_grad
    assert losses.kl_estimate(policy, policy.detach() + 1) == 0
    with pytest.raises(ValueError):
        losses.kl_estimate(policy, policy[:1])


def test_bco(device):
    policy, reference, good = sequences(device)
    found = losses.bco_loss(policy, reference, good, shift=0.3, beta=0.2)
    check(found, lambda d, g: bco(d, g, 0.3, 0.2), policy, reference)
    check_metrics(found, policy, reference, 0.2)
    as_tensor = losses.bco_loss(
        policy, reference, good, shift=torch.tensor(0.3, device=device).double(), beta=0.2
    )
    assert_close(as_tensor.loss.detach(), found.loss.detach(), 1e-7)
    weight = torch.rand(B, device=device, requires_grad=True)
    each = losses.bco_loss(policy, reference, good, shift=0.3, beta=0.2, reduction="none").loss
    weighted = losses.bco_loss(policy, reference, good, shift=0.3, beta=0.2, weight=weight).loss
    assert_close(weighted.detach(), (each * weight).mean().detach(), 1e-7)
    assert torch.autograd.grad(weighted, weight, allow_unused=True) == (None,)


def test_the_running_shift(device):
    """Of all rewards so far, this batch's among them."""
    policy, reference, good = sequences(device)
    running, seen = losses.RunningMean(), []
    for step in range(3):
        x = (policy.detach() + step).requires_grad_()
        found = losses.bco_loss(x, reference, good, shift=running, beta=0.2)
        seen += (0.2 * (x - reference)).tolist()
        mean = sum(seen) / len(seen)
        assert float(found.shift) == pytest.approx(mean, abs=1e-12)
        check(found, lambda d, g, m=mean: bco(d, g, m, 0.2), x, reference)
    again = losses.RunningMean()
    again.load_state_dict(running.state_dict())
    assert int(again.count) == 3 * B
    for one in (running, again):
        one.update(torch.tensor([5.0, math.nan, 7.0], device=device))
        wanted = (sum(seen) + 12) / (len(seen) + 2)
        assert float(one.mean) == pytest.approx(wanted, abs=1e-12)
    state = running.state_dict()
    running.update(torch.ones(3, device=device))
    assert state["mean"] != running.mean  # a checkpoint is not what goes on
    assert int(state["count"]) == 3 * B + 2
    empty = losses.RunningMean()
    assert empty.update(torch.zeros(0)) == 0
    with pytest.raises(KeyError):
        empty.load_state_dict({})


def test_only_good_ones():
    policy, reference, _ = sequences()
    kl = torch.tensor(0.1)
    for found in (
        losses.kto_loss(policy, reference, torch.ones(B), kl=kl),
        losses.bco_loss(policy, reference, torch.ones(B), shift=0.0),
    ):
        assert found.loss.isfinite()
        assert found.chosen_rewards.isfinite()
        assert found.rejected_rewards.isnan()


LOSSES = {
    "kto": lambda *given, **how: losses.kto_loss(*given, kl=torch.tensor(0.2).double(), **how),
    "apo": lambda *given, **how: losses.kto_loss(*given, kind="apo_zero_unpaired", **how),
    "bco": lambda *given, **how: losses.bco_loss(*given, shift=0.2, **how),
}


@pytest.mark.parametrize("name", LOSSES)
def test_properties(name):
    loss, given = LOSSES[name], sequences()
    policy, reference, good = given
    whole, each = loss(*given).loss, loss(*given, reduction="none").loss
    assert each.shape == (B,)
    assert_close(each.mean().detach(), whole.detach(), 1e-12)
    parts = [
        loss(*(t[s] for t in given), num_items=B).loss
        for s in (slice(0, 2), slice(2, 6), slice(6, 6))
    ]
    assert_close(sum(parts).detach(), whole.detach(), 1e-12)
    order = torch.randperm(B)
    assert_close(loss(*(t[order] for t in given)).loss.detach(), whole.detach(), 1e-12)
    assert loss(*given, num_items=0).loss == 0
    # The gradient turns with the label, where nothing else tells the two apart.
    center = 0.2 if name == "kto" else 2.0 if name == "bco" else 0.0
    at = (reference + center).requires_grad_()
    one, other = (torch.autograd.grad(loss(at, reference, g).loss, at)[0] for g in (good, 1 - good))
    assert_close(one, -other, 1e-12)
    batch = torch.stack([policy, policy - 1]).detach()
    f = lambda x: loss(x, reference, good).loss  # noqa: E731
    assert_close(torch.func.vmap(f)(batch), torch.stack([f(x) for x in batch]), 1e-12)
    assert torch.autograd.gradgradcheck(f, policy)
    for dtype in (torch.float16, torch.bfloat16):
        half, wide = policy.detach().to(dtype), policy.detach().to(dtype).float()
        found, wanted = (loss(x, reference.float(), good).loss for x in (half, wide))
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("function", [losses.kto_loss, losses.bco_loss])
def test_help_describes_every_argument(function):
    text = inspect.getdoc(function)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for name, parameter in inspect.signature(function).parameters.items():
        assert arguments.count(f"\n    {name}: ") == 1, name
        if name in PREFERENCE_OPTIONS and name != "kind":
            assert parameter.default == PREFERENCE_OPTIONS[name].default


@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.kto_loss(x, x, x),
        lambda x: losses.kto_loss(x, x, x, kl=x),
        lambda x: losses.kto_loss(x, x, x, kl=x[0], kind="apo_zero_unpaired"),
        lambda x: losses.kto_loss(x, x, x, kl=x[0], kind="other"),
        lambda x: losses.kto_loss(x, x[:1], x, kl=x[0]),
        lambda x: losses.kto_loss(x, x, x[:1], kl=x[0]),
        lambda x: losses.kto_loss(x, x, x, kl=x[0], beta=0.0),
        lambda x: losses.kto_loss(x, x, x, kl=x[0], desirable_weight=-1.0),
        lambda x: losses.kto_loss(x, x, x, kl=x[0], undesirable_weight=math.inf),
        lambda x: losses.kto_loss(x, x, x, kl=x[0], reduction="sum"),
        lambda x: losses.bco_loss(x, x, x, shift=x),
        lambda x: losses.bco_loss(x, x, x, shift=0.0, beta=math.nan),
        lambda x: losses.bco_loss(x, x, x, shift=0.0, weight=x[:1]),
        lambda x: losses.bco_loss(x, x, x[:1], shift=0.0),
        lambda x: losses.bco_loss(x, x, x, shift=0.0, reduction="none", num_items=3),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.ones(3))
