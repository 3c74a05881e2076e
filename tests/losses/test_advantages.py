"""Advantages against loops over tokens and rewards, written from the papers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses


def by_a_loop(rewards, values, mask, gamma, lam):
    """Schulman et al. 2016, backwards over the tokens that count."""
    found = torch.zeros_like(values)
    for row in range(len(values)):
        after, after_value = 0.0, 0.0
        for t in reversed(range(values.shape[1])):
            if mask[row, t]:
                v = float(values[row, t])
                after = float(rewards[row, t]) + gamma * after_value - v + gamma * lam * after
                after_value = v
                found[row, t] = after
    return found


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae(device, length, gamma, lam):
    torch.manual_seed(length)
    rewards, values = torch.randn(2, 5, length, dtype=torch.float64)
    mask = torch.rand(5, length) < 0.7  # with gaps
    mask[0], mask[1] = True, False
    want = by_a_loop(rewards, values, mask, gamma, lam)
    rewards[~mask] = values[~mask] = math.nan
    found = losses.gae(rewards.to(device), values.to(device), mask.to(device), gamma=gamma, lam=lam)
    assert_close(found.advantages, want, 1e-12)
    assert_close(found.returns, torch.where(mask, want + values, 0.0), 1e-12)
    if lam == 1.0:  # the returns are what was earned from there on
        later = torch.where(mask, rewards, 0.0).flip(-1).cumsum(-1).flip(-1)
        assert_close(found.returns, torch.where(mask, later, 0.0), 1e-12)


@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.sampled_from([torch.bfloat16, torch.float32]))
def test_padding_and_order_do_not_matter_to_gae(seed, dtype):
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, 4, 6).to(dtype)
    mask = torch.rand(4, 6) < 0.8
    one = losses.gae(rewards, values, mask)
    assert one.advantages.dtype == torch.float32
    junk = torch.full((4, 3), math.inf, dtype=dtype)
    wide = [torch.cat([junk, x, junk], 1) for x in (rewards, values)]
    padded = losses.gae(*wide, torch.nn.functional.pad(mask, (3, 3)))
    assert_close(padded.advantages[:, 3:-3], one.advantages, 1e-6)
    assert (padded.advantages[:, :3] == 0).all()
    order = torch.randperm(4)
    moved = losses.gae(rewards[order], values[order], mask[order])
    assert torch.equal(moved.returns, one.returns[order])


def test_no_gradient_passes_and_nothing_is_too_small():
    values = torch.randn(2, 0, requires_grad=True)
    assert losses.gae(values, values, values).advantages.shape == (2, 0)
    x = torch.randn(2, 3, requires_grad=True)
    for found in (*losses.gae(x, x, torch.ones(2, 3)), losses.masked_whiten(x, torch.ones(2, 3))):
        assert not found.requires_grad
    assert (losses.masked_whiten(x, torch.zeros(2, 3)) == 0).all()
    with pytest.raises(ValueError, match="gamma and lam"):
        losses.gae(x, x, x, gamma=1.1)
    with pytest.raises(ValueError, match="rewards must have"):
        losses.gae(x[0], x, x)


def test_whitening(device):
    x = torch.randn(4, 9, device=device).double() * 3 + 2
    mask = torch.rand(4, 9, device=device) < 0.6
    chosen = x[mask]
    x = torch.where(mask, x, math.nan)
    want = (chosen - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
    found = losses.masked_whiten(x, mask)
    assert_close(found[mask], want, 1e-12)
    assert (found[~mask] == 0).all()
    kept = losses.masked_whiten(x, mask, shift_mean=False)
    assert_close(kept[mask], want + chosen.mean(), 1e-12)
    assert (kept[~mask] == 0).all()


REWARDS = [1.0, 0.0, 0.5, 3.0, 2.0, 2.0, 2.0, math.nan, math.nan, 7.0, math.nan, math.nan]


def scored(group):
    return [r for r in group if not math.isnan(r)]


@pytest.mark.parametrize("scale", ["group", True, "batch", "none", False])
def test_group_advantages(device, scale):
    want = []
    for at in range(0, 12, 4):
        group = scored(REWARDS[at : at + 4])
        deviation = {
            "group": lambda g=group: statistics.stdev(g) if len(g) > 1 else 0.0,
            "batch": lambda: statistics.stdev(scored(REWARDS)),
            "none": lambda: 1 - 1e-4,
        }[{True: "group", False: "none"}.get(scale, scale)]()
        for reward in REWARDS[at : at + 4]:
            missing = math.isnan(reward)
            want.append(0.0 if missing else (reward - statistics.mean(group)) / (deviation + 1e-4))
    rewards = torch.tensor(REWARDS, dtype=torch.float64, device=device, requires_grad=True)
    found = losses.group_advantages(rewards, 4, scale_rewards=scale)
    assert not found.requires_grad
    assert_close(found, torch.tensor(want, dtype=torch.float64), 1e-6 if scale == "none" else 1e-9)
    assert (losses.group_advantages(rewards[:3], 1, scale_rewards=scale) == 0).all()


@pytest.mark.parametrize("normalized", [False, True])
def test_leave_one_out(device, normalized):
    want = []
    for at in range(0, 12, 4):
        group = REWARDS[at : at + 4]
        for i, reward in enumerate(group):
            others = scored(group[:i] + group[i + 1 :])
            missing = math.isnan(reward) or not others
            want.append(math.nan if missing else reward - statistics.mean(others))
    if normalized:
        mean, deviation = statistics.mean(scored(want)), statistics.stdev(scored(want))
        want = [(a - mean) / (deviation + 1e-4) for a in want]
    want = [0.0 if math.isnan(a) else a for a in want]
    rewards = torch.tensor(REWARDS, dtype=torch.float64, device=device)
    found = losses.rloo_advantages(rewards, 4, normalize_advantages=normalized)
    assert_close(found, torch.tensor(want, dtype=torch.float64), 1e-9)


def test_what_does_not_fit():
    for rewards, number in ((torch.ones(5), 2), (torch.ones(2, 2), 2), (torch.ones(2), 0)):
        for function in (losses.group_advantages, losses.rloo_advantages):
            with pytest.raises(ValueError, match="expected rewards"):
                function(rewards, number)
    with pytest.raises(ValueError, match="scale_rewards must be"):
        losses.group_advantages(torch.ones(4), 2, scale_rewards="std")
