"""On-policy reverse KL: a policy gradient whose expectation is the KL's."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import FLOATS, assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext.losses import sampled_reverse_kl

B, S, V = 3, 6, 4


def tensors(dtype=torch.double):
    torch.manual_seed(0)
    student, teacher, old = -torch.rand(3, B, S).to(dtype) * 3
    old = student + 0.3 * (old + 1.5)
    mask = torch.rand(B, S) < 0.7
    mask[0, 0], mask[1, 1] = True, False
    return student.requires_grad_(), teacher, old, mask


def expectation(of, q):
    """Over one token sampled from q: sum over tokens of q(token) of(token)."""
    return sum(q[i] * of(i) for i in range(V))


@pytest.mark.parametrize("off_policy", [False, True])
def test_value_and_gradient_are_those_of_the_kl_in_expectation(off_policy):
    """Every token that may be sampled, weighted by its probability: no luck is involved."""
    torch.manual_seed(1)
    logits = torch.randn(V, dtype=torch.double, requires_grad=True)
    log_p = torch.log_softmax(torch.randn(V, dtype=torch.double), -1)
    q = torch.softmax(logits, -1)
    kl = (q * (q.log() - log_p)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    sampler = torch.softmax(torch.randn(V, dtype=torch.double), -1) if off_policy else q.detach()

    def of(i):
        old = sampler.log()[i].reshape(1, 1) if off_policy else None
        log_q = torch.log_softmax(logits, -1)[i].reshape(1, 1)
        return sampled_reverse_kl(
            log_q, log_p[i].reshape(1, 1), torch.ones(1, 1), old_log_probs=old
        ).loss

    mean = expectation(of, sampler)
    assert_close(mean, kl, 1e-12)
    (grad,) = torch.autograd.grad(mean, logits, retain_graph=True)
    assert_close(grad, wanted, 1e-12)
    # To differentiate k1 would teach nothing.
    naive = expectation(lambda i: torch.log_softmax(logits, -1)[i] - log_p[i], q.detach())
    (nothing,) = torch.autograd.grad(naive, logits)
    assert_close(nothing, torch.zeros(V), 1e-12)


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_against_the_definition(with_old, epsilon, clamp):
    student, teacher, old, mask = tensors()
    options = {"old_log_probs": old if with_old else None, "epsilon": epsilon,
               "epsilon_high": epsilon and 0.2, "loss_max_clamp": clamp}  # fmt: skip
    found = sampled_reverse_kl(student, teacher, mask, **options)
    total, clipped = 0.0, 0
    for at in mask.nonzero().tolist():
        log_q, log_p, log_old = (t[tuple(at)] for t in (student, teacher, old))
        advantage = (log_p - log_q).detach()
        if clamp:
            advantage = advantage.clamp(-clamp, clamp)
        r = torch.exp(log_q - (log_old if with_old else log_q.detach()))
        gain = r * advantage
        if epsilon:
            bounded = r.clamp(0.9, 1.2) * advantage
            clipped += int(bounded < gain)
            gain = torch.minimum(gain, bounded)
        total = total - gain
    count = mask.sum()
    assert_close(found.loss, total / count, 1e-12)
    (grad,), (want,) = (
        torch.autograd.grad(x, student, retain_graph=True) for x in (found.loss, total / count)
    )
    assert_close(grad, want, 1e-12)
    assert (grad[~mask] == 0).all()
    assert_close(found.reverse_kl, (student - teacher)[mask].mean(), 1e-12)
    assert_close(found.clip_fraction, torch.tensor(clipped / count.item()), 1e-6)
    if with_old and epsilon:
        assert clipped
    assert not found.reverse_kl.requires_grad
    assert not found.clip_fraction.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything(value):
    results = []
    for spoilt in (False, True):
        *given, mask = tensors()
        given = [t.detach().clone() for t in given]
        if spoilt:
            for t in given:
                t[~mask] = value
        leaf = given[0].requires_grad_()
        found = sampled_reverse_kl(leaf, given[1], mask, old_log_probs=given[2], epsilon=0.2)
        results.append((*(t.detach() for t in found), torch.autograd.grad(found.loss, leaf)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
@SETTINGS
@hypothesis.given(st.lists(st.floats(-1e4, 0), min_size=9, max_size=9))
def test_finite_log_probabilities_give_finite_results(dtype, numbers):
    student, teacher, old = torch.tensor(numbers).to(dtype).reshape(3, 1, 3)
    for extra in ({}, {"epsilon": 0.2}, {"loss_max_clamp": 10.0}):
        leaf = student.clone().requires_grad_()
        found = sampled_reverse_kl(leaf, teacher, torch.ones(1, 3), old_log_probs=old, **extra)
        assert all(t.isfinite().all() for t in found)
        assert found.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (grad,) = torch.autograd.grad(found.loss, leaf)
        assert grad.isfinite().all()


def test_micro_batches_add_up():
    student, teacher, old, mask = tensors()
    given = {"old_log_probs": old, "epsilon": 0.2}
    whole = sampled_reverse_kl(student, teacher, mask, **given).loss
    for items in (int(mask.sum()), mask.sum()):
        parts = sum(
            sampled_reverse_kl(
                student[i : i + 1], teacher[i : i + 1], mask[i : i + 1],
                old_log_probs=old[i : i + 1], epsilon=0.2, num_items=items,
            ).loss
            for i in range(B)
        )  # fmt: skip
        assert_close(parts, whole, 1e-12)
        grads = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (parts, whole)]
        assert_close(*grads, 1e-12)
    nothing = torch.zeros_like(mask)
    assert sampled_reverse_kl(student, teacher, nothing).loss.isnan()
    assert sampled_reverse_kl(student, teacher, nothing, num_items=0).loss == 0


def test_teacher_and_sampler_get_no_gradient_and_it_compiles():
    student, teacher, old, mask = tensors()
    teacher.requires_grad_()
    old = old.detach().requires_grad_()

    def loss(x):
        return sampled_reverse_kl(x, teacher, mask, old_log_probs=old, epsilon=0.2).loss

    loss(student).backward()
    assert teacher.grad is None
    assert old.grad is None
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(student), student)
    assert_close(grad, student.grad, 1e-12)


def test_a_student_learns_its_teacher_from_its_own_samples():
    torch.manual_seed(0)
    logits = torch.zeros(V, requires_grad=True)
    log_p = torch.log_softmax(torch.randn(V) * 2, -1)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        log_q = torch.log_softmax(logits, -1)
        ids = torch.multinomial(log_q.detach().exp(), 64, replacement=True)
        found = sampled_reverse_kl(log_q[ids][None], log_p[ids][None], torch.ones(1, 64))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    log_q = torch.log_softmax(logits.detach(), -1)
    assert (log_q.exp() * (log_q - log_p)).sum() < 0.01


def test_what_does_not_fit():
    student, teacher, old, mask = tensors()
    for wrong in ({"epsilon": 0.0}, {"epsilon_high": 0.2}, {"epsilon": 0.1, "epsilon_high": -1.0},
                  {"loss_max_clamp": 0.0}, {"epsilon": math.nan}, {"old_log_probs": old[0]},
                  {"num_items": -1}):  # fmt: skip
        with pytest.raises(ValueError):
            sampled_reverse_kl(student, teacher, mask, **wrong)
    with pytest.raises(ValueError):
        sampled_reverse_kl(student, teacher[0], mask)
    with pytest.raises(ValueError):
        sampled_reverse_kl(student, teacher, mask[0])
