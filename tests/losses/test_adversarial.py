"""Adversarial losses against their papers, in float64; penalties; the policy's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses

KINDS = ["logistic", "hinge", "least_squares", "wasserstein"]


def of_papers(kind, real, fake):
    """(discriminator, generator), number by number."""
    n, m = len(real), len(fake)
    if kind == "logistic":
        d = -sum(math.log(1 / (1 + math.exp(-r))) for r in real) / n
        d -= sum(math.log(1 - 1 / (1 + math.exp(-f))) for f in fake) / m
        return d, -sum(math.log(1 / (1 + math.exp(-f))) for f in fake) / m
    if kind == "hinge":
        d = sum(max(0, 1 - r) for r in real) / n + sum(max(0, 1 + f) for f in fake) / m
        return d, -sum(fake) / m
    if kind == "least_squares":
        d = sum((r - 1) ** 2 for r in real) / (2 * n) + sum(f**2 for f in fake) / (2 * m)
        return d, sum((f - 1) ** 2 for f in fake) / (2 * m)
    return sum(fake) / m - sum(real) / n, -sum(fake) / m


SCORES = st.lists(st.floats(-20, 20), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@hypothesis.given(SCORES, SCORES)
def test_against_the_papers(kind, real, fake):
    r, f = (torch.tensor(x, dtype=torch.double, requires_grad=True) for x in (real, fake))
    judged, made = losses.discriminator_loss(r, f, kind=kind), losses.generator_loss(f, kind=kind)
    of_d, of_g = of_papers(kind, real, fake)
    assert_close(judged.loss, torch.tensor(of_d, dtype=torch.double), 1e-9)
    assert_close(made.loss, torch.tensor(of_g, dtype=torch.double), 1e-9)
    assert_close(judged.real_score, r.detach().mean(), 1e-12)
    assert_close(judged.fake_score, f.detach().mean(), 1e-12)
    assert torch.equal(made.fake_score, judged.fake_score)
    assert not any(x.requires_grad for x in (*judged[1:], *made[1:]))
    edge = {
        "least_squares": 0.5,
        "wasserstein": (sum(real) / len(real) + sum(fake) / len(fake)) / 2,
    }
    edge = edge.get(kind, 0.0)
    if all(abs(x - edge) > 1e-9 for x in real + fake):
        right = sum(x > edge for x in real) / len(real) + sum(x < edge for x in fake) / len(fake)
        assert_close(judged.accuracy, torch.tensor(right / 2, dtype=torch.double), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind):
    torch.manual_seed(0)
    r, f = (torch.randn(4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *x: losses.discriminator_loss(*x, kind=kind).loss, (r, f)
    )
    assert torch.autograd.gradcheck(lambda x: losses.generator_loss(x, kind=kind).loss, f)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_masked_scores_and_micro_batches(kind, dtype, value):
    torch.manual_seed(0)
    r, f = (torch.randn(4, 6).to(dtype) for _ in range(2))
    masks = [torch.rand(4, 6) < 0.6 for _ in range(2)]
    plain = losses.discriminator_loss(r[masks[0]], f[masks[1]], kind=kind)
    spoilt = [x.masked_fill(~m, value).requires_grad_() for x, m in zip((r, f), masks, strict=True)]
    found = losses.discriminator_loss(*spoilt, kind=kind, real_mask=masks[0], fake_mask=masks[1])
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == torch.float32
        assert_close(one.detach(), other, 1e-6)
    for grad, m in zip(torch.autograd.grad(found.loss, spoilt), masks, strict=True):
        assert grad.isfinite().all()
        assert (grad[~m] == 0).all()
    counts = tuple(int(m.sum()) for m in masks)
    parts = [
        losses.discriminator_loss(
            spoilt[0][rows], spoilt[1][rows], kind=kind, real_mask=masks[0][rows],
            fake_mask=masks[1][rows], num_items=counts,
        ).loss
        for rows in (slice(0, 1), slice(1, 4), slice(4, 4))
    ]  # fmt: skip
    assert_close(sum(parts).detach(), plain.loss, 1e-6)
    of_g = losses.generator_loss(spoilt[1], kind=kind, mask=masks[1])
    assert_close(of_g.loss.detach(), losses.generator_loss(f[masks[1]], kind=kind).loss, 1e-6)
    zero = losses.generator_loss(spoilt[1], kind=kind, mask=masks[1] & False, num_items=0)
    assert zero.loss == 0
    assert losses.generator_loss(f, kind=kind, mask=masks[1] & False).loss.isnan()


def test_confident_scores_keep_their_digits():
    score = torch.tensor([25.0], dtype=torch.double, requires_grad=True)
    loss = losses.generator_loss(score).loss
    assert loss.item() == pytest.approx(math.exp(-25), rel=1e-9)
    (grad,) = torch.autograd.grad(loss, score)
    assert grad.item() == pytest.approx(-math.exp(-25), rel=1e-9)
    both = losses.discriminator_loss(score.detach(), -score.detach()).loss
    assert both.item() == pytest.approx(2 * math.exp(-25), rel=1e-9)


def test_large_scores_stay_finite():
    huge = torch.full((2,), 3e38, requires_grad=True)
    for kind in KINDS:
        loss = losses.discriminator_loss(-huge, huge, kind=kind).loss
        assert loss.isfinite()
        assert torch.autograd.grad(loss, huge)[0].isfinite().all()


class Quadratic(torch.nn.Module):
    """A score whose gradient is known: x' A x / 2 + b x, of (..., 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        half = torch.randn(3, 3).double()
        self.a = torch.nn.Parameter(half + half.t())
        self.b = torch.nn.Parameter(torch.randn(3).double())

    def forward(self, x):
        return ((x @ self.a) * x).sum(-1) / 2 + x @ self.b

    def slope(self, x):
        return x @ (self.a + self.a.t()) / 2 + self.b


