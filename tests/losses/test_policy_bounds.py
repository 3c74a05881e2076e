"""Policy and preference losses of finite log-probabilities are finite, and so are their gradients.

Where the formulas as they stand in the papers are finite, preference losses differ by no bit.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from properties import SETTINGS, hypothesis, st

from llmloss_ext import losses
from llmloss_ext.losses import preference
from llmloss_ext.losses.bounded import _LARGEST_EXPONENT
from llmloss_ext.losses.policy_options import LEVELS, LOSS_TYPES
from losses.policy_definition import Problem, by_definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOG_PROBS = st.one_of(st.floats(-1e4, 0), st.floats(-20, 0), st.sampled_from([0.0, -100.0, -1e4]))
ADVANTAGES = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, -1e3, 1e3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_exponents(dtype):
    """Of each type: its exponential is finite, and that of the next number is not."""
    largest = torch.tensor(_LARGEST_EXPONENT[dtype], dtype=dtype)
    assert largest.item() == _LARGEST_EXPONENT[dtype]
    assert largest.exp().isfinite()
    bits = largest.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    assert (bits + 1).view(dtype).exp().isinf()


def policy_loss(x, old, reference, advantages, mask, **how):
    tensors = {"reference_log_probs": reference, "importance_sampling_ratio": how.pop("rollout")}
    return losses.grpo_loss(x, old, advantages, mask, **tensors, **how).loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@hypothesis.settings(SETTINGS, max_examples=20)
@hypothesis.given(st.data())
def test_policy_losses(dtype, loss_type, data):
    """Finite for whatever finite numbers, and as in the papers where these stay in bounds."""

    def draw(of, number=6):
        numbers = data.draw(st.lists(of, min_size=number, max_size=number))
        return torch.tensor(numbers).to(dtype)

    x, old, reference = (draw(LOG_PROBS).view(2, 3) for _ in range(3))
    advantages, rollout = draw(ADVANTAGES, 2), draw(st.sampled_from([0.0, 0.5, 1.0, 1e4]), 2)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=6, max_size=6))).view(2, 3)
    mask[0, 0] = True
    levels = ["token"] if loss_type == "vespo" else LEVELS
    how = {
        "loss_type": loss_type, "importance_sampling_level": data.draw(st.sampled_from(levels)),
        "beta": data.draw(st.sampled_from([0.0, 0.04, 100.0])),
        "kl_estimator": data.draw(st.sampled_from(["k1", "k2", "k3"])),
        "use_bias_correction_kl": data.draw(st.booleans()),
    }  # fmt: skip
    if loss_type == "dr_grpo":
        how["max_completion_length"] = 3
    leaf = x.clone().requires_grad_()
    given = old, reference, advantages, mask
    loss = policy_loss(leaf, *given, rollout=rollout[:, None], **how)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad.dtype == dtype
    parts = [(x - old)[mask], (reference - x)[mask]]
    if dtype.itemsize == 2 or loss_type == "vespo" or max(part.max() for part in parts) > 40:
        return
    double = [t.double() for t in (x, old, reference, advantages)]
    exact = double[0].clone().requires_grad_()
    wanted, each = by_definition(
        exact, double[1], double[3], mask, reference_log_probs=double[2],
        importance_sampling_ratio=rollout[:, None].expand(2, 3).double(), **how,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(wanted, exact)
    if each.detach().abs().max() < 1e36:
        scale = each.detach().abs().max().clamp_min(1) * (1e-4 if dtype == torch.float32 else 1e-9)
        assert (loss - wanted).abs() <= scale
        assert (grad - gradient).abs().max() <= scale * (1 + double[0].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_16_bits_are_read_as_float32_and_the_gradient_is_rounded_once(dtype, loss_type):
    p = Problem(3).to(torch.float32).to(dtype)
    length = {"max_completion_length": 6} if loss_type == "dr_grpo" else {}
    results = []
    for q in (p, p.to(torch.float32)):
        leaf = q.log_probs.clone().requires_grad_()
        loss = policy_loss(
            leaf, q.old, q.reference, q.advantages, q.mask, rollout=q.rollout, beta=0.1,
            loss_type=loss_type, **length,
        )  # fmt: skip
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    (loss, grad), (wide, gradient) = results
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)
    assert torch.equal(grad, gradient.to(dtype))


def preference_losses(beta, dtype):
    """Each loss of sums of log-probabilities: chosen and rejected, of policy and reference."""
    two = torch.tensor([3, 1])
    nll, good = torch.zeros((), dtype=dtype), torch.tensor([True, False])
    found = {}
    for kind, entry in preference.KINDS.items():
        if kind == "sft":
            continue
        how = {"kind": kind, "beta": beta}
        if kind in ("robust", "exo_pair"):
            how["label_smoothing"] = 0.1
        if kind == "sigmoid_norm":
            how |= {"chosen_lengths": two, "rejected_lengths": two.flip(0)}
        found[kind] = lambda *x, how=how: losses.dpo_loss(*x, **how).loss
        if not entry.of_scores:
            continue
        for name in ("forward_kl", "js_divergence", "alpha_divergence"):
            other = {**how, "f_divergence_type": name}
            found[f"{kind} {name}"] = lambda *x, how=other: losses.dpo_loss(*x, **how).loss
        other = {**other, "f_alpha_divergence_coef": 3.0}
        found[f"{kind} alpha 3"] = lambda *x, how=other: losses.dpo_loss(*x, **how).loss
    found["discopop tau 2"] = lambda *x: (
        losses.dpo_loss(*x, kind="discopop", discopop_tau=2.0, beta=beta).loss
    )
    for kind, alpha in itertools.product(("sigmoid", "simpo", "hinge", "ipo"), (0.0, 0.5, -2.0)):
        found[f"cpo {kind} {alpha}"] = lambda c, r, *_, kind=kind, alpha=alpha: (
            losses.cpo_loss(c, r, kind=kind, beta=beta, alpha=alpha, cpo_alpha=0.0).loss
        )
    found["orpo"] = lambda c, r, *_: losses.orpo_loss(c, r, nll, beta=beta).loss
    for kind in ("kto", "apo_zero_unpaired"):
        found[kind] = lambda c, r, x, y, kind=kind: (
            losses.kto_loss(
                c,
                x,
                good,
                kind=kind,
                beta=beta,
                kl=losses.kl_estimate(r, y) if kind == "kto" else None,
            ).loss
        )
    found["bco"] = lambda c, r, x, y: (
        losses.bco_loss(c, x, good, shift=losses.RunningMean(), beta=beta).loss
    )
    return found


SIMPLE = {
    "sigmoid": lambda h, beta: -F.logsigmoid(beta * h),
    "hinge": lambda h, beta: torch.relu(1 - beta * h),
    "ipo": lambda h, beta: (h - 1 / (2 * beta)).square(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.1, 10.0])
@hypothesis.settings(SETTINGS, max_examples=25)
@hypothesis.given(st.data())
def test_preference_losses(dtype, beta, data):
    tokens = data.draw(st.lists(LOG_PROBS, min_size=24, max_size=24))
    given = torch.tensor(tokens).to(dtype).view(4, 2, 3)
    for name, loss in preference_losses(beta, dtype).items():
        leaves = [x.clone().requires_grad_() for x in given[:2]]
        sums = [losses.sequence_log_probs(x) for x in (*leaves, *given[2:])]
        value = loss(*sums)
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        for found in (value, *(grad for grad in grads if grad is not None)):
            assert found.isfinite().all(), name
        if name not in SIMPLE:
            continue
        wide = [x.to(value.dtype) for x in sums]  # of 16 bits, in float32
        h = (wide[0] - wide[2]) - (wide[1] - wide[3])
        plain = SIMPLE[name](h, beta).mean()
        wanted = torch.autograd.grad(plain, leaves)
        if plain.isfinite() and all(grad.isfinite().all() for grad in wanted):
            assert torch.equal(value, plain)
            assert all(torch.equal(x, y) for x, y in zip(grads, wanted, strict=True))


def test_a_gradient_that_no_half_precision_number_can_be():
    x = torch.full((1,), -6e4, dtype=torch.float16, requires_grad=True)
    zero = torch.zeros_like(x).detach()
    loss = losses.dpo_loss(x, zero, zero, zero, kind="ipo").loss
    assert torch.autograd.grad(loss, x)[0].tolist() == [-65504.0]


def test_where_the_surrogate_is_flat_its_gradient_is_0():
    """A rollout's token that the policy likes e^100 times more, and a reference that it left."""
    x = torch.tensor([[-0.5, -0.1, -2.0]], requires_grad=True)
    old = torch.tensor([[-0.6, -200.0, -1.5]])
    loss = losses.ppo_clip_loss(x, old, torch.ones(1, 1), torch.ones(1, 3))
    (grad,) = torch.autograd.grad(loss, x)
    r = (x - old).detach().double().exp()
    torch.testing.assert_close(loss.double(), -torch.minimum(r, r.clamp(0.8, 1.2)).mean())
    torch.testing.assert_close(grad.double(), torch.where(r <= 1.2, -r / 3, 0.0))


def test_a_sum_of_float16_may_be_beyond_its_range_and_an_impossible_sequence_stays_impossible():
    many = torch.full((2, 9), -1e4, dtype=torch.float16)
    assert losses.sequence_log_probs(many).tolist() == [-9e4] * 2
    many[0, 0] = -torch.inf
    assert losses.sequence_log_probs(many).tolist() == [-torch.inf, -9e4]
