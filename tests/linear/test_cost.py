"""The model of a GPU's time: what was measured on one H200, and what the plans make of it."""

from __future__ import annotations

import pytest
import torch

from llmloss_ext import plan
from llmloss_ext.chips import CHIPS, H200
from llmloss_ext.linear.cost import chip_named, frontier, predict

SIZE = (8192, 4096, 128_256, torch.bfloat16, "cuda")
WARM = 1.035
"""Parts measured with pauses are too fast for calls in a row, by 0 to 10 %: the middle of that."""


def products(tokens, weight_grad_dtype=None):
    """Milliseconds of products of 8192 tokens: of the logits, and of the weight's gradient."""
    both = [
        predict(
            plan(*SIZE, chunk_tokens=tokens, weight_grad_dtype=weight_grad_dtype, needs_grad=needs),
            H200,
        )
        for needs in ((False, False), (False, True))
    ]
    passes = 8192 * 128_256 * 2 / (H200.copy_bandwidth * 0.75)
    launches = 8192 / tokens * 16e-6
    forward = both[0].seconds - passes - launches
    rounding = 128_256 * 4096 * 6 / H200.copy_bandwidth
    with_sums = tokens < 8192 and weight_grad_dtype is None
    weight = both[1].seconds - 2 * passes - launches - forward - with_sums * rounding
    return forward * 1e3, weight * 1e3


@pytest.mark.parametrize(
    ("tokens", "logits", "hidden", "sums_32", "sums_16"),
    [
        (1024, 12.87, 11.90, 18.55, 13.48),
        (2048, None, 11.89, 15.09, 13.03),  # logits 10.95: faster than of more tokens or fewer
        (4096, 11.87, 11.97, 13.25, 12.78),
        (8192, 12.14, 11.94, None, 12.27),
    ],
)
def test_products_measured_on_an_h200(tokens, logits, hidden, sums_32, sums_16):
    forward, in_16 = products(tokens, torch.bfloat16)
    _, in_32 = products(tokens)
    # Measured were products that add in every chunk; the first one's sums are now written.
    in_32 += 128_256 * 4096 * 4 * 0.8 / H200.copy_bandwidth * 1e3
    for predicted, measured in (
        (forward, logits), (forward, hidden), (in_32, sums_32), (in_16, sums_16),
    ):  # fmt: skip
        assert measured is None or predicted == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    ("tokens", "dtype", "milliseconds"),
    [(1024, None, 44.7), (2048, None, 41.95), (4096, None, 40.72), (1024, torch.bfloat16, 42.5),
     (4096, torch.bfloat16, 39.83), (8192, torch.bfloat16, 41.06)],
)  # fmt: skip
def test_calls_measured_on_an_h200(tokens, dtype, milliseconds):
    seconds = predict(plan(*SIZE, chunk_tokens=tokens, weight_grad_dtype=dtype), H200).seconds
    if dtype is None:  # measured when sums began as zeros: written once, and read once more
        seconds += 128_256 * 4096 * 4 * 1.8 / H200.copy_bandwidth
    assert seconds * WARM == pytest.approx(milliseconds / 1e3, rel=0.06)


@pytest.mark.parametrize("gpu", [name.lower() for name in CHIPS])
@pytest.mark.parametrize("tokens", [512, 8192, 65_536])
@pytest.mark.parametrize("features", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("vocab_size", [32_000, 128_256])
def test_no_plan_of_as_much_memory_is_faster(gpu, tokens, features, vocab_size):
    """The plan knows no GPU, but every GPU would choose it."""
    size = (tokens, features, vocab_size, torch.bfloat16)
    chosen = plan(*size, "cuda")
    for other in frontier(*size):
        if other.peak_bytes <= chosen.peak_bytes:
            assert predict(chosen, gpu).ratio <= predict(other, gpu).ratio + 0.002


@pytest.mark.parametrize(
    ("tokens", "features", "h100", "h200"),
    [(8192, 4096, 1.06, 1.05), (8192, 8192, 1.03, 1.03), (65_536, 8192, 1.07, 1.05),
     (65_536, 4096, 1.13, 1.10), (65_536, 2048, 1.19, 1.14), (65_536, 1024, 1.29, 1.21)],
)  # fmt: skip
def test_time_against_the_products(tokens, features, h100, h200):
    """At D = 1024 the loss's own two passes are a sixth of the products."""
    planned = plan(tokens, features, 128_256, torch.bfloat16, "cuda")
    for gpu, most in (("h100", h100), ("h200", h200)):
        assert most - 0.025 < predict(planned, gpu).ratio <= most


def test_calls_without_gradients_or_with_products_made_anew():
    one = predict(plan(*SIZE, needs_grad=(False, False)), "h100")
    three, four = (predict(plan(*SIZE, recompute=again), "h100") for again in (False, True))
    assert one.products_seconds * 3 == pytest.approx(three.products_seconds, rel=0.02)
    assert one.products_seconds * 4 == pytest.approx(four.products_seconds, rel=0.02)
    assert one.seconds < three.seconds < four.seconds
    assert predict(plan(0, *SIZE[1:]), "h100").seconds >= 0


def test_float32_logits_cost_their_bytes_and_a_rounding():
    narrow, wide = (plan(*SIZE, chunk_tokens=2048, logits_dtype=x) for x in (None, torch.float32))
    logits = 8192 * 128_256 * 2
    # Two more bytes a logit in each of two passes; four read and two written to round.
    more = 2 * logits / (H200.copy_bandwidth * 0.75) + 3 * logits / H200.copy_bandwidth
    assert predict(wide, H200).seconds - predict(narrow, H200).seconds == pytest.approx(more)
    values = [plan(*SIZE, needs_grad=(False, False), chunk_tokens=2048, logits_dtype=x)
              for x in (None, torch.float32)]  # fmt: skip
    no_gradient = predict(values[1], H200).seconds - predict(values[0], H200).seconds
    assert no_gradient == pytest.approx(logits / (H200.copy_bandwidth * 0.75))


def test_names():
    assert chip_named("H200") is H200
    with pytest.raises(ValueError, match="gpu must be one of h100, h200"):
        chip_named("abacus")
    with pytest.raises(ValueError, match="16 bits, not of torch.float32"):
        predict(plan(8, 8, 8))


@pytest.mark.parametrize(
    ("device", "expected"),
    [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Another", "H100")],
)
def test_this_machines_gpu(monkeypatch, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert chip_named().name == expected