def test_a_gradient_penalty_is_that_of_interpolates():
    critic = Quadratic()
    real, fake = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    found = losses.gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(3))
    u = torch.rand(5, 1, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    x = u * real + (1 - u) * fake
    wanted = (critic.slope(x).norm(dim=1) - 1).square().mean()
    assert_close(found, wanted, 1e-12)
    parameters = list(critic.parameters())
    grads = [torch.autograd.grad(loss, parameters) for loss in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, 1e-10)
    of_real = losses.r1_penalty(critic, real)
    assert_close(of_real, critic.slope(real).square().sum(1).mean() / 2, 1e-12)
    with torch.no_grad():
        assert losses.r1_penalty(critic, real) == of_real


def test_penalties_of_texts_of_several_lengths():
    """(B, S, 3): positions that are masked hold anything; a text of none takes no part."""
    critic = Quadratic()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    real, fake = torch.randn(3, 3, 3).double(), torch.randn(3, 3, 3).double()
    norms = [
        (critic.slope(real[b, :n]).square().sum().sqrt() - 1).square() for b, n in ((0, 2), (2, 3))
    ]
    real[~mask] = fake[~mask] = float("nan")
    fake[mask] = real[mask]  # whatever u is
    found = losses.gradient_penalty(critic, real, fake, mask=mask)
    assert_close(found, torch.stack(norms).mean(), 1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, list(critic.parameters())))
    squares = [critic.slope(real[b, :n]).square().sum() / 2 for b, n in ((0, 2), (2, 3))]
    assert_close(losses.r1_penalty(critic, real, mask=mask), sum(squares) / 2, 1e-12)
    assert_close(losses.r1_penalty(critic, real, mask=mask, num_items=5), sum(squares) / 5, 1e-12)
    assert_close(
        losses.r1_penalty(critic, real[[0, 2], 0], mask=torch.tensor([True, False])),
        critic.slope(real[0, 0]).square().sum() / 2, 1e-12,
    )  # fmt: skip


