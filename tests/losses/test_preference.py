"""DPO's kinds against their formulas."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import losses
from llmloss_ext.losses import preference
from llmloss_ext.losses.pairs import PREFERENCE_OPTIONS

B = 6
LENGTHS = [[3, 7, 1, 4, 9, 2], [5, 5, 5, 1, 2, 8]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def cross_entropy(h, eps):
    """Of the labels (1 - eps, eps), by the probability that the chosen one wins."""
    return -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)


def exo(h, eps):
    """KL((q, 1 - q), (1 - eps, eps)), q = sigma(h)."""
    q = sigmoid(h)
    return q * math.log(q / (1 - eps)) + (1 - q) * math.log((1 - q) / eps)


def discopop(h, tau):
    m = sigmoid(h / tau)
    return math.log1p(math.exp(-h)) * (1 - m) + math.exp(-h) * m


# The loss of a pair from its log-ratios c and r, scores s and t, beta and eps; as in the papers.
FORMULAS = {
    "sigmoid": lambda c, r, s, t, b, eps: cross_entropy(b * (s - t), eps),
    "hinge": lambda c, r, s, t, b, eps: max(0.0, 1 - b * (s - t)),
    "ipo": lambda c, r, s, t, b, eps: (s - t - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, s, t, b, eps: (
        -(1 - eps) * log_sigmoid(b * (s - t)) + eps * log_sigmoid(-b * (s - t))
    ) / (1 - 2 * eps),
    "exo_pair": lambda c, r, s, t, b, eps: exo(b * (s - t), eps),
    "nca_pair": lambda c, r, s, t, b, eps: (
        -log_sigmoid(b * c) - (log_sigmoid(-b * c) + log_sigmoid(-b * r)) / 2
    ),
    "bco_pair": lambda c, r, s, t, b, eps: -log_sigmoid(b * c) - log_sigmoid(-b * r),
    "sppo_hard": lambda c, r, s, t, b, eps: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
    "apo_zero": lambda c, r, s, t, b, eps: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, s, t, b, eps: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "discopop": lambda c, r, s, t, b, eps: discopop(b * (s - t), 0.7),
    "sigmoid_norm": lambda c, r, s, t, b, eps: cross_entropy(b * (s - t), 0.0),
}  # fmt: skip
SCORES = {
    "reverse_kl": lambda d: d,
    "forward_kl": lambda d: 1 - math.exp(-d),
    "js_divergence": lambda d: math.log(2 * math.exp(d) / (1 + math.exp(d))),
    "alpha_divergence": lambda d: (math.exp(d) ** (0.3 - 1) - 1) / (0.3 - 1),
}
TAKES_EPS = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
OF_SCORES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"}
OF_RANKS = {"aot", "aot_unpaired"}


def log_probs(device="cpu", seed=0):
    """Policy and reference, chosen and rejected."""
    torch.manual_seed(seed)
    of_policy = -20 * torch.rand(2, B, dtype=torch.float64)
    of_reference = of_policy + torch.randn(2, B, dtype=torch.float64)
    return [t.to(device) for t in (*of_policy, *of_reference)]


def options_of(kind, device="cpu"):
    """Each option that a kind takes, besides the divergences, other than its default."""
    lengths = torch.tensor(LENGTHS, device=device)
    return {
        **({"label_smoothing": 0.1} if kind in TAKES_EPS else {}),
        **({"discopop_tau": 0.7} if kind == "discopop" else {}),
        **({"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
           if kind in ("sigmoid_norm", "ipo") else {}),
        **({"nll_loss": torch.tensor(1.5, dtype=torch.float64, device=device)}
           if kind == "sft" else {}),
    }  # fmt: skip


def expected(kind, numbers, beta, divergence="reverse_kl", by_length=True):
    """One loss a pair, in floats."""
    pc, pr, rc, rr = numbers
    eps = 0.1 if kind in TAKES_EPS else 0.0
    if kind == "aot":
        ours = sorted(c - r for c, r in zip(pc, pr, strict=True))
        theirs = sorted(c - r for c, r in zip(rc, rr, strict=True))
        return [cross_entropy(beta * (x - y), eps) for x, y in zip(ours, theirs, strict=True)]
    chosen = [x - y for x, y in zip(pc, rc, strict=True)]
    rejected = [x - y for x, y in zip(pr, rr, strict=True)]
    if kind == "aot_unpaired":
        pairs = zip(sorted(chosen), sorted(rejected), strict=True)
        return [cross_entropy(beta * (x - y), eps) for x, y in pairs]
    scores = [[SCORES[divergence](d) for d in side] for side in (chosen, rejected)]
    if kind in ("ipo", "sigmoid_norm") and by_length:
        scores = [[s / n for s, n in zip(*side, strict=True)]
                  for side in zip(scores, LENGTHS, strict=True)]  # fmt: skip
    each = zip(chosen, rejected, *scores, strict=True)
    return [FORMULAS[kind](*numbers, beta, eps) for numbers in each]


def numerically(function, numbers, side):
    """The gradient of a mean by one of the four lists, by central differences."""
    grads = []
    for i in range(B):
        values = []
        for step in (1e-5, -1e-5):
            moved = [list(x) for x in numbers]
            moved[side][i] += step
            values.append(sum(function(moved)) / B)
        grads.append((values[0] - values[1]) / 2e-5)
    return torch.tensor(grads, dtype=torch.float64)


CASES = [(kind, "reverse_kl") for kind in sorted(set(preference.KINDS) - {"sft"})]
CASES += [(kind, d) for kind in sorted(OF_SCORES) for d in SCORES if d != "reverse_kl"]


@pytest.mark.parametrize(("kind", "divergence"), CASES)
def test_a_kind_is_its_formula(device, kind, divergence):
    given = log_probs(device)
    numbers = [t.tolist() for t in given]
    leaves = [t.clone().requires_grad_() for t in given]
    how = options_of(kind, device)
    if divergence != "reverse_kl":
        how |= {"f_divergence_type": divergence}
    if divergence == "alpha_divergence":
        how |= {"f_alpha_divergence_coef": 0.3}
    found = losses.dpo_loss(*leaves, kind=kind, beta=0.2, **how)

    def formula(x):
        return expected(kind, x, 0.2, divergence)

    rows = torch.tensor(formula(numbers), dtype=torch.float64)
    assert_close(found.loss.detach(), rows.mean(), 1e-10)
    each = losses.dpo_loss(*leaves, kind=kind, beta=0.2, reduction="none", **how).loss
    assert_close(each.detach(), rows, 1e-10)
    grads = torch.autograd.grad(found.loss, leaves, allow_unused=True)
    assert grads[2] is None  # the reference's
    assert grads[3] is None
    for side, grad in enumerate(grads[:2]):
        assert_close(grad, numerically(formula, numbers, side), 1e-7)
    parts = torch.autograd.gradcheck(
        lambda c, r: losses.dpo_loss(c, r, *given[2:], kind=kind, beta=0.2, **how).loss, leaves[:2]
    )
    assert parts


def test_metrics_of_pairs():
    given = log_probs()
    given[0].requires_grad_()
    for how in ({}, {"f_divergence_type": "forward_kl"}, {"pair_weight": torch.rand(B)}):
        found = losses.dpo_loss(*given, beta=0.2, **how)
        assert not any(t.requires_grad for t in found[1:] if t is not None)
        pc, pr, rc, rr = (t.detach() for t in given)
        assert_close(found.chosen_rewards, 0.2 * (pc - rc), 1e-12)
        assert_close(found.rejected_rewards, 0.2 * (pr - rr), 1e-12)
        assert_close(found.margins, 0.2 * ((pc - rc) - (pr - rr)), 1e-12)
        assert found.accuracies.tolist() == [
            float(x > y) for x, y in zip(pc - rc, pr - rr, strict=True)
        ]
        assert 0 < found.accuracies.mean() < 1
        assert torch.equal(found.chosen_log_probs, pc)
        assert torch.equal(found.rejected_log_probs, pr)
        assert found.nll_loss is None
    same = losses.dpo_loss(given[2], given[3], given[2], given[3])
    assert float(same.loss) == pytest.approx(math.log(2))


def test_ipo_of_averages_needs_no_lengths():
    given = log_probs()
    numbers = [t.tolist() for t in given]
    wanted = expected("ipo", numbers, 0.2, by_length=False)
    found = losses.dpo_loss(*given, kind="ipo", beta=0.2, reduction="none")
    assert_close(found.loss, torch.tensor(wanted, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("kind", sorted(set(preference.KINDS) - {"sft"}))
def test_the_swap_of_a_pair(kind):
    """At the reference, the gradient prefers the chosen: it turns with the pair."""
    given = log_probs()
    reference = given[2:]
    how = options_of(kind)
    if kind in OF_RANKS:
        how = {}
    grads = []
    for order in ([0, 1], [1, 0]):
        leaves = [x.clone().requires_grad_() for x in reference]
        sides = [leaves[i] for i in order]
        lengths = {}
        if "chosen_lengths" in how:
            names = ["chosen_lengths", "rejected_lengths"]
            lengths = {name: how[names[i]] for name, i in zip(names, order, strict=True)}
        loss = losses.dpo_loss(
            *sides, *(reference[i] for i in order), kind=kind, beta=0.2, **{**how, **lengths}
        ).loss
        grads.append(torch.autograd.grad(loss, leaves))
    if kind in ("nca_pair", "apo_down"):  # not of a margin alone
        assert (grads[0][1] > 0).all()
        assert (grads[1][0] > 0).all()
        assert all(torch.equal(x, y) for x, y in zip(grads[0], grads[1][::-1], strict=True))
        return
    for one, other in zip(*grads, strict=True):
        assert_close(one, -other, 1e-12)
        assert one.abs().min() > 0
    assert (grads[0][0] < 0).all()
    assert (grads[0][1] > 0).all()


@pytest.mark.parametrize("kind", preference.KINDS)
def test_the_order_of_the_pairs_does_not_matter(kind):
    given, how = log_probs(), options_of(kind)
    order = torch.randperm(B)
    turned = {k: v[order] if getattr(v, "dim", int)() else v for k, v in how.items()}
    one = losses.dpo_loss(*given, kind=kind, **how)
    other = losses.dpo_loss(*(x[order] for x in given), kind=kind, **turned)
    assert_close(one.loss, other.loss, 1e-12)
    assert torch.equal(one.margins[order], other.margins)


@pytest.mark.parametrize("kind", preference.KINDS)
def test_micro_batches(kind):
    """They add up to the batch; those of a kind that sorts do not, which its docstring says."""
    given, how = log_probs(seed=3), options_of(kind)
    if kind not in ("sft", *OF_RANKS):
        how["pair_weight"] = torch.rand(B)
    whole = losses.dpo_loss(*given, kind=kind, **how).loss
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 6)):
        part = {k: v[rows] if getattr(v, "dim", int)() else v for k, v in how.items()}
        if kind == "sft":
            part["nll_loss"] = how["nll_loss"] * len(given[0][rows]) / B
        parts.append(
            losses.dpo_loss(*(x[rows] for x in given), kind=kind, num_items=B, **part).loss
        )
    differs = bool((sum(parts) - whole).abs() > 1e-9)
    assert differs == (kind in OF_RANKS)
    assert losses.dpo_loss(*given, num_items=0).loss == 0


def test_several_kinds():
    """MPO's sum of three, and RPO's of two."""
    given = log_probs()
    nll = torch.tensor(1.25, dtype=torch.float64, requires_grad=True)
    sigmoid_loss, bco = (losses.dpo_loss(*given, kind=k).loss for k in ("sigmoid", "bco_pair"))
    kinds = ("sigmoid", "bco_pair", "sft")
    found = losses.dpo_loss(*given, kind=kinds, loss_weights=(0.8, 0.2, 3.0), nll_loss=nll)
    assert_close(found.loss.detach(), 0.8 * sigmoid_loss + 0.2 * bco + 3 * 1.25, 1e-12)
    assert torch.autograd.grad(found.loss, nll)[0] == 3
    assert found.nll_loss == 1.25
    assert not found.nll_loss.requires_grad
    weights = torch.rand(B)
    each = losses.dpo_loss(*given, reduction="none").loss
    rpo = losses.dpo_loss(*given, kind=("sigmoid", "sft"), nll_loss=nll, pair_weight=weights)
    assert_close(rpo.loss.detach(), (each * weights).mean() + 1.25, 1e-7)
    rows = losses.dpo_loss(*given, kind=("sigmoid", "sft"), nll_loss=nll, reduction="none")
    assert_close(rows.loss.detach(), each + 1.25, 1e-12)


VALUES = {
    "label_smoothing": 0.1,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3,
    "discopop_tau": 0.5,
    "chosen_lengths": torch.ones(B),
    "rejected_lengths": torch.ones(B),
    "pair_weight": torch.ones(B) * 2,
    "nll_loss": torch.tensor(1.0),
}


@pytest.mark.parametrize("kind", preference.KINDS)
@pytest.mark.parametrize("option", VALUES)
def test_no_option_is_accepted_and_ignored(kind, option):
    given, how = log_probs(), options_of(kind)
    value = {option: VALUES[option]}
    together = {}
    if option == "f_alpha_divergence_coef":
        together = {"f_divergence_type": "alpha_divergence"}
    if option in ("chosen_lengths", "rejected_lengths"):
        value = {"chosen_lengths": VALUES[option] * 2, "rejected_lengths": VALUES[option]}
    if option not in preference.KINDS[kind].options():
        with pytest.raises(ValueError, match=r"belongs to kind|f_divergence_type belongs"):
            losses.dpo_loss(*given, kind=kind, **{**how, **together, **value})
        return
    # Where it is taken, it matters.
    base = how if option not in how or kind in ("exo_pair", "sft", "sigmoid_norm") else {}
    if kind == "exo_pair" and option == "label_smoothing":
        value = {option: 0.2}
    one = losses.dpo_loss(*given, kind=kind, **{**base, **together}).loss
    other = losses.dpo_loss(*given, kind=kind, **{**base, **together, **value}).loss
    assert abs(float(one - other)) > 1e-6


def test_every_option_is_one_of_the_table():
    taken = frozenset().union(*(kind.options() for kind in preference.KINDS.values()))
    assert taken == set(VALUES)
    signature = inspect.signature(losses.dpo_loss).parameters
    for name, parameter in signature.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default == PREFERENCE_OPTIONS[name].default
            assert parameter.annotation == PREFERENCE_OPTIONS[name].type
    for text in (inspect.getdoc(losses.dpo_loss),):
        assert all(f"``{kind}``" in text for kind in preference.KINDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_in_32(dtype):
    given = [x.to(dtype).requires_grad_() for x in log_probs()]
    found = losses.dpo_loss(*given)
    assert found.loss.dtype == found.chosen_rewards.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in given]
    wanted = losses.dpo_loss(*wide)
    assert torch.equal(found.loss, wanted.loss)
    (grad,), (want,) = (
        torch.autograd.grad(r.loss, x[0]) for r, x in ((found, given), (wanted, wide))
    )
    assert torch.equal(grad, want.to(dtype))


@pytest.mark.parametrize("kind", sorted(set(preference.KINDS) - OF_RANKS))
def test_vmap_and_second_order(kind):
    given, how = log_probs(), options_of(kind)
    how.pop("chosen_lengths", None)
    how.pop("rejected_lengths", None)
    if kind == "sigmoid_norm":
        how = {"chosen_lengths": torch.ones(B), "rejected_lengths": torch.ones(B)}

    def loss(chosen):
        return losses.dpo_loss(chosen, *given[1:], kind=kind, **how).loss

    many = torch.stack([given[0], given[0] - 1])
    assert_close(torch.func.vmap(loss)(many), torch.stack([loss(x) for x in many]), 1e-12)
    grads = torch.func.vmap(torch.func.grad(loss))(many)
    assert_close(grads, torch.stack([torch.func.grad(loss)(x) for x in many]), 1e-12)
    x, tangent = given[0], torch.rand(B, dtype=torch.float64)
    _, forwards = torch.func.jvp(loss, (x,), (tangent,))
    assert_close(forwards, (torch.func.grad(loss)(x) * tangent).sum(), 1e-12)
    if kind not in ("sft", "hinge"):  # their second derivative is 0
        assert torch.autograd.gradgradcheck(loss, given[0].clone().requires_grad_())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.dpo_loss(x, x, x, x, beta=0.0),
        lambda x: losses.dpo_loss(x, x, x, x, label_smoothing=0.6),
        lambda x: losses.dpo_loss(x, x, x, x, kind="other"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="ipo", label_smoothing=0.1),
        lambda x: losses.dpo_loss(x, x, x, x[:1]),
        lambda x: losses.dpo_loss(x, x, x, x, kind=()),
        lambda x: losses.dpo_loss(x, x, x, x, kind=("hinge", "hinge")),
        lambda x: losses.dpo_loss(x, x, x, x, kind=("hinge", "ipo"), loss_weights=(1.0,)),
        lambda x: losses.dpo_loss(x, x, x, x, loss_weights=(math.inf,)),
        lambda x: losses.dpo_loss(x, x, x, x, kind="exo_pair"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="sft"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="sft", nll_loss=x),
        lambda x: losses.dpo_loss(x, x, x, x, kind="sigmoid_norm"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="ipo", chosen_lengths=x),
        lambda x: losses.dpo_loss(x, x, x, x, kind="discopop", discopop_tau=0.0),
        lambda x: losses.dpo_loss(x, x, x, x, f_divergence_type="other"),
        lambda x: losses.dpo_loss(x, x, x, x, f_alpha_divergence_coef=0.2),
        lambda x: losses.dpo_loss(
            x, x, x, x, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=math.inf
        ),
        lambda x: losses.dpo_loss(x, x, x, x, pair_weight=x[:1]),
        lambda x: losses.dpo_loss(x, x, x, x, kind=("sigmoid", "aot"), pair_weight=x),
        lambda x: losses.dpo_loss(
            x, x, x, x, kind=("hinge", "nca_pair"), f_divergence_type="forward_kl"
        ),
        lambda x: losses.dpo_loss(x, x, x, x, reduction="sum"),
        lambda x: losses.dpo_loss(x, x, x, x, reduction="none", num_items=3),
    ],
)
def test_preference_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.zeros(3))
