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
def test_against_torchs_kl_div(device, direction):
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


DIRECTIONS = ["forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse"]


def by_definition(p, q, direction, beta=0.5, alpha=0.1):
    """The divergence of probabilities (..., V) in float64, with 0 log 0 = 0."""

    def kl(a, b):
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)

    m = beta * p + (1 - beta) * q
    jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "jsd": jsd,
        "tvd": (p - q).abs().sum(-1) / 2,
        "skew_forward": kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse": kl(q, alpha * q + (1 - alpha) * p),
    }[direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["whole", "strided", "four dimensions"])
def test_distillation_reads_rows_in_place(device, direction, kind, monkeypatch):
    """A chunk of rows is all that is copied, and its gradient is that of the whole."""
    from llmloss_ext import rowwise

    seen, right = [], rowwise.masked
    monkeypatch.setattr(rowwise, "COPIES", 1000)  # chunks of one row

    def masked(function, valid, *inputs, **shared):
        seen.append(len(inputs[0]))
        return right(function, valid, *inputs, **shared)

    monkeypatch.setattr(rowwise, "masked", masked)
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
    student, teacher = (torch.randn(4, V, requires_grad=True) for _ in range(2))
    ids = torch.zeros(4, 1, dtype=torch.long)
    losses.distillation_loss(student, teacher).backward()
    losses.distillation_loss(student, teacher_log_probs=teacher).backward()
    losses.top_k_distillation_loss(student, ids, teacher[:, :1]).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_the_definition(device, direction, temperature):
    student, teacher = (torch.randn(B, S, V, device=device).double() * 2 for _ in range(2))
    leaf = student.requires_grad_()
    options = {"direction": direction, "temperature": temperature, "beta": 0.3, "skew_alpha": 0.2}
    q, p = (torch.softmax(x / temperature, -1) for x in (leaf, teacher))
    wanted = by_definition(p, q, direction, 0.3, 0.2).mean() * temperature**2
    (want,) = torch.autograd.grad(wanted, leaf)
    for given in (
        {"teacher_logits": teacher},
        {"teacher_log_probs": torch.log_softmax(teacher / temperature, -1)},
    ):
        loss = losses.distillation_loss(leaf, **given, **options)
        assert_close(loss, wanted, 1e-12)
        assert_close(torch.autograd.grad(loss, leaf)[0], want, 1e-12)
    assert torch.autograd.gradcheck(lambda x: losses.distillation_loss(x, teacher, **options), leaf)


@pytest.mark.parametrize("name", ["skew_forward", "skew_reverse"])
def test_a_skew_of_0_is_the_kl(name):
    student, teacher = torch.randn(2, 4, V)
    expected = losses.distillation_loss(student, teacher, direction=name.removeprefix("skew_"))
    found = losses.distillation_loss(student, teacher, direction=name, skew_alpha=0.0)
    assert torch.equal(found, expected)
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="skew_alpha"):
            losses.distillation_loss(student, teacher, direction=name, skew_alpha=wrong)


@pytest.mark.parametrize("direction", ["tvd", "skew_forward", "skew_reverse", "jsd"])
def test_divergences_that_are_finite_where_the_supports_differ(device, direction):
    """What one rules out the other may have: the KLs would be infinite."""
    student, teacher = torch.randn(2, 4, V, device=device)
    student[:, 0], teacher[:, 1] = -math.inf, -math.inf
    student[0, 2:] = -math.inf  # the supports have nothing in common but for column 1
    leaf = student.requires_grad_()
    loss = losses.distillation_loss(leaf, teacher, direction=direction)
    q, p = (torch.softmax(x.double(), -1) for x in (leaf.detach(), teacher))
    assert_close(loss, by_definition(p, q, direction).mean(), 1e-5)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_16_bits_and_of_other_padding(device, direction, dtype):
    student = torch.randn(5, V, device=device).to(dtype).requires_grad_()
    stored = torch.log_softmax(torch.randn(5, V + 3, device=device), -1).to(dtype)
    loss = losses.distillation_loss(student, teacher_log_probs=stored, direction=direction)
    exact = student.detach().double().requires_grad_()
    p = torch.softmax(stored.double()[:, :V], -1)
    wanted = by_definition(p, torch.softmax(exact, -1), direction).mean()
    assert_close(loss, wanted, 1e-5)
    (grad,), (want,) = torch.autograd.grad(loss, student), torch.autograd.grad(wanted, exact)
    assert (grad.double() - want).norm() < 5e-3 * want.norm()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_stored_top_k_renormalised(device, direction, temperature):
    """Both given that the token is one of the k: TRL's loss without a tail."""
    student = torch.randn(B, S, V, device=device).double().requires_grad_()
    log_p = torch.log_softmax(torch.randn(B, S, V, device=device).double() * 3 / temperature, -1)
    values, ids = log_p.topk(5, -1)
    loss = losses.top_k_distillation_loss(
        student, ids, values, direction=direction, temperature=temperature, add_tail=False
    )
    p = values.exp() / values.exp().sum(-1, keepdim=True)
    q = torch.softmax(student / temperature, -1).gather(-1, ids)
    q = q / q.sum(-1, keepdim=True)
    wanted = by_definition(p, q, direction).mean() * temperature**2
    assert_close(loss, wanted, 1e-12)
    grads = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, wanted)]
    assert_close(*grads, 1e-12)
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, ids, False)
    assert (grads[0][others] == 0).all()


