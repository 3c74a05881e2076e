"""What bit the peers: one test for each defect that concerns losses from logits or hidden states.

The names in brackets are the reports (project and issue). Where a whole file tests the point, it is
named here instead: upstream gradients that are not ones [Liger 678]: test_cross_entropy; stride-0
upstream gradients [verl 6960, TE 2402] and non-contiguous logits [TE 2746]: test_token_stats,
test_cross_entropy; a second backward [quack 209]: test_transforms, test_inplace; every width and
alignment [llm.c]: test_token_stats; all tokens ignored [Liger 177, CCE]: test_cross_entropy;
targets out of range [apex, quack, flash-attention]: test_errors; mixed precision [Liger 305, 501]:
test_transforms.
A vocabulary spread over ranks, padding and label smoothing in it [CCE 59, Megatron 737, 7464]:
tests/parallel.
From hidden states also: sums of the weight's gradient in 16 bits [Liger 512, OLMo-core 370],
float16 at many tokens, a second backward, stride-0 gradients, all tokens ignored, targets out of
range, mixed precision and products of what is frozen: tests/linear; chunks too small for the
products [Liger 1232]: linear/test_plan.py, where memory is measured too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Passed, assert_close, gradients

from llmloss_ext import cross_entropy, linear_cross_entropy, linear_token_stats, token_stats
from llmloss_ext.linear import cpu_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inplace", [False, True])
def test_confident_predictions_keep_their_gradient(device, dtype, inplace):
    """p -> 1: softmax rounded first, then minus 1, is up to 100 % off [Liger 1268, TE 3193]."""
    input = torch.zeros(5, 257, dtype=torch.float64, device=device)
    target = torch.arange(5, device=device)
    input[target, target] = torch.tensor([8.0, 10.0, 12.0, 14.0, 16.0], device=device).double()
    input = input.to(dtype)

    def loss(x):
        return cross_entropy(x * 1 if inplace else x, target, reduction="sum", inplace=inplace)

    _, (grad,) = gradients(loss, input)
    _, (wanted,) = gradients(lambda x: F.cross_entropy(x, target, reduction="sum"), input.double())
    error = (grad[target, target].double() - wanted[target, target]).abs()
    relative = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    # Besides the rounding of the stored gradient: the float32 sum of exponentials, 1 + (1 - p), has
    # steps of 1.2e-7 (twice: once a lane, once a row); subnormal halves have steps of 6e-8.
    assert (error <= relative * wanted[target, target].abs() + 3e-7).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_common_offset_costs_no_digits(device, dtype, offset):
    """lse - x_y loses what x_y - m keeps: no worse than torch, and the same numbers as float64."""
    input = (torch.randn(16, 999, device=device).double() + offset).to(dtype)
    target = torch.randint(0, 999, (16,), device=device)
    rows, (grad,) = gradients(lambda x: cross_entropy(x, target, reduction="none"), input)
    expected, (wanted,) = gradients(
        lambda x: F.cross_entropy(x, target, reduction="none"), input.double()
    )
    torchs, _ = gradients(lambda x: F.cross_entropy(x, target, reduction="none"), input)
    error = (rows - expected).abs().max()
    assert error <= max(1e-12 if dtype == torch.float64 else 1e-6, (torchs - expected).abs().max())
    assert_close(grad, wanted, 1e-12 if dtype == torch.float64 else 1e-6)


def test_half_sums_do_not_overflow(device):
    """fp16: 70,000 exponentials of 1 exceed 65,504."""
    input = torch.zeros(2, 70_000, dtype=torch.float16, device=device)
    target = torch.tensor([3, 69_999], device=device)
    value = cross_entropy(input, target)
    assert_close(value, torch.tensor(70_000.0).log(), 1e-6)
    assert_close(token_stats(input, target).entropy, value.expand(2), 1e-6)


def test_half_gradients_of_many_rows(device):
    """fp16: 1 / N is subnormal from N = 65,536 on; it must not become 0 on the way."""
    rows = 70_000
    input = torch.randn(rows, 3, device=device).half()
    target = torch.randint(0, 3, (rows,), device=device)
    _, (grad,) = gradients(lambda x: cross_entropy(x, target), input)
    _, (wanted,) = gradients(lambda x: F.cross_entropy(x, target), input.double())
    assert (grad.double() - wanted).abs().max() <= 3.1e-8  # half a unit of a subnormal half


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_32_bits(inplace):
    """Rows 2^31 elements apart [flash-attention 714, torch 85005, CCE 37]."""
    stride, columns = 2**31 + 8, 1003
    memory = torch.empty(stride + columns, dtype=torch.bfloat16)  # its pages stay untouched
    rows = memory.as_strided((2, columns), (stride, 1))
    values = torch.randn(2, columns).bfloat16()
    rows.copy_(values)
    target = torch.tensor([5, 1002])
    expected, (wanted,) = gradients(lambda x: F.cross_entropy(x, target), values.double())
    if not inplace:
        assert_close(cross_entropy(rows, target), expected, 2e-6)
        leaf = rows.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
        assert_close(grad, wanted, 4e-3)
        return
    logits = Passed.apply(rows, torch.zeros((), requires_grad=True))
    value = cross_entropy(logits, target, inplace=True)
    assert_close(value.detach(), expected, 2e-6)
    value.backward()
    assert_close(rows, wanted, 4e-3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_targets_at_any_alignment(device, dtype, start):
    """[flash-attention]: labels that do not start at 16 bytes."""
    whole = torch.randint(0, 17, (24,), dtype=dtype, device=device)
    target = whole[start : start + 20]
    input = torch.randn(20, 17, device=device)
    assert_close(cross_entropy(input, target), F.cross_entropy(input, target.long()), 2e-6)
    strided = whole[::2][:10]
    assert_close(
        cross_entropy(input[:10], strided), F.cross_entropy(input[:10], strided.long()), 2e-6
    )


def test_reduction_none_weights_every_row(device):
    """[Liger 678, 968]: all rows scaled by the first row's upstream gradient."""
    input, target = torch.randn(6, 31, device=device), torch.arange(6, device=device)
    upstream = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 7.0], device=device)
    _, (grad,) = gradients(
        lambda x: cross_entropy(x, target, reduction="none"), input, upstream=upstream
    )
    _, (wanted,) = gradients(
        lambda x: F.cross_entropy(x, target, reduction="none"), input, upstream=upstream
    )
    assert_close(grad, wanted, 2e-6)
    assert (grad[0] == 0).all()


