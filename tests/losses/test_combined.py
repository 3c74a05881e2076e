"""Combined losses, learned weights and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import losses


def test_combined():
    x = torch.tensor(2.0, requires_grad=True)

    def never():
        raise AssertionError("a term of weight 0 is not computed")

    combined = losses.combined_loss(
        {"a": x * 3, "b": lambda: x * x, "c": never}, {"a": 1.0, "b": 0.5, "c": 0.0}
    )
    assert combined.total == 8
    assert {name: float(t) for name, t in combined.terms.items()} == {"a": 6.0, "b": 4.0}
    assert not any(t.requires_grad for t in combined.terms.values())
    combined.total.backward()
    assert x.grad == 5
    for terms, weights in (({"a": x}, {"b": 1.0}), ({"a": x}, {"a": math.nan}),
                           ({"a": x}, {"a": 0.0}), ({"a": x.expand(2)}, {"a": 1.0})):  # fmt: skip
        with pytest.raises(ValueError):
            losses.combined_loss(terms, weights)


def test_what_a_term_of_weight_0_holds_counts_for_nothing():
    x = torch.tensor(2.0, requires_grad=True)
    combined = losses.combined_loss({"a": x, "b": x * math.nan}, {"a": 2.0, "b": 0.0})
    combined.total.backward()
    assert combined.total == 4
    assert x.grad == 2
    assert list(combined.terms) == ["a"]


def test_weights_that_are_tensors_are_not_looked_at():
    x = torch.tensor(2.0, requires_grad=True)
    weight = torch.tensor(0.0, requires_grad=True)
    combined = losses.combined_loss({"a": x, "b": lambda: x * x}, {"a": 1.0, "b": weight})
    assert combined.total == 2
    assert combined.terms["b"] == 4
    assert torch.autograd.grad(combined.total, weight)[0] == 4
    with pytest.raises(ValueError, match="must be 0-d"):
        losses.combined_loss({"a": x}, {"a": torch.ones(2)})


def test_terms_of_16_bits_are_added_in_32():
    large = torch.tensor(60000.0, dtype=torch.float16, requires_grad=True)
    combined = losses.combined_loss({"a": large, "b": large}, {"a": 1.0, "b": 1.0})
    assert combined.total == 120_000
    assert torch.autograd.grad(combined.total, large)[0] == 2
    module = losses.UncertaintyWeights(["a", "b"])
    assert module({"a": large, "b": large}).total == 120_000


def test_a_term_that_is_no_tensor():
    with pytest.raises(TypeError, match="'a' must be a tensor, got float"):
        losses.combined_loss({"a": lambda: 1.0}, {"a": 1.0})


def test_uncertainty_weights():
    module = losses.UncertaintyWeights(["a", "b"])
    terms = {"b": torch.tensor(3.0), "a": torch.tensor(1.0)}
    assert module(terms).total == 4
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2000):
        optimiser.zero_grad()
        module(terms).total.backward()
        optimiser.step()
    # e^{-s} L + s / 2 is least at s = log 2L.
    assert_close(module.log_variances.detach(), torch.tensor([2.0, 6.0]).log(), 1e-3)
    with pytest.raises(ValueError, match="expected the terms"):
        module({"a": terms["a"]})
    with pytest.raises(ValueError, match="must be a 0-d loss"):
        module({"a": terms["a"], "b": torch.ones(2)})
    with pytest.raises(ValueError, match="different names"):
        losses.UncertaintyWeights(["a", "a"])


def test_linear_schedule():
    values = [losses.linear_schedule(step, 10, 20, 1.0, 0.0) for step in (0, 10, 15, 20, 99)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError):
        losses.linear_schedule(0, 2, 1, 0.0, 1.0)
