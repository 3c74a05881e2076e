"""inplace=True: the gradient lies over the logits, and autograd notices everything."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, GRADIENT, assert_close

from llmloss_ext import cross_entropy


def make(device, dtype=torch.float32, rows=6, columns=33):
    leaf = torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(0, columns, (rows,), device=device)
    target[1] = -100
    return leaf, target


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_lies_over_the_logits(device, dtype, reduction):
    leaf, target = make(device, dtype)
    logits = leaf * 1
    before = logits.detach().clone()
    loss = cross_entropy(logits, target, reduction=reduction, inplace=True)
    # float16 and no reduction: the coefficients are known in backward only.
    written = reduction != "none" and dtype != torch.float16
    assert torch.equal(logits.detach(), before) != written
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss.sum().backward()
    assert seen == [logits.data_ptr()]
    assert torch.equal(leaf.grad, logits.detach())
    double = before.double().requires_grad_()
    F.cross_entropy(double, target, reduction=reduction).sum().backward()
    assert_close(leaf.grad, double.grad, GRADIENT[dtype])


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0, 0.0])
def test_upstream_factor(device, factor):
    leaf, target = make(device)
    (cross_entropy(leaf * 1, target, inplace=True) * factor).backward()
    other = leaf.detach().clone().requires_grad_()
    (F.cross_entropy(other, target) * factor).backward()
    assert_close(leaf.grad, other.grad, 2e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_upstream_factor_of_0(device, dtype, reduction):
    """It leaves nothing of a nan, as where the gradient is written in backward."""
    leaf, target = make(device, dtype)
    logits = leaf.detach().clone()
    logits[0] = torch.nan
    logits.requires_grad_()
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    for factor in (torch.zeros((), device=device), 0.0):
        loss = cross_entropy(
            logits * 1, target, reduction=reduction, logit_scale=scale, inplace=True
        )
        assert loss.isnan()
        assert not any(g.any() for g in torch.autograd.grad(loss * factor, (logits, scale)))


def test_a_loss_scale_goes_in_before_the_rounding(device):
    """float16: 1 / N alone is subnormal; with the scale of mixed precision it is not."""
    rows, scale = 70_000, 65536.0
    leaf = (torch.randn(rows, 3, device=device) * 4).half().requires_grad_()
    target = torch.randint(0, 3, (rows,), device=device)
    (cross_entropy(leaf * 1, target, inplace=True) * scale).backward()
    double = leaf.detach().double().requires_grad_()
    (F.cross_entropy(double, target) * scale).backward()
    error = (leaf.grad.double() - double.grad).abs() / double.grad.abs().clamp_min(1e-4)
    # With what 1 - p of a sure token loses to the rounding of a sum in float32: 1.2e-3 on CUDA.
    assert error.max() < 2e-3


def test_without_a_gradient_nothing_is_written(device):
    logits, target = torch.randn(4, 9, device=device), torch.zeros(4, device=device).long()
    before = logits.clone()
    expected = F.cross_entropy(logits, target)
    assert_close(cross_entropy(logits, target, inplace=True), expected, 2e-6)
    leaf = logits.requires_grad_()
    with torch.no_grad():
        cross_entropy(leaf, target, inplace=True)
    assert torch.equal(logits.detach(), before)


def test_a_leaf_is_refused(device):
    leaf, target = make(device)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        cross_entropy(leaf, target, inplace=True)
    assert torch.equal(leaf.detach(), before)


def test_rows_that_overlap_are_refused(device):
    base = torch.randn(1, 9, device=device, requires_grad=True) * 1
    target = torch.zeros(4, dtype=torch.long, device=device)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        cross_entropy(base.expand(4, 9), target, inplace=True)
    windows = (torch.randn(20, device=device, requires_grad=True) * 1).unfold(0, 9, 3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        cross_entropy(windows, target, inplace=True)


def test_logits_that_cannot_be_written_as_rows_are_refused(device):
    logits = torch.randn(2, 5, 3, device=device, requires_grad=True) * 1
    target = torch.zeros(2, 3, dtype=torch.long, device=device)
    with pytest.raises(RuntimeError, match="classes are adjacent"):
        cross_entropy(logits, target, inplace=True)


def test_autograd_notices_logits_needed_elsewhere(device):
    leaf, target = make(device)
    logits = leaf * 1
    other = logits.square().sum()  # saves the logits
    loss = cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_autograd_notices_a_second_writer(device):
    leaf, target = make(device)
    logits = leaf * 1
    loss = cross_entropy(logits, target, inplace=True)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    again = leaf * 1
    first = cross_entropy(again, target, inplace=True)
    cross_entropy(again, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_is_refused(device, reduction):
    leaf, target = make(device)
    loss = cross_entropy(leaf * 1, target, reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert torch.equal(leaf.grad, first)


def test_second_order_and_transforms_are_refused(device):
    leaf, target = make(device)
    loss = cross_entropy(leaf * 1, target, inplace=True)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: cross_entropy(x * 1, target, inplace=True))(leaf.detach())
    probabilities = torch.softmax(torch.randn(6, 33, device=device), -1).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for probability targets"):
        cross_entropy(leaf * 1, probabilities, inplace=True)


def test_probability_targets(device):
    leaf, _ = make(device)
    target = torch.softmax(torch.randn(6, 33, device=device), -1)
    cross_entropy(leaf * 1, target, label_smoothing=0.1, inplace=True).backward()
    other = leaf.detach().clone().requires_grad_()
    F.cross_entropy(other, target, label_smoothing=0.1).backward()
    assert_close(leaf.grad, other.grad, 2e-6)


def test_a_bad_target_writes_nothing():
    leaf, target = make(torch.device("cpu"))
    logits = leaf * 1
    before, version = logits.detach().clone(), logits._version
    target[5] = 33
    with pytest.raises(IndexError, match="Target 33 at position 5"):
        cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits.detach(), before)
    assert logits._version == version


def test_extra_memory_is_of_the_order_of_the_rows():
    """Loss and backward of 256 MiB of logits raise the process's peak by less than 4 MiB."""
    leaf = torch.zeros(1, requires_grad=True)
    logits = torch.empty(512, 131_072).normal_() + leaf
    target = torch.randint(0, 131_072, (512,))
    gc.collect()
    cross_entropy(
        torch.randn(2, 9, requires_grad=True) * 1, target[:2] % 9, inplace=True
    ).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if _resident() < before - 4096:  # an earlier peak would hide this one
        _reset_peak()
        before = _resident()
    loss = cross_entropy(logits, target, inplace=True)
    torch.autograd.grad(loss, logits)
    assert _peak() - before < 4096, "KiB"


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def _resident() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