def test_a_flat_discriminator_has_a_finite_gradient():
    flat = torch.nn.Linear(3, 1)
    torch.nn.init.zeros_(flat.weight)
    penalty = losses.gradient_penalty(flat, torch.randn(2, 3), torch.randn(2, 3))
    assert penalty == 1
    assert torch.autograd.grad(penalty, flat.weight)[0].isfinite().all()


def brute_force(log_probs, rewards, mask, baseline):
    """-(R - b) log pi over the tokens that count, one by one."""
    total, count = 0.0, 0
    for b, t in torch.nonzero(mask).tolist():
        of_token = rewards.dim() == 2
        column = mask[:, t] if of_token else mask.any(-1)
        every = [(rewards[i, t] if of_token else rewards[i]).item()
                 for i in range(len(mask)) if column[i]]  # fmt: skip
        own = (rewards[b, t] if of_token else rewards[b]).item()
        if baseline == "mean":
            least = sum(every) / len(every)
        elif baseline == "leave_one_out":
            least = (sum(every) - own) / (len(every) - 1) if len(every) > 1 else own
        else:
            least = 0.0 if baseline is None else float(baseline)
        total += -(own - least) * log_probs[b, t]
        count += 1
    return total / count


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", None, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("by_token", [True, False])
@SETTINGS
@hypothesis.given(st.integers(0, 1000))
def test_policy_gradient(baseline, by_token, seed):
    torch.manual_seed(seed)
    leaf = (-torch.rand(4, 3).double()).requires_grad_()
    rewards = torch.randn(4, 3).double() if by_token else torch.randn(4).double()
    mask = torch.rand(4, 3) < 0.6
    mask[0, 0] = True
    mask[3] = False
    clean = rewards.clone()
    rewards[~mask if by_token else ~mask.any(-1)] = float("nan")
    spoilt = torch.where(mask, leaf, float("-inf"))
    found = losses.policy_gradient_loss(spoilt, rewards, mask, baseline=baseline)
    wanted = brute_force(leaf, clean, mask, baseline)
    assert_close(found.loss, wanted, 1e-12)
    (one,), (other,) = (torch.autograd.grad(x, leaf) for x in (found.loss, wanted))
    assert_close(one, other, 1e-12)
    every = clean if by_token else clean[:, None].expand(4, 3)
    assert_close(found.reward, every[mask].mean(), 1e-12)
    assert not any(x.requires_grad for x in found[1:])


def test_a_policy_gradient_is_that_of_the_expected_reward():
    """Over all texts of two letters, each as often as it is likely."""
    logits = torch.randn(5, dtype=torch.double, requires_grad=True)
    reward = torch.randn(5).double()
    log_p = torch.log_softmax(logits, -1)
    (wanted,) = torch.autograd.grad(-(log_p.exp() * reward).sum(), logits, retain_graph=True)
    for shift in (0.0, 2.0):  # a baseline changes nothing in the mean
        loss = sum(
            log_p[i].exp().detach()
            * losses.policy_gradient_loss(
                log_p[i].view(1, 1), reward[i].view(1), torch.ones(1, 1),
                baseline=torch.tensor(shift),
            ).loss
            for i in range(5)
        )  # fmt: skip
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert_close(found, wanted, 1e-12)


def test_what_does_not_fit():
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: losses.generator_loss(x, kind="wgan"), "kind must be one of"),
        (lambda: losses.discriminator_loss(x, x, real_mask=x[0]), "mask must have the shape"),
        (lambda: losses.gradient_penalty(torch.nn.Identity(), x, x[0]), "one shape"),
        (lambda: losses.r1_penalty(lambda t: t.sum(), x), "scores of 2 samples"),
        (lambda: losses.r1_penalty(torch.nn.Identity(), x.long()), "floating point"),
        (lambda: losses.r1_penalty(torch.nn.Identity(), x, mask=x[:, 0][:1]), "first dimensions"),
        (lambda: losses.policy_gradient_loss(x, x[0], x), "rewards"),
        (lambda: losses.policy_gradient_loss(x, x, x, baseline="max"), "baseline must be"),
        (lambda: losses.policy_gradient_loss(x, x, x, baseline=x[0]), "baseline must have"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
