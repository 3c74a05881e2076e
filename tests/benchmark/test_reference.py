"""The reference is right, and so is everybody on this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llmloss_bench import peers
from llmloss_bench.cases import FROM_HIDDEN, OPTIONS
from llmloss_bench.contenders import Step, UnsupportedError, contenders, eager, make_inputs
from llmloss_bench.reference import errors, reference

from .runs import DENSE, LINEAR, PREFERENCE, TRAINING


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in FROM_HIDDEN])
def test_the_reference_is_float64_autograd(option):
    case = replace(DENSE, option=option, ignored=0.25)
    made = make_inputs(case)
    truth = reference(case, made)
    leaf = made.logits.double().requires_grad_()
    loss = eager(case)(leaf, made.target)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    # Smoothing cancels p_i against eps / V: what is left of both has their rounding.
    least = 1e-15 * float(gradient.abs().max())
    torch.testing.assert_close(
        truth.gradients[0], gradient[truth.samples[0]], rtol=1e-9, atol=least
    )
    assert truth.samples[0][0] == 0
    assert truth.samples[0][-1] == case.rows - 1


@pytest.mark.parametrize("option", ["plain", *FROM_HIDDEN])
def test_the_reference_of_a_projection(option):
    case = replace(LINEAR, ignored=0.25, option=option)
    made = make_inputs(case)
    truth = reference(case, made)
    leaves = [t.detach().double().requires_grad_() for t in (made.hidden, made.weight)]
    loss = F.cross_entropy(F.linear(*leaves), made.target)
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for samples, ours, all_of_them in zip(
        truth.samples, truth.gradients, torch.autograd.grad(loss, leaves), strict=True
    ):
        torch.testing.assert_close(ours, all_of_them[samples], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("blocks", [1 << 23, 5000], ids=["one block", "many"])
def test_the_reference_of_pairs(monkeypatch, blocks):
    """By the mean over pairs of the textbook's formula, in float64 autograd of whole logits."""
    monkeypatch.setattr("llmloss_bench.reference._BLOCK", blocks)
    case = replace(PREFERENCE, ignored=0.25)
    made = make_inputs(case)
    truth = reference(case, made)
    target, reference_hidden, reference_weight = made.constants
    leaves = [t.detach().double().requires_grad_() for t in (made.hidden, made.weight)]
    ratios = []
    for k in range(case.sequences):
        tokens = [t for t in range(case.rows // case.sequences) if target[k, t] != -100]
        of_policy = leaves[0].view(reference_hidden.shape)[k, tokens] @ leaves[1].t()
        of_reference = reference_hidden[k, tokens].double() @ reference_weight.double().t()
        log_p, log_r = (-F.cross_entropy(x, target[k, tokens], reduction="sum")
                        for x in (of_policy, of_reference))  # fmt: skip
        ratios.append(log_p - log_r)
    margins = [ratios[k] - ratios[k + 2] for k in range(2)]
    loss = -sum(torch.log(torch.sigmoid(0.1 * margin)) for margin in margins) / 2
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for samples, ours, all_of_them in zip(
        truth.samples, truth.gradients, torch.autograd.grad(loss, leaves), strict=True
    ):
        torch.testing.assert_close(ours, all_of_them[samples], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [PREFERENCE, TRAINING], ids=["preference", "training"])
def test_everybody_takes_the_same_step(case, dtype):
    if case is TRAINING:
        pytest.importorskip("transformers")
    case = replace(case, dtype=dtype)
    made = make_inputs(case)
    truth = reference(case, made)
    for contender in contenders(case, {"torch"}, set(peers.PACKAGES)):
        found = errors(case, Step(case, contender, made), truth, contender.is_ours)
        assert found.are_tolerable, (contender.name, found)
        assert found.gradient > 0


@pytest.mark.parametrize(
    "case",
    [DENSE, LINEAR, replace(DENSE, passes="forward"), replace(LINEAR, option="float32 logits"),
     replace(LINEAR, option="float32 logits", dtype="bfloat16")],
)  # fmt: skip
def test_everybody_on_this_machine_is_right(case):
    made = make_inputs(case)
    truth = reference(case, made)
    absent = set(peers.PACKAGES)
    for contender in contenders(case, {"torch", "torch chunked"}, absent):
        try:
            step = Step(case, contender, made)
        except UnsupportedError:  # by this torch
            assert not contender.is_ours
            continue
        found = errors(case, step, truth, contender.is_ours)
        assert found.are_tolerable, (contender.name, found)
