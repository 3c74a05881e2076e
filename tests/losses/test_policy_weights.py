"""Which tokens a policy loss learns from, against TRL's rules written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses
from losses.policy_definition import Problem

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("low", "high"), [(None, 1.2), (0.8, None), (0.9, 1.1), (0.5, 3.0)])
def test_rollout_weights(device, mode, low, high):
    p = Problem(1)
    p.sampling[0, 2] = math.nan  # the engine could not say
    p.mask[1] = False
    want = torch.ones(5, 6 if mode.startswith("token") else 1, dtype=torch.float64)
    for i in range(5):
        of = [t for t in range(6) if p.mask[i, t]]
        known = [t for t in of if not p.sampling[i, t].isnan()]
        ratios = {t: math.exp(p.old[i, t] - p.sampling[i, t]) for t in known}
        if mode.startswith("sequence"):
            ratios = {0: math.prod(ratios.values())}
        for t, ratio in ratios.items():
            bounded = min(max(ratio, low or 0.0), high or math.inf)
            is_out = bounded != ratio
            want[i, t] = bounded if mode.endswith("truncate") else (0.0 if is_out else ratio)
    q = p.spoilt(math.inf).to(device)
    found = losses.rollout_weights(
        q.old.requires_grad_(), q.sampling, q.mask, mode=mode, clip_min=low, clip_max=high
    )
    assert_close(found, want, 1e-12)
    assert not found.requires_grad
    p.rollout = found.cpu()
    loss = losses.grpo_loss(
        p.log_probs, p.old, p.advantages, p.mask, importance_sampling_ratio=p.rollout,
        reduction="none",
    ).loss  # fmt: skip
    plain = losses.grpo_loss(p.log_probs, p.old, p.advantages, p.mask, reduction="none").loss
    assert_close(loss, plain * p.rollout, 1e-12)


def test_rollout_weights_of_large_differences_are_finite():
    old, sampling = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    mask = torch.ones(1, 2)
    found = losses.rollout_weights(old, sampling, mask, mode="token_mask", clip_max=None)
    assert found.isfinite().all()
    found = losses.rollout_weights(old.bfloat16(), sampling.bfloat16(), mask, mode="token_truncate")
    assert found.tolist() == [[3.0, 0.0]]
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mode": "mask"}, "mode must be"),
        ({"mode": "token_truncate", "clip_max": None}, "to truncate"),
        ({"clip_min": 4.0}, "clip_min < clip_max"),
        ({"clip_min": -1.0}, "clip_min < clip_max"),
    ],
)
def test_what_rollout_weights_refuse(how, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        losses.rollout_weights(x, x, x, **how)
    with pytest.raises(ValueError, match="sampling_log_probs must have the shape"):
        losses.rollout_weights(x, x[:1], x)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_off_policy_mask(device, by_tokens):
    p = Problem(2, sequences=40)
    p.sampling[0, 1] = math.nan
    p.mask[3] = False
    a = p.advantages[:, None] * (p.entropy - 0.5) if by_tokens else p.advantages
    want = torch.ones(40, 6 if by_tokens else 1, dtype=torch.bool)
    for i in range(40):
        of = [t for t in range(6) if p.mask[i, t]]
        fallen = [float(p.sampling[i, t] - p.log_probs[i, t]) for t in of]
        mean = sum(y for y in fallen if not math.isnan(y)) / max(len(of), 1)
        for t in range(want.shape[1]):
            want[i, t] = (a[i, t] if by_tokens else a[i]) >= 0 or mean <= 0.1
    assert not want.all()
    q = p.spoilt(math.nan).to(device)
    found = losses.off_policy_mask(q.log_probs, q.sampling, a.to(device), q.mask, 0.1)
    assert torch.equal(found.cpu(), want)
    with pytest.raises(ValueError, match="advantages must have one number per token"):
        losses.off_policy_mask(q.log_probs, q.sampling, a[:3], q.mask, 0.1)
    with pytest.raises(ValueError, match="threshold must be > 0"):
        losses.off_policy_mask(q.log_probs, q.sampling, a, q.mask, 0.0)


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.77, 1.0])
@hypothesis.settings(SETTINGS, max_examples=15)
@hypothesis.given(st.integers(0, 10_000), st.booleans())
def test_high_entropy_mask(quantile, seed, with_ties):
    torch.manual_seed(seed)
    entropy, mask = torch.rand(4, 7), torch.rand(4, 7) < 0.6
    mask[0, 0] = True
    if with_ties:
        entropy = (entropy * 4).round()
    threshold = torch.quantile(entropy[mask], 1 - quantile)
    want = mask & (entropy >= threshold)
    dirty = torch.where(mask, entropy, math.nan)
    found = losses.high_entropy_mask(dirty, mask, quantile)
    assert torch.equal(found, want)
    assert found.any()


def test_high_entropy_mask_of_nothing():
    entropy = torch.rand(2, 3, requires_grad=True)
    assert not losses.high_entropy_mask(entropy, torch.zeros(2, 3), 0.5).any()
    assert losses.high_entropy_mask(entropy[:0], torch.zeros(0, 3), 0.5).shape == (0, 3)
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        losses.high_entropy_mask(entropy, torch.zeros(2, 3), 1.5)
