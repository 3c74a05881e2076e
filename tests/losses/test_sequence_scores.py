"""One number for each sequence, against sums over its tokens one by one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import losses, token_stats


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_sequences_of_16_bits_keep_their_digits(device, dtype):
    """A sum of 16 bits would have steps of 1 (float16) or 8 nats (bfloat16) here."""
    torch.manual_seed(0)
    one, two = (-torch.rand(1, 2000, device=device).mul(2).to(dtype) for _ in range(2))
    every = torch.ones(1, 2000, device=device)
    found = losses.sequence_log_probs(one, every)
    assert found.dtype == torch.float32
    assert_close(found, one.double().sum(-1), 1e-6)
    both = losses.length_desensitized_log_probs(one, two, every, every, ld_alpha=0.5)
    assert_close(torch.stack(both), torch.stack([one, two]).double().sum(-1), 1e-6)
    weights = losses.wpo_weights(one, two, every)
    assert weights.dtype == torch.float32
    assert_close(weights, torch.exp((one.double() - two.double()).mean(-1)), 1e-6)


def test_a_gradient_beyond_float16():
    x = torch.zeros(1, 3, dtype=torch.float16, requires_grad=True)
    (losses.sequence_log_probs(x) * 1e6).sum().backward()
    assert x.grad.tolist() == [[65504.0] * 3]


def masks(device="cpu"):
    """With a prompt, a gap and padding on either side; of one pair, no token of one."""
    chosen = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]])
    rejected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    return chosen.to(device), rejected.to(device)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitized(device, ld_alpha):
    of_masks = masks(device)
    numbers = [-torch.rand(m.shape, device=device).double() for m in of_masks]
    leaves = [x.masked_fill(m == 0, math.nan).requires_grad_()
              for x, m in zip(numbers, of_masks, strict=True)]  # fmt: skip
    found = losses.length_desensitized_log_probs(*leaves, *of_masks, ld_alpha=ld_alpha)
    for i in range(4):
        rows = [x[i][m[i].bool()].tolist() for x, m in zip(numbers, of_masks, strict=True)]
        shared = min(len(row) for row in rows)
        for side, row in enumerate(rows):
            wanted = sum(row[:shared]) + ld_alpha * sum(row[shared:])
            assert float(found[side][i].detach()) == pytest.approx(wanted, abs=1e-12)
    grads = torch.autograd.grad(sum(x.sum() for x in found), leaves)
    for grad, mask in zip(grads, of_masks, strict=True):
        assert (grad[mask == 0] == 0).all()
    assert grads[0][0].tolist() == [0, 1, 1, ld_alpha, 0]
    if ld_alpha == 1:
        for one, x, m in zip(found, leaves, of_masks, strict=True):
            assert_close(one, losses.sequence_log_probs(x, m), 1e-12)


def test_length_desensitized_in_half_precision():
    x = torch.full((1, 9), -1e4, dtype=torch.float16)
    ones, few = torch.ones(1, 9), torch.ones(1, 9)
    few[0, 5:] = 0
    both = losses.length_desensitized_log_probs(x, x, ones, few, ld_alpha=0.9)
    assert both[0].dtype == torch.float32
    assert both[0].tolist() == pytest.approx([-5e4 - 0.9 * 4e4])
    x[0, 8] = -math.inf  # beyond the shorter one
    assert losses.length_desensitized_log_probs(x, x, ones, few, ld_alpha=0.5)[0] == -math.inf
    assert losses.length_desensitized_log_probs(x, x, ones, few, ld_alpha=0.0)[0].isfinite()


def test_length_desensitized_bad_input():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for ld_alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="ld_alpha"):
            losses.length_desensitized_log_probs(x, x, mask, mask, ld_alpha=ld_alpha)
    with pytest.raises(ValueError, match="for each chosen"):
        losses.length_desensitized_log_probs(x, x[:1], mask, mask[:1], ld_alpha=0.5)
    with pytest.raises(ValueError, match="mask"):
        losses.length_desensitized_log_probs(x, x, mask, mask[:1], ld_alpha=0.5)


def test_wpo_weights(device):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, device=device)
    ids = torch.randint(0, 7, (2, 4), device=device)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]], device=device)
    stats = token_stats(logits, ids, extra=("log_sum_sq_probs",))
    leaf = stats.log_prob.masked_fill(mask == 0, math.nan).requires_grad_()
    found = losses.wpo_weights(leaf, stats.log_sum_sq_probs, mask)
    p = torch.softmax(logits.double(), -1).tolist()
    total = 0.0
    for i in (0, 1, 3):
        total += math.log(p[0][i][ids[0, i]]) - math.log(sum(q * q for q in p[0][i]))
    assert_close(found, torch.tensor([math.exp(total / 3), 1.0]), 1e-5)
    assert not found.requires_grad
    with pytest.raises(ValueError):
        losses.wpo_weights(leaf, stats.log_sum_sq_probs[:1], mask)
