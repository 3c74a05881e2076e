"""The cosine distance of hidden states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, assert_close

from llmloss_ext.losses import cosine_distillation_loss

B, S, D = 3, 5, 8


def tensors(dtype=torch.double, device="cpu"):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, B, S, D).to(device, dtype)
    target = torch.zeros(B, S, dtype=torch.long, device=device)
    target[0, 1] = target[2] = -100
    return student.requires_grad_(), teacher, target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_torchs_loss_of_pairs(device, reduction):
    """DistilBERT's training calls it with a target of 1 for the tokens of its mask."""
    student, teacher, target = tensors(device=device)
    keep = target != -100
    wanted = F.cosine_embedding_loss(
        student[keep], teacher[keep], torch.ones(int(keep.sum()), device=device),
        reduction=reduction,
    )  # fmt: skip
    found = cosine_distillation_loss(student, teacher, target=target, reduction=reduction)
    value = found[keep] if reduction == "none" else found
    assert_close(value, wanted, 1e-12)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (found, wanted)]
    assert_close(*grads, 1e-12)
    assert (grads[0][~keep] == 0).all()
    if reduction == "none":
        assert (found[~keep] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_types(device, dtype):
    student, teacher, _ = tensors(dtype, device)
    loss = cosine_distillation_loss(student, teacher)
    a, b = student.detach().double(), teacher.double()
    exact = 1 - (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    assert_close(loss, exact.mean(), 1e-6)
    loss.backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e15, 1e30])
def test_no_length_matters(size):
    student, teacher, _ = tensors(torch.float32)
    wanted = cosine_distillation_loss(student, teacher)
    leaf = (student.detach() * size).requires_grad_()
    found = cosine_distillation_loss(leaf, teacher / size)
    assert_close(found, wanted, 1e-6)
    (grad,) = torch.autograd.grad(found, leaf)
    assert_close(grad * size, torch.autograd.grad(wanted, student)[0], 1e-6)


@pytest.mark.parametrize("angle", [1e-2, 1e-4])
def test_digits_where_they_agree(angle):
    """1 - cos of 1e-4 is 5e-9, of which float32's 1 - cos has no digit."""
    teacher = torch.tensor([[1.0, 0.0]])
    student = torch.tensor([[math.cos(angle), math.sin(angle)]], requires_grad=True)
    loss = cosine_distillation_loss(student, teacher)
    exact = torch.nn.functional.cosine_similarity(student.detach().double(), teacher.double())
    assert loss.item() == pytest.approx(2 * math.sin(math.acos(min(exact.item(), 1)) / 2) ** 2,
                                        rel=1e-2)  # fmt: skip
    assert loss.item() == pytest.approx(angle**2 / 2, rel=1e-2)
    (grad,) = torch.autograd.grad(loss, student)
    assert grad[0, 1].item() == pytest.approx(math.sin(angle), rel=1e-2)


@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_a_vector_of_zeros_has_no_direction(whose):
    student, teacher, _ = tensors()
    student = student.detach().clone()
    if whose != "teacher":
        student[0, 0] = 0
    if whose != "student":
        teacher[0, 0] = 0
    leaf = student.requires_grad_()
    rows = cosine_distillation_loss(leaf, teacher, reduction="none")
    assert rows[0, 0] == 1
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    assert (grad[0, 0] == 0).all()
    assert grad.isfinite().all()
    assert (grad[1:] != 0).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything(value):
    results = []
    for spoilt in (False, True):
        student, teacher, target = tensors()
        student = student.detach().clone()
        if spoilt:
            student[target == -100] = teacher[target == -100] = value
        leaf = student.requires_grad_()
        loss = cosine_distillation_loss(leaf, teacher, target=target)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_derivatives_and_transforms():
    student, teacher, target = tensors()

    def loss(x):
        return cosine_distillation_loss(x, teacher, target=target)

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)
    each = torch.func.vmap(cosine_distillation_loss)(student, teacher)
    assert_close(each, cosine_distillation_loss(student, teacher, reduction="none").mean(1), 1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(student), student)[0] for f in (loss, compiled)]
    assert_close(*grads, 1e-12)


def test_micro_batches_add_up_and_a_teacher_may_be_trainable():
    student, teacher, target = tensors()
    teacher.requires_grad_()
    whole = cosine_distillation_loss(student, teacher, target=target)
    count = int((target != -100).sum())
    for items in (count, torch.tensor(count)):
        parts = sum(
            cosine_distillation_loss(
                student[i : i + 1], teacher[i : i + 1], target=target[i : i + 1], num_items=items
            )
            for i in range(B)
        )
        assert_close(parts, whole, 1e-12)
        grads = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (parts, whole)]
        assert_close(*grads, 1e-12)
    whole.backward()
    assert teacher.grad is None
    nothing = torch.full_like(target, -100)
    assert cosine_distillation_loss(student, teacher, target=nothing).isnan()
    assert cosine_distillation_loss(student, teacher, target=nothing, num_items=0) == 0
    for order in itertools.permutations(range(B)):
        at = list(order)
        assert_close(
            cosine_distillation_loss(student[at], teacher[at], target=target[at]), whole, 1e-12
        )


def test_what_does_not_fit():
    student, teacher, target = tensors()
    for call in (
        lambda: cosine_distillation_loss(student, teacher[..., 1:]),
        lambda: cosine_distillation_loss(student, teacher[0]),
        lambda: cosine_distillation_loss(student, teacher, target=target[0]),
        lambda: cosine_distillation_loss(student, teacher, reduction="x"),
        lambda: cosine_distillation_loss(student, teacher, reduction="sum", num_items=2),
    ):
        with pytest.raises(ValueError):
            call()
