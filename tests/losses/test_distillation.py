"""Distillation between logits, whole and from a teacher's stored top k."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import linear_kl_div, losses

from .problem import B, S, V


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_distillation(device, direction):
    student = torch.randn(B, S, V, device=device, requires_grad=True)
    teacher = torch.randn(B, S, V, device=device)
    target = torch.zeros(B, S, dtype=torch.long, device=device)
    target[1] = -100
    options = {"direction": direction, "temperature": 2.0, "beta": 0.3, "target": target}
    loss = losses.distillation_loss(student, teacher, **options)
    q, p = (F.log_softmax(x.double() / 2, -1) for x in (student, teacher))
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    rows = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}
    expected = 4 * rows[direction][target == 0].mean()
    assert_close(loss.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = (torch.autograd.grad(z, student) for z in (loss, expected))
    assert_close(grad, want, 1e-5)
    each = losses.distillation_loss(student, teacher, **options, reduction="none")
    assert (each[1] == 0).all()
    for wrong in ({"temperature": 0.0}, {"beta": -0.1}, {"direction": "x"}, {"reduction": "x"},
                  {"target": target[0]}):  # fmt: skip
        with pytest.raises(ValueError):
            losses.distillation_loss(student, teacher, **{**options, **wrong})
    with pytest.raises(ValueError):
        losses.distillation_loss(student, teacher[0])


DIRECTIONS = ["forward", "reverse", "jsd"]


def by_definition(p, q, direction, beta=0.5):
    """The divergence of probabilities (..., V) in float64, with 0 log 0 = 0."""

    def kl(a, b):
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)

    m = beta * p + (1 - beta) * q
    jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["whole", "strided", "four dimensions"])
def test_distillation_reads_rows_in_place(device, direction, kind, monkeypatch):
    """A chunk of rows is all that is copied, and its gradient is that of the whole."""
    from llmloss_ext import rowwise

    seen, right = [], rowwise.masked
    monkeypatch.setattr(rowwise, "COPIES", 1000)  # chunks of one row
    monkeypatch.setattr(rowwise, "masked",
                        lambda f, v, *x: (seen.append(len(x[0])), right(f, v, *x))[1])  # fmt: skip
    shape = (2, 2, S, V) if kind == "four dimensions" else (B, S, V)
    whole, other = torch.randn(2, *shape, device=device)
    cut = (slice(None), slice(1, None)) if kind != "whole" else ()
    leaf = whole.clone().requires_grad_()
    loss = losses.distillation_loss(leaf[cut], other[cut], direction=direction)
    exact = whole.double().requires_grad_()
    p, q = torch.softmax(other[cut].double(), -1), torch.softmax(exact[cut], -1)
    expected = by_definition(p, q, direction).mean()
    assert_close(loss.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, exact)
    assert_close(grad, want, 1e-5)
    assert set(seen) == {1}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_of_masked_columns(device, direction):
    """-inf in both models, as a padded head has it: no nan in the gradient."""
    student, teacher = torch.randn(2, 4, V, device=device)
    student[:, ::3] = teacher[:, ::3] = -math.inf
    leaf = student.clone().requires_grad_()
    loss = losses.distillation_loss(leaf, teacher, direction=direction)
    keep = [i for i in range(V) if i % 3]
    small = student[:, keep].clone().requires_grad_()
    expected = losses.distillation_loss(small, teacher[:, keep], direction=direction)
    assert_close(loss.detach(), expected.detach(), 1e-6)
    (grad,), (want,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, small)
    assert_close(grad[:, keep], want, 1e-6)
    assert (grad[:, ::3] == 0).all()
    for one, other in ((student * math.nan, teacher), (student, teacher * math.nan)):
        assert losses.distillation_loss(one, other, direction=direction).isnan()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("stored", [False, True])
def test_what_ignored_tokens_hold_does_not_matter(device, direction, stored):
    student = torch.randn(B, S, V, device=device)
    teacher = torch.log_softmax(torch.randn(B, S, V, device=device), -1)
    target = torch.zeros(B, S, dtype=torch.long, device=device)
    target[0, 1] = target[2] = -100
    bad = target == -100
    results = []
    for fill in (0.0, math.nan, math.inf):
        leaf = student.masked_fill(bad.unsqueeze(-1), fill).requires_grad_()
        if stored:
            values, ids = teacher.topk(4, -1)
            arguments = (leaf, ids.masked_fill(bad.unsqueeze(-1), -100 if fill else 0),
                         values.masked_fill(bad.unsqueeze(-1), fill))  # fmt: skip
            function = losses.top_k_distillation_loss
        else:
            arguments = (leaf, teacher.masked_fill(bad.unsqueeze(-1), fill))
            function = losses.distillation_loss
        for run in (function, torch.func.vmap):  # the second: where no chunk is possible
            options = {"target": target, "direction": direction}
            if run is torch.func.vmap:
                with torch.autograd.forward_ad.dual_level():
                    loss = function(*arguments, **options)
            else:
                loss = function(*arguments, **options)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert (grad[bad] == 0).all()
            results.append((loss.detach(), grad[~bad]))
    for loss, grad in results[1:]:
        assert_close(loss, results[0][0], 1e-6)
        assert_close(grad, results[0][1], 1e-6)


def test_second_order_of_distillation():
    x, teacher = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 5).double()
    target = torch.tensor([0, -100, 0])
    for direction in DIRECTIONS:
        assert torch.autograd.gradgradcheck(
            lambda x, d=direction: losses.distillation_loss(x, teacher, direction=d, target=target),
            x,
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_from_stored_top_k(device, direction, temperature):
    student = torch.randn(B, S, V, device=device, requires_grad=True)
    teacher = torch.randn(B, S, V, device=device) * 3
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    options = {"direction": direction, "temperature": temperature, "beta": 0.3}
    whole = losses.distillation_loss(student, teacher, **options)
    values, ids = log_p.topk(V, -1)
    all_of_it = losses.top_k_distillation_loss(student, ids, values, **options)
    assert_close(all_of_it.detach(), whole.detach(), 1e-4)
    values, ids = log_p.topk(5, -1)
    few = losses.top_k_distillation_loss(student, ids, values, **options)
    assert 0 <= few <= whole
    q = torch.softmax(student.double() / temperature, -1).gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (values.exp(), q))
    expected = by_definition(p, q, direction, 0.3).mean() * temperature**2
    assert_close(few.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = (torch.autograd.grad(z, student) for z in (few, expected))
    assert_close(grad, want, 1e-5)
    for wrong in ({"direction": "x"}, {"temperature": 0.0}, {"beta": 1.5}, {"reduction": "x"}):
        with pytest.raises(ValueError):
            losses.top_k_distillation_loss(student, ids, values, **wrong)
    with pytest.raises(ValueError, match="expected student_logits"):
        losses.top_k_distillation_loss(student, ids, values[..., :2])


def test_the_rest_of_a_sure_student_does_not_cancel(device):
    """1 - sum q is 0 in float32 long before the rest of the probability is."""
    student = torch.zeros(1, V, device=device)
    student[0, 0] = 40.0
    leaf = student.requires_grad_()
    ids = torch.tensor([[0]], device=device)
    log_p = torch.tensor([[0.5]], device=device).log()
    loss = losses.top_k_distillation_loss(leaf, ids, log_p)
    log_q = torch.log_softmax(student.detach().double(), -1)
    expected = math.log(0.5) - 0.5 * (log_q[0, 0] + torch.logsumexp(log_q[0, 1:], 0))
    assert_close(loss.detach(), expected, 1e-6)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad[0, 0].item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("stored", [False, True])
def test_distillation_keeps_nothing_of_the_logits_size(device, stored):
    student = torch.randn(64, 500, device=device, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(64, 500, device=device), -1)
    values, ids = teacher.topk(4, -1)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if stored:
            losses.top_k_distillation_loss(student, ids, values)
        else:
            losses.distillation_loss(student, teacher)
    inputs = {student.data_ptr(), teacher.data_ptr()}
    assert student.data_ptr() in kept
    assert all(n <= 64 * 4 for where, n in kept.items() if where not in inputs)


@pytest.mark.parametrize(("beta", "direction"), [(0.0, "forward"), (1.0, "reverse")])
def test_the_ends_of_the_jsd_are_the_kls(beta, direction):
    """As TRL's and Liger's trainers have it."""
    student, teacher = torch.randn(2, 4, V)
    hidden, weight = torch.randn(4, 3), torch.randn(V, 3)
    for loss, arguments in (
        (losses.distillation_loss, (student, teacher)),
        (linear_kl_div, (hidden, weight, hidden.flip(0), weight)),
    ):
        expected = loss(*arguments, direction=direction)
        assert torch.equal(loss(*arguments, direction="jsd", beta=beta), expected)


@pytest.mark.parametrize("student_is_wider", [False, True])
def test_vocabularies_of_different_padding(device, student_is_wider):
    """Over the classes that both have, by default, or over those that are asked for."""
    narrow, wide = V, V + 6
    columns = (wide, narrow) if student_is_wider else (narrow, wide)
    student, teacher = (torch.randn(5, n, device=device) for n in columns)
    hidden, teacher_hidden = torch.randn(5, 3, device=device), torch.randn(5, 4, device=device)
    weight, teacher_weight = (
        torch.randn(n, d, device=device) for n, d in zip(columns, (3, 4), strict=True)
    )
    for used in (None, V - 2):
        n = used or narrow
        expected = losses.distillation_loss(student[:, :n], teacher[:, :n])
        actual = losses.distillation_loss(student, teacher, vocab_size=used)
        assert_close(actual, expected, 1e-6)
        head = weight.clone().requires_grad_()
        actual = linear_kl_div(hidden, head, teacher_hidden, teacher_weight, vocab_size=used)
        part = weight[:n].clone().requires_grad_()
        expected = linear_kl_div(hidden, part, teacher_hidden, teacher_weight[:n])
        assert_close(actual.detach(), expected.detach(), 1e-6)
        (grad,), (want,) = (
            torch.autograd.grad(x, y) for x, y in ((actual, head), (expected, part))
        )
        assert_close(grad[:n], want, 1e-6)
        assert (grad[n:] == 0).all()
    with pytest.raises(ValueError, match="vocab_size must be in"):
        losses.distillation_loss(student, teacher, vocab_size=narrow + 1)
    with pytest.raises(ValueError, match="vocab_size must be in"):
        linear_kl_div(hidden, weight, teacher_hidden, teacher_weight, vocab_size=narrow + 1)


def test_a_teacher_that_requires_a_gradient_gets_none():
    student, teacher = torch.randn(2, 4, V).requires_grad_().unbind()
    student, teacher = (t.detach().requires_grad_() for t in (student, teacher))
    ids = torch.zeros(4, 1, dtype=torch.long)
    losses.distillation_loss(student, teacher).backward()
    losses.distillation_loss(student, teacher_log_probs=teacher).backward()
    losses.top_k_distillation_loss(student, ids, teacher[:, :1]).backward()
    assert student.grad is not None
    assert teacher.grad is None
