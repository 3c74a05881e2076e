"""What torch's cross entropy takes besides the usual; and what it does not, in one clear line."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, gradients

from llmloss_ext import cross_entropy, linear_cross_entropy, losses, nn, token_stats

V = 7


def test_arguments_by_position(device):
    input, target = torch.randn(5, V, device=device), torch.tensor([0, 1, 2, 3, 6], device=device)
    weight = torch.rand(V, device=device)
    arguments = (weight, None, 3, None, "sum", 0.2)
    assert_close(
        cross_entropy(input, target, *arguments), F.cross_entropy(input, target, *arguments), 2e-6
    )
    ours, theirs = nn.CrossEntropyLoss(*arguments), torch.nn.CrossEntropyLoss(*arguments)
    assert_close(ours.to(device)(input, target), theirs.to(device)(input, target), 2e-6)


@pytest.mark.parametrize(
    ("size_average", "reduce"), [(False, None), (True, True), (None, False), (False, True)]
)
def test_deprecated_reductions(device, size_average, reduce):
    input, target = torch.randn(5, V, device=device), torch.zeros(5, device=device).long()
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        expected = F.cross_entropy(input, target, size_average=size_average, reduce=reduce)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        actual = cross_entropy(input, target, size_average=size_average, reduce=reduce)
    assert_close(actual, expected, 2e-6)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        module = nn.CrossEntropyLoss(size_average=size_average, reduce=reduce)
    assert_close(module(input, target), expected, 2e-6)


def test_bytes_as_targets(device):
    input = torch.randn(5, 300, device=device)
    target = torch.tensor([0, 255, 7, 255, 9], device=device).byte()
    expected, (wanted,) = gradients(lambda x: F.cross_entropy(x, target, ignore_index=255), input)
    actual, (grad,) = gradients(lambda x: cross_entropy(x, target, ignore_index=255), input)
    assert_close(actual, expected, 2e-6)
    assert_close(grad, wanted, 2e-6)
    h, w = torch.randn(5, 4, device=device), torch.randn(300, 4, device=device)
    assert_close(linear_cross_entropy(h, w, target), F.cross_entropy(h @ w.t(), target), 2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 0), (0, V), (3, 0), (0,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_classes_or_without_tokens(device, reduction, shape, weighted):
    tokens = shape[:1] + shape[2:] if len(shape) > 1 else ()
    input = torch.zeros(shape, device=device)
    target = torch.full(tokens, -100, device=device)
    columns = shape[1] if len(shape) > 1 else shape[0]
    weight = torch.rand(columns, device=device) if weighted else None
    options = {"reduction": reduction, "weight": weight}
    # A CPU's. Of one ignored token without a batch, torch's mean is nan there and 0 on CUDA; in a
    # batch of one it is nan on both. Ours is nan.
    on_cpu = None if weight is None else weight.cpu()
    expected = F.cross_entropy(input.cpu(), target.cpu(), on_cpu, reduction=reduction)
    actual, (grad,) = gradients(lambda x: cross_entropy(x, target, **options), input)
    assert_close(actual, expected, 1e-6)
    assert actual.shape == expected.shape
    assert grad.shape == shape
    if columns == 0 and target.numel() and torch.device(device).type == "cpu":
        with pytest.raises(IndexError, match="out of bounds"):
            cross_entropy(input, torch.zeros_like(target), **options)
    if len(shape) == 2 and not weighted:
        expected = F.cross_entropy(input, torch.zeros(shape, device=device), reduction=reduction)
        actual = cross_entropy(input, torch.zeros(shape, device=device), reduction=reduction)
        assert_close(actual, expected, 1e-6)


NOT_DENSE = {
    "a list": [[1.0, 2.0]],
    "numpy": np.ones((1, 2), np.float32),
    "a number": 3.0,
    "None": None,
    "sparse": torch.ones(1, 2).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(1, 2)], layout=torch.jagged),
}
DENSE = (torch.ones(1, 2), torch.zeros(1, dtype=torch.long))
CALLS = {
    "cross_entropy": lambda x, y: cross_entropy(x, y),
    "token_stats": lambda x, y: token_stats(x, y),
    "linear": lambda x, y: linear_cross_entropy(x, torch.ones(3, 2), y),
    "linear weight": lambda x, y: linear_cross_entropy(torch.ones(1, 2), x, y),
    "distillation": lambda x, y: losses.distillation_loss(x, x, target=y),
    "module": lambda x, y: nn.CrossEntropyLoss()(x, y),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_what_is_no_dense_tensor_is_refused_in_one_line(call, kind):
    arguments = [(NOT_DENSE[kind], DENSE[1])]
    if call not in ("linear weight",) and not (call == "distillation" and kind == "None"):
        arguments.append((DENSE[0], NOT_DENSE[kind]))
    for input, target in arguments:
        with pytest.raises(
            TypeError, match="must be a (torch.Tensor|dense tensor)|must be jagged"
        ) as info:
            CALLS[call](input, target)
        assert "\n" not in str(info.value)


# ------------------------------------------------------------------------------ jagged batches


def jagged(parts, **options):
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **options)


def ragged(device, width, lengths=(2, 4, 1)):
    torch.manual_seed(0)
    parts = [torch.randn(n, width, device=device) for n in lengths]
    targets = [torch.randint(0, V, (n,), device=device) for n in lengths]
    targets[0][0] = -100
    return parts, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_jagged_logits(device, reduction):
    parts, targets = ragged(device, V)
    flat = torch.cat(parts).requires_grad_()
    expected = F.cross_entropy(flat, torch.cat(targets), reduction=reduction)
    upstream = torch.rand_like(expected)
    (wanted,) = torch.autograd.grad(expected, flat, upstream)
    input = jagged(parts, requires_grad=True)
    weights = jagged([torch.ones(len(p), device=device) for p in parts])
    for given in ({}, {"token_weight": weights}):
        loss = cross_entropy(input, jagged(targets), reduction=reduction, **given)
        if reduction == "none":
            assert loss.is_nested
            assert [len(x) for x in loss.unbind()] == [len(p) for p in parts]
            loss = loss.values()
        assert_close(loss, expected, 2e-6)
        (grad,) = torch.autograd.grad(loss, input, upstream)
        assert_close(grad.values(), wanted, 2e-6)


def test_jagged_hidden_states_shift_within_their_sequences(device):
    parts, targets = ragged(device, 4)
    weight = torch.randn(V, 4, device=device)
    total, count = 0.0, 0
    for part, target in zip(parts, targets, strict=True):
        each = F.cross_entropy(
            part[:-1].double() @ weight.double().t(), target[1:], reduction="sum"
        )
        total, count = total + each, count + int((target[1:] != -100).sum())
    loss = linear_cross_entropy(jagged(parts), weight, jagged(targets), shift=1)
    assert_close(loss, total / count, 2e-6)
    plain = linear_cross_entropy(jagged(parts), weight, jagged(targets))
    assert_close(plain, F.cross_entropy(torch.cat(parts) @ weight.t(), torch.cat(targets)), 2e-6)


def test_jagged_statistics(device):
    parts, targets = ragged(device, V)
    stats = token_stats(jagged(parts), jagged(targets), with_rank=True)
    flat = token_stats(torch.cat(parts), torch.cat(targets), with_rank=True)
    for name in flat._fields:
        one, other = getattr(stats, name), getattr(flat, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.is_nested
            assert torch.equal(one.values(), other)


def test_jagged_with_something_else_is_refused(device):
    parts, targets = ragged(device, V)
    refused = [
        torch.cat(targets),
        jagged(targets[1:]),
        jagged([torch.cat(targets[:2]), targets[2]]),
    ]
    if torch.device(device).type == "cpu":
        # On CUDA nobody waits to see that as many lengths, of the same sum, are other ones.
        refused.append(jagged(targets[::-1]))
    for target in refused:
        with pytest.raises(TypeError, match="target must (be jagged|have sequences as long)"):
            cross_entropy(jagged(parts), target)
    with pytest.raises(TypeError, match="target must be a dense tensor, or jagged"):
        cross_entropy(torch.cat(parts), jagged(targets))
    with pytest.raises(RuntimeError, match="inplace=True cannot overwrite jagged"):
        cross_entropy(jagged(parts), jagged(targets), inplace=True)
    holes = torch.nested.narrow(
        torch.randn(3, 5, V), 1, torch.zeros(3, dtype=torch.long), torch.tensor([2, 4, 1]),
        layout=torch.jagged,
    )  # fmt: skip
    if torch.device(device).type == "cpu":
        with pytest.raises(TypeError, match="without holes"):
            cross_entropy(holes, jagged(targets))


def test_every_pair_of_types_of_index(device):
    input = torch.randn(4, 9, device=device)
    target = torch.tensor([1, 8, 3, 0], device=device)
    expected = F.cross_entropy(input, target, ignore_index=3)
    for target_type, ignore in itertools.product(
        (torch.int64, torch.int32, torch.uint8), (3, np.int64(3))
    ):
        assert_close(
            cross_entropy(input, target.to(target_type), ignore_index=ignore), expected, 2e-6
        )
