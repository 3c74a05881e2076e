"""Conflicts of gradients, against the papers' algorithms on the gradients themselves."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st
from scipy.optimize import minimize

from llmloss_ext import losses


def gram_of(seed, tasks, size=6):
    torch.manual_seed(seed)
    g = torch.randn(tasks, size).double() * torch.logspace(-1, 1, tasks).double()[:, None]
    return g, g @ g.t()


@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([1e-20, 1.0, 1e20]))
def test_the_shortest_combination(seed, tasks, scale):
    """By the condition that holds there and nowhere else: no gradient has a smaller product."""
    g, gram = gram_of(seed, tasks)
    w = losses.min_norm_weights(gram * scale)
    assert_close(w.sum(), torch.tensor(1.0), 1e-12)
    assert (w >= 0).all()
    shortest = w @ g
    square = shortest @ shortest
    assert (g @ shortest >= square - 1e-11 * gram.diagonal().max()).all()


@SETTINGS
@hypothesis.given(st.integers(0, 10_000))
def test_of_two_it_is_the_closed_form(seed):
    """Algorithm 1 of Sener and Koltun 2018."""
    (a, b), gram = gram_of(seed, 2)
    if a @ b >= a @ a:
        wanted = 1.0
    elif a @ b >= b @ b:
        wanted = 0.0
    else:
        wanted = float((b - a) @ b / ((a - b) @ (a - b)))
    found = losses.min_norm_weights(gram)
    assert_close(found[0], torch.tensor(wanted), 1e-7)


def test_against_a_solver():
    _, gram = gram_of(7, 4)
    solved = minimize(
        lambda w: w @ gram.numpy() @ w, [0.25] * 4, bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12,
    )  # fmt: skip
    assert_close(losses.min_norm_weights(gram), torch.tensor(solved.x), 1e-4)


def test_of_special_gradients():
    zeros = losses.min_norm_weights(torch.zeros(3, 3))
    assert_close(zeros.sum(), torch.tensor(1.0), 1e-6)
    same = losses.min_norm_weights(torch.ones(3, 3))
    assert_close(same.sum(), torch.tensor(1.0), 1e-6)
    batch = torch.stack([gram_of(s, 3)[1] for s in range(4)])
    found = losses.min_norm_weights(batch)
    assert_close(found, torch.stack([losses.min_norm_weights(x) for x in batch]), 1e-12)
    with pytest.raises(ValueError, match="Gram matrix"):
        losses.min_norm_weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="one Gram matrix"):
        losses.pcgrad_weights(batch)


@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.integers(1, 5))
def test_pcgrad(seed, tasks):
    """Algorithm 1 of Yu et al. 2020, on the gradients."""
    g, gram = gram_of(seed, tasks)
    found = losses.pcgrad_weights(gram, generator=torch.Generator().manual_seed(seed)) @ g
    order, total = torch.Generator().manual_seed(seed), torch.zeros(6).double()
    for i in range(tasks):
        left = g[i].clone()
        for j in torch.randperm(tasks, generator=order).tolist():
            if j != i and left @ g[j] < 0:
                left -= (left @ g[j]) / (g[j] @ g[j]) * g[j]
        total += left
    assert_close(found, total, 1e-9)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(5, 4).double()
        self.head = torch.nn.Linear(4, 3, bias=False).double()
        self.other = torch.nn.Linear(4, 2).double()

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        a, b = self.head(hidden), self.other(hidden)
        return {
            "square": a.square().mean() * 3, "linear": -a.sum() / 10,
            "other": lambda: (b.sum() - a[:, 0].sum()) / 20,
        }, hidden  # fmt: skip


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()


def each_gradient(model, parameters, factors):
    rows = []
    for name, factor in factors.items():
        terms, _ = model(X)
        term = terms[name]() if callable(terms[name]) else terms[name]
        grads = torch.autograd.grad(term * factor, parameters, allow_unused=True)
        rows.append(torch.cat([
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]))  # fmt: skip
    return torch.stack(rows)


FACTORS = {"square": 1.0, "linear": 2.0, "other": 0.5}


def coefficients(method, gram):
    if method == "mgda":
        return losses.min_norm_weights(gram)
    if method == "pcgrad":
        return losses.pcgrad_weights(gram, generator=torch.Generator().manual_seed(5))
    return torch.ones(len(gram)).double()


def smallest_cosine(g):
    n = torch.nn.functional.normalize(g, dim=1)
    return torch.stack([n[i] @ n[j] for i, j in itertools.combinations(range(len(g)), 2)]).min()


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "sum"])
@pytest.mark.parametrize("near", ["all", "head", "hidden"])
def test_the_losss_backward_is_the_combined_gradient(method, near):
    model = Model()
    parameters = list(model.parameters())
    terms, hidden = model(X)
    of = {"all": parameters, "head": [model.head.weight], "hidden": [hidden]}[near]
    found = losses.conflict_loss(
        terms, of, method=method, weights=FACTORS, generator=torch.Generator().manual_seed(5)
    )
    whole = each_gradient(model, parameters, FACTORS)
    if near == "hidden":
        fresh, hidden = model(X)
        values = [t() if callable(t) else t for t in fresh.values()]
        g = torch.stack([
            torch.autograd.grad(v * f, hidden, retain_graph=True)[0].flatten()
            for v, f in zip(values, FACTORS.values(), strict=True)
        ])  # fmt: skip
    else:
        g = each_gradient(model, of, FACTORS)
    w = coefficients(method, g @ g.t())
    assert_close(torch.stack(list(found.weights.values())), w, 1e-9)
    assert_close(found.cosine, smallest_cosine(g), 1e-9)
    grads = torch.autograd.grad(found.total, parameters)
    assert_close(torch.cat([x.flatten() for x in grads]), w @ whole, 1e-9)
    assert set(found.terms) == set(FACTORS)
    assert not any(t.requires_grad for t in (*found.terms.values(), *found.weights.values()))


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "sum"])
@pytest.mark.parametrize("grouped", [False, True])
def test_backward_adds_to_each_groups_gradients(method, grouped):
    model = Model()
    body, head = list(model.body.parameters()), list(model.head.parameters())
    groups = [body, head] if grouped else [body + head]
    given = [{"params": p, "lr": 1.0} for p in groups] if grouped else groups[0]
    order = torch.Generator().manual_seed(5)
    found = losses.conflict_backward(
        model(X)[0], given, method=method, weights=FACTORS, generator=order
    )
    again = torch.Generator().manual_seed(5)
    for place, group in enumerate(groups):
        g = each_gradient(model, group, FACTORS)
        w = {
            "mgda": lambda gram: losses.min_norm_weights(gram),
            "pcgrad": lambda gram: losses.pcgrad_weights(gram, generator=again),
            "sum": lambda gram: torch.ones(3).double(),
        }[method](g @ g.t())
        assert_close(torch.cat([p.grad.flatten() for p in group]), w @ g, 1e-9)
        of_group = [x[place] if grouped else x for x in found.weights.values()]
        assert_close(torch.stack(of_group), w, 1e-9)
        assert_close(found.cosine[place] if grouped else found.cosine, smallest_cosine(g), 1e-9)
    assert all(p.grad is None for p in model.other.parameters())
    assert not found.total.requires_grad
    before = [p.grad.clone() for p in body]
    losses.conflict_backward(model(X)[0], body, method="sum", weights=FACTORS)
    plain = each_gradient(model, body, FACTORS).sum(0)
    added = torch.cat([(p.grad - b).flatten() for p, b in zip(body, before, strict=True)])
    assert_close(added, plain, 1e-9)


def test_a_term_of_weight_0_is_not_computed():
    def never():
        raise AssertionError

    x = torch.ones(2, requires_grad=True)
    terms = {"a": x.sum(), "b": never, "c": x.sum() * math.nan}
    weights = {"a": 1.0, "b": 0.0, "c": 0.0}
    for call in (losses.conflict_loss, losses.conflict_backward):
        found = call(terms, [x], weights=weights)
        assert list(found.terms) == ["a"]
        assert found.weights["a"] == 1
        assert found.total == 2
    assert x.grad.tolist() == [1.0, 1.0]


def test_training_with_mgda_finds_a_compromise():
    """Of (x - 1)^2 and (x + 1)^2, summed with 100 to 1: every point between is a compromise."""
    x = torch.tensor([3.0], requires_grad=True)
    for _ in range(200):
        terms = {"a": (x - 1).square().sum() * 100, "b": (x + 1).square().sum()}
        x.grad = None
        losses.conflict_loss(terms, [x]).total.backward()
        with torch.no_grad():
            x -= 0.01 * x.grad
    assert -1.001 <= x.item() <= 1.001


def test_what_does_not_fit():
    x = torch.ones(2, requires_grad=True)
    y = torch.ones(2, requires_grad=True)
    terms = {"a": x.sum()}
    for call, message in (
        (lambda: losses.conflict_loss(terms, [x], method="cagrad"), "method must be one of"),
        (lambda: losses.conflict_loss(terms, []), "expected losses and parameters"),
        (lambda: losses.conflict_loss(terms, [y]), "no term depends"),
        (lambda: losses.conflict_loss(terms, [x], weights={"b": 1.0}), "same names"),
        (lambda: losses.conflict_backward(terms, [x, {"params": [x]}]), "tensors, or all of them"),
        (lambda: losses.conflict_backward(terms, [x.detach()]), "none that requires"),
        (lambda: losses.GradNorm(["a", "a"]), "different names"),
        (lambda: losses.GradNorm(["a"], alpha=-1.0), "alpha must be"),
        (lambda: losses.GradNorm(["a"], initial_losses={"b": 1.0}), "initial losses of"),
        (lambda: losses.GradNorm(["a"])({"b": x.sum()}, [x]), "same names"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_gradnorm_against_the_paper():
    """The weights' gradient through a gradient of the weighted losses, as the paper writes it."""
    model, alpha = Model(), 0.7
    module = losses.GradNorm(list(FACTORS), alpha=alpha).double()
    shared = model.head.weight

    def evaluate():
        terms, _ = model(X)
        return {k: (v() if callable(v) else v).square() + 0.1 for k, v in terms.items()}

    module(evaluate(), [shared])  # the first losses
    first = torch.stack([v.detach() for v in evaluate().values()])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
        module.weights.copy_(torch.tensor([0.5, 1.5, 1.0]))
    found = module(evaluate(), [shared])
    w = module.weights.detach().clone().requires_grad_()
    terms = list(evaluate().values())
    sizes = torch.stack([
        torch.autograd.grad(w[i] * term, shared, create_graph=True)[0].norm()
        for i, term in enumerate(terms)
    ])  # fmt: skip
    progress = torch.stack(terms).detach() / first
    progress = progress / progress.mean()
    wanted = (sizes - (sizes.mean() * progress**alpha).detach()).abs().sum()
    assert_close(found.balance, wanted, 1e-9)
    (one,) = torch.autograd.grad(found.balance, module.weights)
    (other,) = torch.autograd.grad(wanted, w)
    assert_close(one, other, 1e-9)
    assert_close(found.total, sum(a * b for a, b in zip(w, terms, strict=True)).detach(), 1e-9)
    grads = torch.autograd.grad(found.total, [module.weights, shared], allow_unused=True)
    assert grads[0] is None
    assert grads[1] is not None


