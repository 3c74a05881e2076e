"""Calibration against a computation in float64, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from llmloss_ext.metrics import ReliabilityBins, expected_calibration_error


def tokens(count: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    confidence = torch.rand(count, generator=generator).to(dtype)
    return confidence, torch.rand(count, generator=generator) < confidence**2


def by_hand(confidence, correct, bins) -> float:
    """The definition of Guo et al. 2017: bin m of M holds ((m - 1) / M, m / M]."""
    total, pairs = 0.0, list(zip(confidence.tolist(), correct.tolist(), strict=True))
    for m in range(1, bins + 1):
        low, high = (m - 1) / bins, m / bins
        held = [(p, c) for p, c in pairs if low < p <= high or (m == 1 and p == 0)]
        if held:
            accuracy = math.fsum(c for _, c in held) / len(held)
            mean = math.fsum(p for p, _ in held) / len(held)
            total += len(held) / len(pairs) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bins", [1, 2, 8, 15])
def test_the_definition(bins, dtype):
    confidence, correct = tokens(300, dtype)
    found = expected_calibration_error(confidence, correct, bins)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(by_hand(confidence, correct, bins), rel=1e-12)


def test_the_edges_of_the_bins():
    bins = ReliabilityBins(4)
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.2500001])
    bins.update(edges, torch.ones(6, dtype=torch.bool))
    assert bins.compute().tokens.tolist() == [2, 2, 1, 1]


def test_batches_add_up_in_any_order_and_shape():
    confidence, correct = tokens(240)
    whole = expected_calibration_error(confidence, correct)
    one, other = ReliabilityBins(), ReliabilityBins()
    one.update(confidence[120:].view(4, 30), correct[120:].view(4, 30))
    other.update(confidence[:50], correct[:50])
    other.update(confidence[50:120], correct[50:120])
    one.merge(other)
    torch.testing.assert_close(one.expected_calibration_error(), whole, rtol=1e-12, atol=0)
    assert one.compute().tokens.sum() == 240


def test_masked_tokens_may_hold_anything():
    confidence, correct = tokens(100)
    mask = torch.arange(100) % 3 != 0
    spoiled = torch.where(mask, confidence, math.nan)
    found = expected_calibration_error(spoiled, correct, mask=mask)
    expected = expected_calibration_error(confidence[mask], correct[mask])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert expected_calibration_error(spoiled, correct).isnan()


def test_a_calibrated_and_a_sure_model():
    """Right as often as it says: 0. Sure of what is right half of the time: 1/2."""
    right = torch.arange(1000) % 10 < 7
    assert expected_calibration_error(torch.full((1000,), 0.7), right).item() < 1e-6
    sure = expected_calibration_error(torch.ones(1000), torch.arange(1000) % 2 == 0)
    assert sure.item() == 0.5


def test_the_state_goes_through_plain_values():
    bins = ReliabilityBins(5)
    bins.update(*tokens(77))
    copy = ReliabilityBins(5)
    copy.load_state_dict(bins.state_dict())
    assert torch.equal(copy.expected_calibration_error(), bins.expected_calibration_error())
    for state in ({}, {"tokens": [1.0]}, ReliabilityBins(4).state_dict()):
        with pytest.raises(ValueError):
            copy.load_state_dict(state)


def test_without_tokens():
    bins = ReliabilityBins(3)
    assert bins.expected_calibration_error().isnan()
    assert bins.compute().confidence.isnan().all()


def test_errors():
    with pytest.raises(ValueError, match="bins must be at least 1"):
        ReliabilityBins(0)
    bins = ReliabilityBins()
    with pytest.raises(ValueError, match="correct must have shape"):
        bins.update(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="mask must have shape"):
        bins.update(torch.ones(3), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="expected 15 bins, got 3"):
        bins.merge(ReliabilityBins(3))
