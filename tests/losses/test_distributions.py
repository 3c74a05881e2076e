"""Entropies and divergences of probabilities: worked values, scipy, and what is no distribution."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses


def test_worked_values():
    fair, skewed = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    assert losses.entropy(fair, base=2) == 1
    assert float(losses.entropy(skewed, base=2)) == pytest.approx(0.469, abs=5e-4)
    assert float(losses.cross_entropy_between(skewed, fair, base=2)) == pytest.approx(1)
    assert float(losses.kl_divergence(skewed, fair, base=2)) == pytest.approx(0.531, abs=5e-4)
    assert losses.kl_divergence(skewed, fair) != losses.kl_divergence(fair, skewed)
    one = torch.tensor([1.0, 0.0])
    assert losses.entropy(one) == 0
    assert losses.kl_divergence(one, torch.tensor([0.0, 1.0])) == math.inf
    assert losses.kl_divergence(one, one) == 0
    assert losses.cross_entropy_between(one, torch.tensor([0.5, 0.5]), base=2) == 1


def test_distributions_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    p, q = torch.softmax(torch.randn(2, 5, 30).double(), -1)
    for base in (2, 10, math.e):
        assert_close(
            losses.entropy(p, base), torch.tensor(scipy.entropy(p, base=base, axis=1)), 1e-12
        )
        expected = torch.tensor(scipy.entropy(p, q, base=base, axis=1))
        assert_close(losses.kl_divergence(p, q, base), expected, 1e-12)


def test_distributions_with_zeros_and_nan():
    """0 log 0 = 0 with finite gradients, and what is nan stays nan."""
    zeros = torch.tensor([[0.0, 0.25, 0.75]]).double()
    other = torch.tensor([[0.0, 0.5, 0.5]]).double()
    functions = (
        losses.kl_divergence, losses.cross_entropy_between, lambda p, q: losses.entropy(p) + 0 * q
    )  # fmt: skip
    for function in functions:
        p, q = zeros.clone().requires_grad_(), other.clone().requires_grad_()
        value = function(p, q).sum()
        assert value.isfinite()
        for grad in torch.autograd.grad(value, (p, q)):
            assert grad.isfinite().all()
        for where in ((math.nan, 0.25, 0.75), (0.0, math.nan, 0.75)):
            bad = torch.tensor([where]).double()
            assert function(bad, other).isnan().all()
            if function is not functions[2]:
                assert function(zeros, bad).isnan().all()
    x = torch.tensor([0.0, -800.0, 1.0]).double().requires_grad_()
    (grad,) = torch.autograd.grad(losses.entropy(torch.softmax(x, -1)), x)
    two = x.detach()[::2].clone().requires_grad_()
    (want,) = torch.autograd.grad(losses.entropy(torch.softmax(two, -1)), two)
    assert_close(grad[::2], want, 1e-12)
    assert grad[1] == 0


rows = st.lists(st.floats(-30, 30), min_size=2, max_size=20)


@SETTINGS
@hypothesis.given(rows, st.randoms(use_true_random=False))
def test_divergences_are_not_negative_and_zero_of_themselves(x, random):
    p = torch.softmax(torch.tensor(x).double(), -1)
    shuffled = list(x)
    random.shuffle(shuffled)
    q = torch.softmax(torch.tensor(shuffled).double(), -1)
    assert losses.kl_divergence(p, p) == 0
    assert losses.kl_divergence(p, q) >= -1e-12
    difference = losses.cross_entropy_between(p, q) - losses.entropy(p)
    assert_close(losses.kl_divergence(p, q), difference, 1e-9)
    assert 0 <= losses.entropy(p) <= math.log(len(x)) + 1e-9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: losses.entropy(p, base=1.0), "base must be"),
        (lambda p: losses.entropy(p, base=-2), "base must be"),
        (lambda p: losses.entropy(p * 2, check=True), "sum to 1"),
        (lambda p: losses.entropy(p - 1, check=True), "negative probability"),
        (lambda p: losses.kl_divergence(p, p * math.nan, check=True), "q holds"),
        (lambda p: losses.kl_divergence(p, torch.ones(3) / 3), "number of outcomes"),
        (lambda p: losses.check_probabilities(p * 2, "target"), "target must sum to 1"),
        (lambda p: losses.check_probabilities(p - 0.5, "target"), "target holds a negative"),
    ],
)
def test_what_is_no_distribution_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.tensor([0.25, 0.75]))


def test_roundings_are_no_mistake():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        p = torch.softmax(torch.randn(4, 5000), -1).to(dtype)
        losses.check_probabilities(p)
    losses.check_probabilities(p[:0])
