"""CPO, SimPO and ORPO against their formulas, and their properties."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import losses
from llmloss_ext.losses.pairs import PREFERENCE_OPTIONS

B = 5
KINDS = ("sigmoid", "simpo", "hinge", "ipo")


def pairs(device="cpu"):
    torch.manual_seed(0)
    numbers = -3 * torch.rand(2, B, dtype=torch.float64) - 0.01
    return [x.to(device).requires_grad_() for x in numbers]


def nll(device="cpu"):
    return torch.tensor(1.3, dtype=torch.float64, device=device, requires_grad=True)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def score(x, alpha):
    return (1 - math.exp(x) ** -alpha) / alpha if alpha else x


def cpo(kind, x, y, beta, eps, gamma, alpha):
    h = score(x, alpha) - score(y, alpha)
    if kind == "hinge":
        return max(0.0, 1 - beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    m = beta * h - (gamma if kind == "simpo" else 0.0)
    return -(1 - eps) * log_sigmoid(m) - eps * log_sigmoid(-m)


def check(found, formula, leaves, extra=0.0):
    """The loss, and its gradients by central differences."""
    numbers = [x.tolist() for x in leaves]

    def mean(values):
        return sum(formula(x, y) for x, y in zip(*values, strict=True)) / B

    assert float(found.loss.detach()) == pytest.approx(mean(numbers) + extra, abs=1e-10)
    grads = torch.autograd.grad(found.loss, leaves, retain_graph=True)
    for side, grad in enumerate(grads):
        for i in range(B):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [list(x) for x in numbers]
                moved[side][i] += step
                ends.append(mean(moved))
            assert float(grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_cpo(device, kind, alpha):
    leaves, term = pairs(device), nll(device)
    eps = 0.1 if kind in ("sigmoid", "simpo") else 0.0
    how = {"simpo_gamma": 0.7} if kind == "simpo" else {}
    found = losses.cpo_loss(
        *leaves, term, kind=kind, beta=0.6, label_smoothing=eps, alpha=alpha, cpo_alpha=0.5, **how
    )
    check(found, lambda x, y: cpo(kind, x, y, 0.6, eps, 0.7, alpha), leaves, 0.65)
    assert float(torch.autograd.grad(found.loss, term)[0]) == 0.5
    chosen = torch.tensor([0.6 * score(x, alpha) for x in leaves[0].tolist()])
    assert_close(found.chosen_rewards, chosen, 1e-6)
    assert_close(found.margins, found.chosen_rewards - found.rejected_rewards, 1e-12)
    assert found.accuracies.tolist() == (leaves[0] > leaves[1]).double().tolist()
    assert torch.equal(found.rejected_log_probs, leaves[1].detach())
    assert found.nll_loss == 1.3
    assert not any(t.requires_grad for t in found[1:] if t is not None)


def test_the_defaults_are_the_trainers():
    leaves = pairs()
    found = losses.cpo_loss(*leaves, nll())
    check(found, lambda x, y: cpo("sigmoid", x, y, 0.1, 0.0, 0.0, 0.0), leaves, 1.3)
    found = losses.cpo_loss(*leaves, kind="simpo", cpo_alpha=0.0)
    check(found, lambda x, y: cpo("simpo", x, y, 0.1, 0.0, 0.5, 0.0), leaves)
    assert found.nll_loss is None


def test_simpo(device):
    leaves = pairs(device)
    found = losses.simpo_loss(*leaves, beta=2.5, gamma=1.4, label_smoothing=0.2)
    check(found, lambda x, y: cpo("simpo", x, y, 2.5, 0.2, 1.4, 0.0), leaves)
    assert_close(found.chosen_rewards, 2.5 * leaves[0].detach(), 1e-12)


def odds_ratio(x, y, beta):
    odds = [math.exp(z) / (1 - math.exp(z)) for z in (x, y)]
    return -beta * log_sigmoid(math.log(odds[0] / odds[1]))


def test_orpo(device):
    leaves, term = pairs(device), nll(device)
    found = losses.orpo_loss(*leaves, term, beta=0.4)
    check(found, lambda x, y: odds_ratio(x, y, 0.4), leaves, 1.3)
    assert torch.autograd.grad(found.loss, term)[0] == 1
    each = [odds_ratio(x, y, 1.0) for x, y in zip(*(t.tolist() for t in leaves), strict=True)]
    assert_close(found.log_odds_ratio, -torch.tensor(each, dtype=torch.float64), 1e-10)
    assert_close(found.log_odds_ratio, torch.nn.functional.logsigmoid(found.log_odds_chosen), 1e-12)
    assert_close(found.chosen_rewards, 0.4 * leaves[0].detach(), 1e-12)


def test_orpo_keeps_its_digits_near_certainty():
    """p = 1 - 1e-6 in float32: 1 - p would have lost all but one."""
    chosen, rejected = torch.tensor([-1e-6]), torch.tensor([-2e-6])
    found = losses.orpo_loss(chosen, rejected, torch.zeros(()))
    assert float(found.log_odds_chosen) == pytest.approx(math.log(2), rel=1e-4)


LOSSES = {
    "cpo": lambda x, y, **how: losses.cpo_loss(x, y, cpo_alpha=0.0, **how),
    "hinge": lambda x, y, **how: losses.cpo_loss(x, y, cpo_alpha=0.0, kind="hinge", **how),
    "alphapo": lambda x, y, **how: losses.cpo_loss(x, y, cpo_alpha=0.0, alpha=0.3, **how),
    "simpo": losses.simpo_loss,
    "orpo": lambda x, y, **how: losses.orpo_loss(x, y, torch.zeros(()).double(), **how),
}


@pytest.mark.parametrize("name", LOSSES)
def test_properties(name):
    loss, (x, y) = LOSSES[name], pairs()
    whole, each = loss(x, y).loss, loss(x, y, reduction="none").loss
    assert each.shape == (B,)
    assert_close(each.mean().detach(), whole.detach(), 1e-12)
    parts = [loss(x[s], y[s], num_items=B).loss for s in (slice(0, 2), slice(2, 5), slice(5, 5))]
    assert_close(sum(parts).detach(), whole.detach(), 1e-12)
    order = torch.randperm(B)
    assert_close(loss(x[order], y[order]).loss.detach(), whole.detach(), 1e-12)
    for one, other in ((x, y), (y, x)):
        chosen, rejected = torch.autograd.grad(loss(one, other).loss, (one, other))
        assert (chosen < 0).all()  # a higher probability lowers the loss
        assert (rejected > 0).all()
    batch = torch.stack([x, x - 1]).detach()
    f = lambda c: loss(c, y.detach()).loss  # noqa: E731
    assert_close(torch.func.vmap(f)(batch), torch.stack([f(c) for c in batch]), 1e-12)
    if name != "hinge":
        assert torch.autograd.gradgradcheck(lambda c, r: loss(c, r).loss, (x, y))
    for dtype in (torch.float16, torch.bfloat16):
        half = [t.detach().to(dtype).requires_grad_() for t in (x, y)]
        found = loss(*half)
        assert found.chosen_rewards.dtype == torch.float32
        wide = [t.detach().float().requires_grad_() for t in half]
        wanted = loss(*wide)
        assert torch.equal(found.loss, wanted.loss)
        one, other = (torch.autograd.grad(r.loss, t)[0] for r, t in ((found, half), (wanted, wide)))
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("function", [losses.cpo_loss, losses.simpo_loss, losses.orpo_loss])
def test_help_describes_every_argument(function):
    text = inspect.getdoc(function)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for name, parameter in inspect.signature(function).parameters.items():
        assert arguments.count(f"\n    {name}: ") == 1, name
        if name in PREFERENCE_OPTIONS and parameter.kind is parameter.KEYWORD_ONLY:
            own = {("simpo_loss", "beta"): 2.0, ("cpo_loss", "simpo_gamma"): None}
            wanted = own.get((function.__name__, name), PREFERENCE_OPTIONS[name].default)
            assert parameter.default == wanted


@pytest.mark.parametrize(
    "call",
    [
        lambda x, n: losses.cpo_loss(x, x, n, kind="other"),
        lambda x, n: losses.cpo_loss(x, x[:1], n),
        lambda x, n: losses.cpo_loss(x, x),
        lambda x, n: losses.cpo_loss(x, x, x),
        lambda x, n: losses.cpo_loss(x, x, n, beta=0.0),
        lambda x, n: losses.cpo_loss(x, x, n, label_smoothing=0.5),
        lambda x, n: losses.cpo_loss(x, x, n, kind="hinge", label_smoothing=0.1),
        lambda x, n: losses.cpo_loss(x, x, n, kind="ipo", label_smoothing=0.1),
        lambda x, n: losses.cpo_loss(x, x, n, simpo_gamma=0.1),
        lambda x, n: losses.cpo_loss(x, x, n, kind="simpo", simpo_gamma=-0.1),
        lambda x, n: losses.cpo_loss(x, x, n, alpha=math.nan),
        lambda x, n: losses.cpo_loss(x, x, n, cpo_alpha=-1.0),
        lambda x, n: losses.cpo_loss(x, x, n, reduction="sum"),
        lambda x, n: losses.simpo_loss(x, x, gamma=-1.0),
        lambda x, n: losses.simpo_loss(x, x, beta=math.inf),
        lambda x, n: losses.orpo_loss(x, x[:1], n),
        lambda x, n: losses.orpo_loss(x, x, x),
        lambda x, n: losses.orpo_loss(x, x, n, beta=-1.0),
        lambda x, n: losses.orpo_loss(x, x, n, reduction="sum"),
        lambda x, n: losses.orpo_loss(x, x, n, num_items=-1),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call(-torch.ones(3), torch.ones(()))