def test_no_error_above_torchs(device):
    """Largest errors over many rows, beside those of torch's own float32 path."""
    input = torch.randn(512, 4099, device=device) * 3
    target = torch.randint(0, 4099, (512,), device=device)
    exact, (exact_grad,) = gradients(
        lambda x: F.cross_entropy(x, target, reduction="none"), input.double()
    )
    errors = {}
    for name, loss in (("ours", cross_entropy), ("torch", F.cross_entropy)):
        value, (grad,) = gradients(lambda x, f=loss: f(x, target, reduction="none"), input)
        errors[name] = ((value - exact).abs().max(), (grad - exact_grad).abs().max())
    assert errors["ours"][0] <= errors["torch"][0]
    assert errors["ours"][1] <= errors["torch"][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_confident_predictions_keep_their_gradient_through_the_projection(device, dtype, reduction):
    """p -> 1, with logits that the product makes exactly: each gradient is p - 1 [Liger 1268]."""
    sizes = torch.tensor([8.0, 10.0, 12.0, 14.0, 16.0], device=device)
    hidden = torch.diag(sizes).to(dtype).requires_grad_()
    weight = torch.eye(257, 5, device=device, dtype=dtype)
    target = torch.arange(5, device=device)
    linear_cross_entropy(
        hidden, weight, target, reduction=reduction, chunk_tokens=2
    ).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().t(), target, reduction="sum").backward()
    wanted = exact.grad.diagonal()
    relative = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    error = (hidden.grad.diagonal().double() - wanted).abs()
    assert (error <= relative * wanted.abs() + 3e-7).all()


@pytest.mark.parametrize("offset", [8192.0, -8192.0])
def test_a_bias_common_to_all_classes_costs_no_digits(device, offset):
    """lse - x_y would lose them. Quarters at 2^13 are exact in float32, so the logits are."""
    hidden = torch.randint(-4, 5, (16, 8), device=device).float()
    weight = torch.randint(-4, 5, (999, 8), device=device).float() / 4
    bias = torch.full((999,), offset, device=device)
    target = torch.randint(0, 999, (16,), device=device)
    options = {"linear_bias": bias, "chunk_tokens": 8}
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), target, reduction="none")
    rows = linear_cross_entropy(hidden, weight, target, reduction="none", **options)
    assert_close(rows, exact, 1e-6)
    assert_close(linear_cross_entropy(hidden, weight, target, **options), exact.mean(), 1e-6)
    assert_close(linear_token_stats(hidden, weight, target, **options).log_prob, -exact, 1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("has_products", [True, False])
def test_products_are_of_16_bits_throughout(monkeypatch, weight_dtype, reduction, has_products):
    """[TRL 6863]: an upcast before the projection makes it 13 times slower, and nobody sees it.

    On a CPU without such products an upcast is 20 times as fast instead: there are no others then.
    """
    monkeypatch.setattr(cpu_products, "has_products_of", lambda dtype: has_products)
    seen = []
    for name in ("mm", "addmm"):
        right = getattr(torch, name)

        def product(*args, right=right, **kwargs):
            seen.extend(a.dtype for a in args)
            return right(*args, **kwargs)

        monkeypatch.setattr(torch, name, product)
    hidden = torch.randn(20, 16).bfloat16().requires_grad_()
    weight = torch.randn(99, 16, dtype=weight_dtype, requires_grad=True)
    bias = torch.randn(99, dtype=weight_dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=weight_dtype == torch.float32):
        loss = linear_cross_entropy(hidden, weight, torch.arange(20), linear_bias=bias,
                                    reduction=reduction, chunk_tokens=8).sum()  # fmt: skip
    loss.backward()
    assert len(seen) >= 18
    assert set(seen) == {torch.bfloat16 if has_products else torch.float32}