def test_gradnorm_trains_balances_and_is_saved():
    torch.manual_seed(0)
    target = torch.randn(2, 6)
    shared = torch.nn.Parameter(torch.zeros(6))
    module = losses.GradNorm(["large", "small"], alpha=0.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)

    def terms():
        return {
            "large": (shared - target[0]).square().sum() * 50,
            "small": (shared - target[1]).square().sum(),
        }

    for _ in range(300):
        result = module(terms(), [shared])
        optimizer.zero_grad()
        (result.total + result.balance).backward()
        shared.grad = None  # only the weights are trained
        optimizer.step()
        module.renormalize_()
        assert_close(module.weights.detach().sum(), torch.tensor(2.0), 1e-5)
    norms = [
        w * torch.autograd.grad(t, shared)[0].norm()
        for w, t in zip(module.weights, terms().values(), strict=True)
    ]
    assert abs(norms[0] / norms[1] - 1) < 0.2
    again = losses.GradNorm(["large", "small"], alpha=0.0)
    again.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(again.initial, module.initial)
    assert again.initial.isfinite().all()
    known = losses.GradNorm(["a"], initial_losses={"a": 2.0})
    known({"a": shared.square().sum() + 1}, [shared])
    assert known.initial.tolist() == [2.0]
    fresh = losses.GradNorm(["a"]).eval()
    fresh({"a": shared.square().sum() + 1}, [shared])
    assert fresh.initial.isnan().all()


def test_autocast_does_not_round_the_products():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300))
    one = torch.randn(300)
    other = 0.02 * torch.randn(300) - one  # opposed, nearly
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.gradient_gram([(weight * g).sum() for g in (one, other)], [weight])
    rows = torch.stack([one, other]).double()
    assert_close(found, rows @ rows.t(), 1e-6)
