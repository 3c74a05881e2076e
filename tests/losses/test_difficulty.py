"""Weights by difficulty, one token after the other; and their way into a cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import cross_entropy, linear_cross_entropy, losses

LOSSES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0, 3.0]), min_size=6, max_size=6)
FLAGS = st.lists(st.booleans(), min_size=6, max_size=6)


@SETTINGS
@hypothesis.given(LOSSES, FLAGS, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_weights_are_proportional(values, flags, power):
    each, mask = torch.tensor(values).view(2, 3), torch.tensor(flags).view(2, 3)
    spoilt = torch.where(mask, each, float("nan"))
    found = losses.difficulty_weights(spoilt, mask, power=power)
    chosen = [v for v, f in zip(values, flags, strict=True) if f]
    powers = [v**power for v in chosen]
    mean = sum(powers) / max(len(powers), 1)
    wanted = [p / mean if mean else 1.0 for p in powers]
    assert_close(found[mask], torch.tensor(wanted), 1e-6)
    assert (found[~mask] == 0).all()


def test_weights_of_extreme_losses():
    for scale in (1e-30, 1e30):
        each = torch.tensor([1.0, 2.0, 3.0]) * scale
        assert_close(losses.difficulty_weights(each, power=2.0),
                     torch.tensor([3.0, 12.0, 27.0]) / 14, 1e-6)  # fmt: skip
    half = torch.tensor([300.0, 200.0], dtype=torch.float16)
    assert_close(losses.difficulty_weights(half, power=3.0), torch.tensor([54.0, 16.0]) / 35, 1e-6)
    assert losses.difficulty_weights(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 2.0]
    assert losses.difficulty_weights(torch.zeros(0)).shape == (0,)


def by_hand(scores, flags, fraction):
    """The places of the largest scores, the first of equal ones."""
    places = [i for i, f in enumerate(flags) if f]
    number = math.ceil(round(len(places) * fraction, 6))
    return sorted(sorted(places, key=lambda i: (-scores[i], i))[:number])


@SETTINGS
@hypothesis.given(LOSSES, LOSSES, FLAGS, st.sampled_from([0.1, 0.5, 0.6, 0.7, 1.0]))
def test_the_largest_excess_losses_are_selected(values, others, flags, fraction):
    each, reference = (torch.tensor(v).view(2, 3) for v in (values, others))
    mask = torch.tensor(flags).view(2, 3)
    each[~mask] = float("nan")
    reference = torch.where(mask, reference, float("-inf"))
    found = losses.select_difficult_tokens(
        each, mask, reference_losses=reference, fraction=fraction
    )
    excess = [a - b for a, b in zip(values, others, strict=True)]
    assert found.flatten().nonzero().flatten().tolist() == by_hand(excess, flags, fraction)
    assert set(found.flatten().tolist()) <= {0.0, 1.0}
    rows = losses.select_difficult_tokens(each, mask, fraction=fraction, by_sequence=True)
    for b in range(2):
        part = slice(3 * b, 3 * b + 3)
        wanted = by_hand(values[part], flags[part], fraction)
        assert rows[b].nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("tokens", [10, 30, 70, 1000])
def test_the_share_is_not_rounded_up_by_a_rounding_error(tokens):
    for percent in range(10, 101, 10):
        found = losses.select_difficult_tokens(torch.rand(tokens), fraction=percent / 100)
        assert found.sum() == tokens * percent // 100


def test_a_nan_is_seen():
    each = torch.tensor([1.0, float("nan"), 3.0])
    assert losses.select_difficult_tokens(each, fraction=0.3).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_in_a_cross_entropy(shift):
    """Losses stand where labels are predicted; weights are given with the labels."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 4), torch.randn(11, 4)
    ids = torch.randint(0, 11, (2, 7))
    ids[0, 4] = -100
    each = linear_cross_entropy(hidden, weight, ids, reduction="none", shift=shift)
    predicts = F.pad(ids[:, shift:], (0, shift), value=-100) != -100
    chosen = losses.select_difficult_tokens(each, predicts, fraction=0.5, shift=shift)
    found = linear_cross_entropy(hidden, weight, ids, token_weight=chosen, shift=shift)
    count = math.ceil(int(predicts.sum()) / 2)
    assert_close(found, each[predicts].topk(count).values.mean(), 1e-6)
    weights = losses.difficulty_weights(each, predicts, shift=shift)
    found = linear_cross_entropy(hidden, weight, ids, token_weight=weights, shift=shift)
    assert_close(found, each[predicts].square().sum() / each[predicts].sum(), 1e-6)
    if not shift:
        logits = hidden @ weight.t()
        same = cross_entropy(logits, ids, token_weight=weights, class_dim=-1)
        assert_close(same, found, 1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("by_sequence", [True, False])
def test_of_no_token(shape, by_sequence):
    found = losses.select_difficult_tokens(torch.zeros(shape), by_sequence=by_sequence)
    assert found.shape == shape


def test_they_have_no_gradient():
    each = torch.rand(4, requires_grad=True)
    assert not losses.difficulty_weights(each).requires_grad
    assert not losses.select_difficult_tokens(each, reference_losses=each * 2).requires_grad


def test_what_does_not_fit():
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: losses.difficulty_weights(x, power=-1.0), "power must be"),
        (lambda: losses.difficulty_weights(x, x[0]), "mask must have the shape"),
        (lambda: losses.difficulty_weights(x, shift=-1), "shift must be"),
        (lambda: losses.select_difficult_tokens(x, fraction=0.0), "fraction must be"),
        (lambda: losses.select_difficult_tokens(x, reference_losses=x[0]), "reference_losses"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
