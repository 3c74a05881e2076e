"""The same bits for any number of threads, any batch around a row, and any layout of the rows."""

from __future__ import annotations

import pytest
import torch
from helpers import FLOATS

from llmloss_ext import cross_entropy, token_stats


def run(input, target):
    leaf = input.clone().requires_grad_()
    rows = cross_entropy(leaf, target, label_smoothing=0.1, z_loss=0.01, reduction="none")
    stats = token_stats(leaf, target, softcap=9.0, with_rank=True)
    (grad,) = torch.autograd.grad(rows.sum() + stats.entropy.sum(), leaf)
    return [rows.detach(), *(s.detach() for s in stats), grad]


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads(dtype):
    input, target = torch.randn(37, 5003).to(dtype), torch.randint(0, 5003, (37,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(input, target))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_around_a_row(device, dtype):
    input = torch.randn(16, 1013, device=device).to(dtype)
    target = torch.randint(0, 1013, (16,), device=device)
    whole = run(input, target)
    for rows in (slice(3, 4), slice(3, 11), slice(3, 16, 2)):
        part = run(input[rows], target[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))


def test_ignored_rows_change_nothing(device):
    input = torch.randn(8, 1013, device=device)
    target = torch.randint(0, 1013, (8,), device=device)
    padded = torch.cat([input, torch.full((5, 1013), torch.nan, device=device)])
    ignored = torch.cat([target, torch.full((5,), -100, device=device)])
    for reduction in ("mean", "sum"):
        one, other = input.clone().requires_grad_(), padded.clone().requires_grad_()
        a = cross_entropy(one, target, reduction=reduction)
        b = cross_entropy(other, ignored, reduction=reduction)
        assert torch.equal(a, b)
        a.backward()
        b.backward()
        assert torch.equal(one.grad, other.grad[:8])
        assert (other.grad[8:] == 0).all()


def test_repeats_and_alignment(device):
    whole = torch.randn(4, 1020, device=device)
    target = torch.randint(0, 1013, (4,), device=device)
    first = run(whole[:, 1:1014].contiguous(), target)
    for start in range(1, 2):
        again = run(whole[:, start : start + 1013], target)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
