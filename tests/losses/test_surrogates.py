"""The seam: what parts of the tokens add up to is the loss of all, and its metrics."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses
from llmloss_ext.losses.policy_options import LOSS_TYPES, PolicyOptions
from llmloss_ext.losses.surrogates import contribution, normalizing_weights, prepare
from losses.policy_definition import Problem


def options_of(loss_type):
    length = {"max_completion_length": 9} if loss_type == "dr_grpo" else {}
    return {"loss_type": loss_type, "beta": 0.2, "entropy_coef": 0.1, **length}


@pytest.mark.parametrize("loss_type", [kind for kind in LOSS_TYPES if kind != "vespo"])
@hypothesis.settings(SETTINGS, max_examples=10)
@hypothesis.given(st.integers(0, 10_000), st.sets(st.integers(1, 29), max_size=6), st.booleans())
def test_chunks_of_tokens_add_up(loss_type, seed, cuts, with_weights):
    p = Problem(seed)
    how = options_of(loss_type)
    tensors = {"reference_log_probs": p.reference}
    if with_weights:
        tensors |= {"entropy_mask": p.entropy_mask, "importance_sampling_ratio": p.rollout}
    leaves = p.log_probs.requires_grad_(), p.entropy.requires_grad_()
    whole = losses.grpo_loss(
        p.log_probs, p.old, p.advantages, p.mask, entropy=p.entropy, **tensors, **how
    )
    wanted = torch.autograd.grad(whole.loss, leaves)
    options = PolicyOptions.of(**how)
    assert not options.by_sequences
    tokens = prepare(
        p.mask, options, torch.float64, advantages=p.advantages, old_log_probs=p.old, **tensors
    ).flat()
    flat = [x.detach().reshape(-1).requires_grad_() for x in leaves]
    parts = []
    for start, end in itertools.pairwise([0, *sorted(cuts), 30]):
        at = slice(start, end)
        part = contribution(flat[0][at], flat[1][at], tokens.chunk(at), options)
        part.loss.backward()
        parts.append(part)
    assert_close(sum(part.loss.detach() for part in parts), whole.loss.detach(), 1e-12)
    for one, other in zip(flat, wanted, strict=True):
        assert_close(one.grad, other.reshape(-1), 1e-12)
    for name, value in whole.metrics._asdict().items():
        assert_close(sum(getattr(part.metrics, name) for part in parts), value, 1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_are_known_from_the_mask_alone(loss_type):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    options = PolicyOptions.of(**options_of(loss_type))
    found = normalizing_weights(mask, options, None, torch.float64)
    rows = {
        "grpo": [1 / 6, 0.0, 1 / 12], "sapo": [1 / 6, 0.0, 1 / 12], "luspo": [1 / 3, 0.0, 1 / 3],
        "dr_grpo": [1 / 27, 0.0, 1 / 27],
    }.get(loss_type, [1 / 6, 0.0, 1 / 6])  # fmt: skip
    want = torch.tensor(rows, dtype=torch.float64)[:, None] * mask
    assert_close(found, want, 1e-15)


def test_which_need_whole_sequences():
    assert PolicyOptions.of(loss_type="vespo").by_sequences
    assert PolicyOptions.of(importance_sampling_level="sequence").by_sequences
    assert PolicyOptions.of(importance_sampling_level="sequence_token").by_sequences
    assert PolicyOptions.of(off_policy_mask_threshold=0.5).by_sequences
    assert not PolicyOptions.of(loss_type="sapo", beta=0.1).by_sequences
