"""cross_entropy: a drop-in for torch's in every documented form, and every option beyond it."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import FLOATS, GRADIENT, VALUE, assert_close, gradients

import llmloss_ext
from llmloss_ext import cross_entropy, token_stats

REDUCTIONS = ("mean", "sum", "none")


def make(device, dtype, shape=(7, 53), ignored=1):
    """Logits, and targets of which some are ignored."""
    input = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype).to(device)
    target = torch.randint(0, shape[-1], shape[:-1])
    if target.dim() and ignored:
        target.view(-1)[1 : 1 + ignored] = -100
    return input, target.to(device)


def check_against_torch(input, target, dtype, **options):
    """Value and gradient against torch on the same (rounded) numbers in float64."""
    double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    double_target = target.double() if target.is_floating_point() else target.long()
    wanted, leaf = [], input.double().clone().requires_grad_()
    value = F.cross_entropy(leaf, double_target, **double)
    upstream = torch.rand_like(value) + 0.5  # never all ones: see peers, Liger 678
    wanted = torch.autograd.grad(value, leaf, upstream)[0]
    actual, (grad,) = gradients(
        lambda x: cross_entropy(x, target, **options), input, upstream=upstream
    )
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.shape == value.shape
    assert grad.dtype == dtype
    assert grad.shape == input.shape
    assert_close(actual, value.detach(), VALUE[dtype])
    assert_close(grad, wanted, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_indices(device, dtype, reduction, smoothing, weighted):
    input, target = make(device, dtype)
    weight = torch.rand(53, device=device).to(dtype) if weighted else None
    check_against_torch(
        input, target, dtype, reduction=reduction, label_smoothing=smoothing, weight=weight
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, False), (0.2, False), (0.2, True)])
def test_probabilities(device, dtype, reduction, smoothing, weighted):
    input, _ = make(device, dtype)
    target = torch.softmax(torch.randn(7, 53, device=device), -1).to(dtype)
    weight = torch.rand(53, device=device).to(dtype) if weighted else None
    check_against_torch(
        input, target, dtype, reduction=reduction, label_smoothing=smoothing, weight=weight
    )


FORMS = [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 4), (2, 5, 2, 3, 2)]


@pytest.mark.parametrize("shape", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
@pytest.mark.filterwarnings("ignore:target of shape")
def test_torch_shapes(device, shape, reduction, probabilities, ignore_index):
    input = torch.randn(shape, device=device)
    dim = 0 if len(shape) == 1 else 1
    if probabilities and ignore_index >= 0:
        target = torch.rand(shape, device=device)
        with pytest.raises(RuntimeError, match="ignore_index is not supported"):
            cross_entropy(input, target, ignore_index=ignore_index)
        return
    if probabilities:
        target = torch.softmax(torch.randn(shape, device=device), dim)
    else:
        target = torch.randint(0, 5, shape[:dim] + shape[dim + 1 :], device=device)
        if target.numel() > 1:
            target.view(-1)[0] = ignore_index
            target.view(-1)[1] = 1
        elif ignore_index == 3:
            target.fill_(2)
    check_against_torch(
        input, target, torch.float32, reduction=reduction, ignore_index=ignore_index
    )


def test_channels_last_is_read_in_place(device):
    input = torch.randn(2, 8, 4, 4, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(0, 8, (2, 4, 4), device=device)
    check_against_torch(input, target, torch.float32)


@pytest.mark.parametrize("shape", [(11,), (6, 11), (2, 3, 11), (2, 3, 2, 11)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_language_model_shapes(device, shape, reduction):
    input, target = make(device, torch.float32, shape)
    actual, (grad,) = gradients(lambda x: cross_entropy(x, target, reduction=reduction), input)
    flat = F.cross_entropy(input.reshape(-1, 11), target.reshape(-1), reduction=reduction)
    assert_close(actual, flat.reshape(actual.shape), 2e-6)
    assert grad.shape == input.shape
    if reduction == "none":
        assert actual.shape == target.shape


def test_where_two_conventions_fit_torchs_is_taken_with_a_warning(device):
    """(N, C, d) with C == d: a sequence as long as the vocabulary. A drop-in must do as torch."""
    input = torch.randn(2, 4, 4, device=device)
    target = torch.randint(0, 4, (2, 4), device=device)
    torchs = F.cross_entropy(input, target)
    with pytest.warns(UserWarning, match="class_dim=1 or class_dim=-1") as record:
        assert_close(cross_entropy(input, target), torchs, 2e-6)
    assert record[0].filename == __file__  # it shows the caller's line
    assert_close(cross_entropy(input, target, class_dim=1), torchs, 2e-6)
    last = cross_entropy(input, target, class_dim=-1)
    assert_close(last, F.cross_entropy(input.flatten(0, 1), target.flatten()), 2e-6)
    stats = token_stats(input, target)  # torch has no such function: the last dimension
    assert_close(-stats.log_prob.mean(), last, 2e-6)
    stats = token_stats(input, target, class_dim=1)
    assert_close(-stats.log_prob.mean(), torchs, 2e-6)


def test_class_dim_of_probabilities(device):
    input = torch.randn(2, 5, 7, device=device)
    target = torch.randn(2, 5, 7, device=device).softmax(-1)
    with pytest.warns(UserWarning, match="class_dim"):
        assert_close(cross_entropy(input, target), F.cross_entropy(input, target), 2e-6)
    last = F.cross_entropy(input.flatten(0, 1), target.flatten(0, 1))
    assert_close(cross_entropy(input, target, class_dim=-1), last, 2e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("ignore_index", [-100, 0, 52, -1, 1000])
def test_target_types_and_any_ignore_index(device, dtype, ignore_index):
    input = torch.randn(9, 53, device=device)
    target = torch.randint(0, 53, (9,), device=device)
    target[3] = target[5] = ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    value, (grad,) = gradients(lambda x: cross_entropy(x, target.to(dtype), **options), input)
    expected, (wanted,) = gradients(lambda x: F.cross_entropy(x, target, **options), input.double())
    assert_close(value, expected, 2e-6)
    assert_close(grad, wanted, 2e-6)
    assert (grad[3] == 0).all()
    assert (grad[5] == 0).all()


# Every option beyond torch's, alone and with the others.
OPTIONS = [
    {"z_loss": 0.02},
    {"focal_gamma": 2.0},
    {"focal_gamma": 0.5},
    {"softcap": 2.5},
    {"logit_scale": 0.3},
    {"logit_scale": 1.7, "softcap": 4.0},
    {"temperature": 1.3, "softcap": 4.0},
    {"token_weight": True},
    {"num_items": 11},
    {"vocab_size": 40},
    {"weight": True, "z_loss": 0.01},
    {
        "z_loss": 0.02, "softcap": 3.0, "logit_scale": 1.3, "token_weight": True, "weight": True,
        "vocab_size": 41, "label_smoothing": 0.1, "ignore_index": 7, "focal_gamma": 1.5,
    },
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_focal_loss_is_finite_where_the_plain_one_is(device, dtype, gamma, create_graph):
    """p_y of 1 and of 0, where (1 - p_y)^gamma or its derivative meets an infinity."""
    input = torch.zeros(4, 9, device=device, dtype=dtype)
    input[0, 0], input[1, 0], input[2, 1], input[3] = 2000.0, 20.0, 5000.0, -torch.inf
    input[3, 0] = 1.0
    target = torch.tensor([0, 0, 0, 0], device=device)
    leaf = input.clone().requires_grad_()
    rows = cross_entropy(leaf, target, focal_gamma=gamma, reduction="none")
    (grad,) = torch.autograd.grad(rows.sum(), leaf, create_graph=create_graph)
    rows, grad = rows.detach(), grad.detach()
    assert rows.isfinite().all()
    assert grad.isfinite().all()
    assert (rows[[0, 3]] == 0).all()
    assert (grad[[0, 3]] == 0).all()
    assert_close(rows[2], torch.tensor(5000.0), 1e-6)
    assert_close(grad[2, :2], torch.tensor([-1.0, 1.0]), 1e-6)


def test_focal_is_for_class_indices(device):
    input, target = torch.randn(2, 5, 9, device=device).softmax(-1)
    with pytest.raises(RuntimeError, match="focal_gamma"):
        cross_entropy(input, target, focal_gamma=2.0)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_options(device, options, dtype, reduction, inplace):
    if "num_items" in options and reduction != "mean":
        pytest.skip("num_items replaces the denominator of the mean")
    options = {**options, "reduction": reduction}
    input, target = make(device, dtype)
    target = torch.where(target >= 40, target - 40, target)
    target[1] = options.get("ignore_index", -100)
    if "weight" in options:
        options["weight"] = torch.rand(53, device=device)
    if "token_weight" in options:
        options["token_weight"] = torch.rand(7, device=device)
    upstream = torch.rand(7 if reduction == "none" else (), device=device)
    expected, (wanted,) = gradients(
        lambda x: reference.cross_entropy(x, target, **options), input.double(), upstream=upstream
    )

    def loss(x):
        # inplace needs logits that are not a leaf
        return cross_entropy(x * 1 if inplace else x, target, **options, inplace=inplace)

    value, (grad,) = gradients(loss, input, upstream=upstream)
    assert_close(value, expected, VALUE[dtype])
    # In place the gradient is rounded before the upstream factor and after it.
    assert_close(grad, wanted, GRADIENT[dtype] * (2 if inplace else 1))
    assert (grad[1] == 0).all()
    if "vocab_size" in options:
        assert (grad[:, options["vocab_size"] :] == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"softcap": 3.0, "z_loss": 0.1}])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_learnable_scale(device, options, inplace, shape):
    input, target = make(device, torch.float64)
    scale = torch.full(shape, 1.3, dtype=torch.float64, device=device)

    def loss(x, s):
        z = x * 1 if inplace else x
        return cross_entropy(z, target, logit_scale=s, inplace=inplace, **options)

    value, grads = gradients(loss, input, scale)
    expected, wanted = gradients(
        lambda x, s: reference.cross_entropy(x, target, logit_scale=s, **options), input, scale
    )
    assert_close(value, expected, 1e-12)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, 1e-12)
        assert grad.shape == want.shape


@pytest.mark.parametrize("inplace", [False, True])
def test_learnable_token_weight(device, inplace):
    input, target = make(device, torch.float64)
    weights = torch.rand(7, dtype=torch.float64, device=device)
    for reduction, items in itertools.product(REDUCTIONS, (None, 5)):
        if items and reduction != "mean":
            continue
        options = {"reduction": reduction, "num_items": items}

        def loss(x, w, options=options):
            z = x * 1 if inplace else x
            return cross_entropy(z, target, token_weight=w, inplace=inplace, **options).sum()

        _, grads = gradients(loss, input, weights)
        _, wanted = gradients(
            lambda x, w, o=options: reference.cross_entropy(x, target, token_weight=w, **o).sum(),
            input,
            weights,
        )
        for grad, want in zip(grads, wanted, strict=True):
            assert_close(grad, want, 1e-12)


def test_gradient_of_probability_targets(device):
    input = torch.randn(5, 9, dtype=torch.float64, device=device)
    target = torch.softmax(torch.randn_like(input), -1)
    options = {"label_smoothing": 0.1, "weight": torch.rand(9, dtype=torch.float64, device=device)}
    _, grads = gradients(lambda x, q: cross_entropy(x, q, **options), input, target)
    _, wanted = gradients(lambda x, q: F.cross_entropy(x, q, **options), input, target)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, 1e-12)


def test_gradient_accumulation_is_exact(device):
    """Micro-batches with unequal numbers of valid tokens add up to the large batch."""
    input = torch.randn(12, 31, dtype=torch.float64, device=device)
    target = torch.randint(0, 31, (12,), device=device)
    target[:5] = -100
    _, (whole,) = gradients(lambda x: cross_entropy(x, target), input)
    items = (target != -100).sum()
    parts = [
        gradients(lambda x, t=t: cross_entropy(x, t, num_items=items), x)[1][0]
        for x, t in zip(input.split(4), target.split(4), strict=True)
    ]
    assert_close(torch.cat(parts), whole, 1e-14)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_with_a_stride_are_read_in_place(device, inplace):
    """logits[:, :-1] of language models, and padded rows: no copy, and the gap stays untouched."""
    whole = torch.randn(3, 6, 40, device=device)
    target = torch.randint(0, 37, (3, 5), device=device)
    expected, (wanted,) = gradients(
        lambda x: F.cross_entropy(x[:, :-1, :37].reshape(-1, 37), target.reshape(-1)), whole
    )

    def loss(x):
        logits = (x * 1)[:, :-1, :37]
        value = cross_entropy(logits, target, inplace=inplace)
        if inplace:
            assert_close(logits._base[:, -1], x.detach()[:, -1], 0)
            assert_close(logits._base[:, :, 37:], x.detach()[:, :, 37:], 0)
        return value

    value, (grad,) = gradients(loss, whole)
    assert_close(value, expected, 2e-6)
    assert_close(grad, wanted, 2e-6)


@pytest.mark.parametrize("transpose", [False, True])
def test_sequence_first_rows(device, transpose):
    """(S, B, V) seen as (B, S, V): the outer stride is the smaller one."""
    base = torch.randn(4, 3, 17, device=device)
    input = base.transpose(0, 1) if transpose else base
    target = torch.randint(0, 17, input.shape[:2], device=device)
    expected = F.cross_entropy(input.reshape(-1, 17), target.reshape(-1))
    assert_close(cross_entropy(input, target), expected, 2e-6)


def test_special_rows(device):
    """-inf columns are fine; nan, +inf and all -inf spoil their own row only."""
    input = torch.randn(6, 19, device=device)
    input[0, 3:9] = -torch.inf
    input[1, 4] = torch.nan
    input[2, 4] = torch.inf
    input[3] = -torch.inf
    input[4, 2] = -torch.inf  # the target: infinite loss
    target = torch.tensor([0, 1, 1, 1, 2, 5], device=device)
    rows, (grad,) = gradients(lambda x: cross_entropy(x, target, reduction="none"), input)
    expected, (wanted,) = gradients(
        lambda x: F.cross_entropy(x, target, reduction="none"), input.double()
    )
    assert_close(rows, expected, 2e-6)
    assert rows[4] == torch.inf
    for row in (0, 4, 5):
        assert_close(grad[row], wanted[row], 2e-6)
    assert grad[1].isnan().any()
    assert (grad[0, 3:9] == 0).all()


def test_empty_and_all_ignored(device):
    empty = torch.randn(0, 7, device=device)
    none = torch.zeros(0, dtype=torch.long, device=device)
    value, (grad,) = gradients(lambda x: cross_entropy(x, none), empty)
    assert value.isnan()
    assert grad.shape == (0, 7)
    assert cross_entropy(empty, none, reduction="sum") == 0
    assert cross_entropy(empty, none, reduction="none").shape == (0,)
    input = torch.randn(4, 7, device=device)
    ignored = torch.full((4,), -100, device=device)
    value, (grad,) = gradients(lambda x: cross_entropy(x, ignored), input)
    assert value.isnan()
    assert (grad == 0).all()
    value, (grad,) = gradients(lambda x: cross_entropy(x, ignored, num_items=3), input)
    assert value == 0
    assert (grad == 0).all()


def test_one_class(device):
    value, (grad,) = gradients(
        lambda x: cross_entropy(x, torch.zeros(3, dtype=torch.long, device=device)),
        torch.randn(3, 1, device=device),
    )
    assert value == 0
    assert (grad == 0).all()


def test_module(device):
    input, target = make(device, torch.float32)
    weight = torch.rand(53, device=device)
    ours = llmloss_ext.nn.CrossEntropyLoss(weight, label_smoothing=0.1).to(device)
    torchs = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    assert_close(ours(input, target), torchs(input, target), 2e-6)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert "label_smoothing=0.1" in repr(ours)
    capped = llmloss_ext.nn.CrossEntropyLoss(
        ignore_index=0, reduction="none", z_loss=0.1, softcap=3.0, vocab_size=40, inplace=True,
        logit_scale=torch.nn.Parameter(torch.tensor(1.2, device=device)),
    )  # fmt: skip
    assert [name for name, _ in capped.named_parameters()] == ["logit_scale"]
    target = target.clamp(0, 39)
    options = {"ignore_index": 0, "reduction": "none", "z_loss": 0.1, "softcap": 3.0}
    expected = reference.cross_entropy(input, target, vocab_size=40, logit_scale=1.2, **options)
    logits = input.clone().requires_grad_() * 1
    actual = capped(logits, target, token_weight=torch.ones(7, device=device))
    assert_close(actual.detach(), expected, 2e-6)
    actual.sum().backward()
    assert capped.logit_scale.grad is not None
