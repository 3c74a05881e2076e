"""InfoNCE from two views and from one, and ClipLoss, against the whole matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import losses

from .problem import D


def info_nce(q, k, rows, temperature):
    q, k = F.normalize(q.double(), dim=-1), F.normalize(k.double(), dim=-1)
    return F.cross_entropy(q @ k.t() / temperature, rows)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_contrastive(device, symmetric, permuted):
    q, k = torch.randn(2, 19, D, device=device)
    rows = torch.randperm(19, device=device) if permuted else torch.arange(19, device=device)
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    loss = losses.contrastive_loss(
        *leaves, temperature=0.2, symmetric=symmetric, positives=rows if permuted else None
    )
    exact = [q.double().requires_grad_(), k.double().requires_grad_()]
    expected = info_nce(*exact, rows, 0.2)
    if symmetric:
        expected = (expected + info_nce(exact[1], exact[0], rows.argsort(), 0.2)) / 2
    assert_close(loss.detach(), expected.detach(), 1e-5)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact),
                    strict=True):  # fmt: skip
        assert_close(a, b, 1e-5)


def one_view(x, positives, temperature):
    q = F.normalize(x, dim=-1)
    own = torch.eye(len(x), device=x.device, dtype=torch.bool)
    return F.cross_entropy((q @ q.t() / temperature).masked_fill(own, -math.inf), positives)


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
@pytest.mark.parametrize("chunk", [5, 16])
def test_one_view(device, temperature, chunk, monkeypatch):
    """SimCLR: two views of each sample in one batch, no sample its own key."""
    module = losses.contrastive
    right = module.plan
    monkeypatch.setattr(module, "plan", lambda *a, **k: right(*a, chunk_tokens=chunk, **k))
    x = torch.randn(16, D, device=device)
    positives = torch.arange(16, device=device) ^ 1
    leaf = x.clone().requires_grad_()
    scale = torch.tensor(1 / temperature, device=device, requires_grad=True)
    loss = losses.contrastive_loss(leaf, temperature=temperature, positives=positives)
    scaled = losses.contrastive_loss(leaf, logit_scale=scale, positives=positives.int())
    exact = x.double().requires_grad_()
    exact_scale = scale.detach().double().requires_grad_()
    expected = one_view(exact, positives, 1 / exact_scale)
    assert_close(loss.detach(), expected.detach(), 1e-6)
    assert_close(scaled.detach(), expected.detach(), 1e-6)
    (grad,) = torch.autograd.grad(loss, leaf)
    want, want_scale = torch.autograd.grad(expected, (exact, exact_scale))
    assert_close(grad, want, 1e-5)
    assert_close(torch.autograd.grad(scaled, scale)[0], want_scale, 1e-5)


def test_one_view_in_float64(monkeypatch):
    module = losses.contrastive
    right = module.plan
    positives = torch.tensor([1, 0, 3, 2, 0])
    x = torch.randn(5, 3).double().requires_grad_()

    def loss(x):
        return losses.contrastive_loss(x, temperature=0.07, positives=positives)

    assert_close(loss(x).detach(), one_view(x.detach(), positives, 0.07), 1e-12)
    wanted = torch.autograd.grad(loss(x), x)[0]
    assert_close(torch.func.grad(loss)(x.detach()), wanted, 1e-12)
    monkeypatch.setattr(module, "plan", lambda *a, **k: right(*a, chunk_tokens=2, **k))
    assert torch.autograd.gradcheck(loss, x)


def test_one_view_keeps_no_similarities(monkeypatch):
    module = losses.contrastive
    right = module.plan
    monkeypatch.setattr(module, "plan", lambda *a, **k: right(*a, chunk_tokens=8, **k))
    x = torch.randn(64, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1],
                                                  lambda t: t):  # fmt: skip
        losses.contrastive_loss(x, positives=torch.arange(64) ^ 1)
    assert max(kept) <= 64 * D


def test_clip(device):
    module = losses.ClipLoss(0.1).to(device)
    images, texts = torch.randn(2, 11, D, device=device)
    module(images, texts).backward()
    log_scale = module.log_scale.detach().double().requires_grad_()
    q, k = (F.normalize(t.double(), dim=-1) for t in (images, texts))
    logits = q @ k.t() * log_scale.exp()
    rows = torch.arange(11, device=device)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.t(), rows)) / 2
    (want,) = torch.autograd.grad(expected, log_scale)
    assert_close(module.log_scale.grad, want, 1e-5)
    again = losses.ClipLoss()
    again.load_state_dict(module.state_dict())
    assert again.log_scale == module.log_scale


@pytest.mark.parametrize(
    "arguments",
    [
        {"keys": torch.randn(4, D)},
        {"keys": torch.randn(5, D), "temperature": 0.0},
        {"keys": torch.randn(5, D), "temperature": 0.07, "logit_scale": torch.tensor(2.0)},
        {"keys": torch.randn(5, D), "positives": torch.zeros(4).long()},
        {"keys": torch.randn(5, D), "positives": torch.zeros(5).long(), "symmetric": True},
        {},
        {"symmetric": True, "positives": torch.zeros(5).long()},
        {"positives": torch.tensor([1, 0, 3, 2, 4])},  # the last its own
    ],
)
def test_contrastive_bad_input(arguments):
    with pytest.raises(ValueError):
        losses.contrastive_loss(torch.randn(5, D), **arguments)


@pytest.mark.parametrize("keys", [None, torch.randn(3, D)])
@pytest.mark.parametrize("wrong", [-100, -1, 3])
def test_a_positive_that_is_no_row(keys, wrong):
    """-100, too: it is not what the cross entropies ignore."""
    with pytest.raises(IndexError, match=f"Target {wrong} at position 1"):
        losses.contrastive_loss(torch.randn(3, D), keys, positives=torch.tensor([1, wrong, 0]))


def test_one_view_of_one_row():
    with pytest.raises(ValueError, match="at least two rows"):
        losses.contrastive_loss(torch.randn(1, D), positives=torch.zeros(1).long())


def test_no_row_at_all():
    with pytest.raises(ValueError, match="queries hold no row"):
        losses.contrastive_loss(torch.randn(0, D), torch.randn(0, D))


def test_a_key_that_is_nobodys_is_seen_in_a_graph():
    """Where no value can be looked at, the loss says so and reads no memory that nobody wrote."""
    twice = torch.tensor([0, 0, 1])
    q, k = torch.randn(2, 3, D)
    run = torch.compile(
        lambda: losses.contrastive_loss(q, k, positives=twice, symmetric=True), backend="eager"
    )
    with pytest.raises(IndexError):
        run()


def test_positives_of_int32(device):
    q, k = torch.randn(2, 5, D, device=device)
    rows = torch.randperm(5, device=device)
    one, other = (
        losses.contrastive_loss(q, k, positives=r, symmetric=True) for r in (rows, rows.int())
    )
    assert torch.equal(one, other)


def test_the_scale_of_clip_comes_back():
    module = losses.ClipLoss(0.1, max_scale=20.0)
    with torch.no_grad():
        module.log_scale.fill_(math.log(500.0))
    images, texts = torch.randn(2, 9, D)  # do not match: a smaller scale is better
    loss = module(images, texts)
    loss.backward()
    expected = losses.contrastive_loss(images, texts, temperature=1 / 20, symmetric=True)
    assert_close(loss.detach(), expected, 1e-5)
    assert module.log_scale.grad > 0
    module.log_scale.grad = None
    module(images, images).backward()  # match: no further above
    assert module.log_scale.grad == 0
    with pytest.raises(ValueError, match="exceeds max_scale"):
        losses.ClipLoss(0.001)
