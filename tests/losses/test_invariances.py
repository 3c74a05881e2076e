"""What must change nothing: an offset, an order of the vocabulary, padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses, token_stats


@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.floats(-1e3, 1e3))
def test_a_common_offset_changes_nothing(seed, offset):
    torch.manual_seed(seed)
    logits, ids = torch.randn(2, 5, 17).double(), torch.randint(0, 17, (2, 5))
    expected = losses.causal_lm_loss(logits, ids)
    assert_close(losses.causal_lm_loss(logits + offset, ids), expected, 1e-9)


@SETTINGS
@hypothesis.given(st.integers(0, 10_000))
def test_a_permuted_vocabulary_changes_nothing(seed):
    torch.manual_seed(seed)
    logits, target = torch.randn(9, 23).double(), torch.randint(0, 23, (9,))
    order = torch.randperm(23)
    moved = torch.empty(23, dtype=torch.long).scatter_(0, order, torch.arange(23))
    one = token_stats(logits, target, with_rank=True)
    other = token_stats(logits[:, order], moved[target], with_rank=True)
    for name in ("log_prob", "lse", "entropy", "mean_log_prob", "rank"):
        assert_close(getattr(one, name), getattr(other, name), 1e-12)


PADDED = {
    "plain": lambda x, y: losses.LanguageModelLoss(19)(x, y),
    "statistics": lambda x, y: losses.LanguageModelLoss(19).compute_loss_with_stats(x, y).loss,
    "penalty": lambda x, y: losses.LanguageModelLoss(19, confidence_penalty=0.1)(x, y),
    "confidence": lambda x, y: losses.confidence_penalty_loss(x, y, ignore_index=0),
    "distillation": lambda x, y: losses.distillation_loss(
        x, x.detach().flip(-1), target=y, ignore_index=0
    ),
    "mlm": lambda x, y: losses.mlm_loss(x, y, ignore_index=0),
}


@pytest.mark.parametrize("name", PADDED)
@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.integers(1, 2000), st.integers(1, 1500))
def test_padding_changes_no_bit(name, seed, length, extra):
    torch.manual_seed(seed)
    logits, ids = torch.randn(1, length, 19), torch.randint(1, 19, (1, length))
    leaves = [logits.requires_grad_(), F.pad(logits.detach(), (0, 0, 0, extra), value=9.0)]
    leaves[1].requires_grad_()
    results = []
    for leaf, tokens in zip(leaves, (ids, F.pad(ids, (0, extra))), strict=True):
        loss = PADDED[name](leaf, tokens)
        results.append((loss.detach().nan_to_num(), *torch.autograd.grad(loss, leaf)))
    assert torch.equal(results[0][0], results[1][0])
    if length > 1:  # of one token, none has a target
        assert torch.equal(results[0][1], results[1][1][:, :length])
        assert (results[1][1][:, length:] == 0).all()