def test_a_teacher_is_given_once():
    student, teacher = torch.randn(2, 4, V)
    for given in ({}, {"teacher_logits": teacher, "teacher_log_probs": teacher}):
        with pytest.raises(ValueError, match="teacher_logits or as teacher_log_probs"):
            losses.distillation_loss(student, **given)


TEACHERS = ["logits", "log_probs", "top k", "top k alone"]


def teacher_of(kind, logits, temperature):
    if kind == "logits":
        return {"teacher_logits": logits}
    log_p = torch.log_softmax(logits / temperature, -1)
    if kind == "log_probs":
        return {"teacher_logits": None, "teacher_log_probs": log_p}
    values, ids = log_p.topk(4, -1)
    return {
        "teacher_logits": None, "teacher_log_probs": values, "teacher_ids": ids,
        "add_tail": kind == "top k",
    }  # fmt: skip


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 2.0), (1.5, 0.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hard_and_soft(device, kind, weights, reduction):
    hard_weight, soft_weight = weights
    student = torch.randn(B, S, V, device=device).double().requires_grad_()
    teacher = torch.randn(B, S, V, device=device).double()
    target = torch.randint(0, V, (B, S), device=device)
    target[0, 1] = target[2] = -100
    keep = target != -100
    found = losses.hard_soft_distillation_loss(
        student, **teacher_of(kind, teacher, 2.0), target=target, weight_hard_loss=hard_weight,
        weight_soft_loss=soft_weight, temperature=2.0, direction="reverse", reduction=reduction,
    )  # fmt: skip
    hard = -torch.log_softmax(student, -1)[keep, target[keep]]
    q, p = (torch.softmax(x / 2, -1) for x in (student, teacher))
    if "top" in kind:
        ids = teacher.topk(4, -1).indices
        q, p = (x.gather(-1, ids) for x in (q, p))
        if kind == "top k":
            q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
        q, p = (x / x.sum(-1, keepdim=True) for x in (q, p))
    soft = 4 * by_definition(p, q, "reverse")[keep]
    parts = [x if weight else 0 * x for x, weight in zip((hard, soft), weights, strict=True)]
    rows = hard_weight * parts[0] + soft_weight * parts[1]
    if reduction != "none":
        rows, *parts = (getattr(x, reduction)() for x in (rows, *parts))
        values = found
    else:
        assert all((x[~keep] == 0).all() for x in found)
        values = [x[keep] for x in found]
    for one, other in zip(values, (rows, *parts), strict=True):
        assert_close(one, other, 1e-11)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (found.loss, rows)]
    assert_close(*grads, 1e-11)
    assert not found.hard_loss.requires_grad
    assert not found.soft_loss.requires_grad


def test_what_hard_and_soft_refuse():
    student, teacher = torch.randn(2, 4, V)
    target = torch.zeros(4, dtype=torch.long)

    def call(**changes):
        given = {"teacher_logits": teacher, "target": target} | changes
        return losses.hard_soft_distillation_loss(student, **given)

    for wrong in (
        {"weight_hard_loss": -1.0}, {"weight_soft_loss": math.inf}, {"teacher_log_probs": teacher},
        {"weight_hard_loss": 0.0, "weight_soft_loss": 0.0}, {"teacher_ids": target},
        {"target": target[1:]}, {"teacher_logits": None}, {"reduction": "x"},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call(**wrong)
    with pytest.raises(IndexError):
        call(target=target + V)
