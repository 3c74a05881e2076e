"""Log p and log(1 - p) of chosen columns, against float64 and where p is near 1."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext.columns import Distribution

V = 11


@SETTINGS
@hypothesis.given(st.integers(0, 1000), st.sampled_from([0.0, 3.0]), st.floats(0.1, 3))
def test_against_the_definition(seed, softcap, scale):
    torch.manual_seed(seed)
    logits = (torch.randn(4, V) * 3).double()
    columns = torch.randint(0, V, (4, 3))
    chosen = torch.rand(4, V) < 0.4
    x = logits * scale
    p = (softcap * torch.tanh(x / softcap) if softcap else x).softmax(-1)
    found = Distribution.of(logits, scale, softcap)
    assert_close(found.log_probs(columns), p.gather(-1, columns).log(), 1e-12)
    assert_close(found.log_rest(chosen), torch.where(chosen, (1 - p).log(), 0.0).sum(-1), 1e-10)
    of_32 = Distribution.of(logits.float(), torch.tensor(scale), softcap)
    assert_close(of_32.log_probs(columns), found.log_probs(columns), 1e-5)


@pytest.mark.parametrize("lead", [1.0, 10.0, 18.0, 30.0, 80.0])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_digits_near_1(lead, offset):
    """In float32, against float64: p is 1 to rounding from a lead of 17 on."""
    logits = torch.zeros(1, V)
    logits[0, 4] = lead
    logits += offset
    leaf = logits.clone().requires_grad_()
    exact = logits.double().requires_grad_()
    every = torch.zeros(1, V, dtype=torch.bool)
    every[0, 4] = True
    others = torch.log(torch.tensor(V - 1.0).double())
    odds = exact[0, 4] - exact[0, 0] - others
    rest = -torch.nn.functional.softplus(odds)
    log_p = -torch.log1p(torch.exp(-odds))
    found = Distribution.of(leaf)
    for one, other in ((found.log_rest(every)[0], rest),
                       (found.log_probs(torch.tensor([[4]]))[0, 0], log_p)):  # fmt: skip
        assert abs(one.item() / other.item() - 1) < 1e-5
        (grad,) = torch.autograd.grad(one, leaf, retain_graph=True)
        (wanted,) = torch.autograd.grad(other, exact, retain_graph=True)
        assert abs(grad[0, 4].item() / wanted[0, 4].item() - 1) < 1e-4


def test_impossible_columns_and_a_single_one():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    found = Distribution.of(logits)
    value = found.log_rest(torch.tensor([[True, True, True]]))
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    assert_close(value, torch.log1p(-p).sum()[None], 1e-6)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.isfinite().all()
    alone = Distribution.of(torch.zeros(1, 1))
    assert alone.log_probs(torch.zeros(1, 1, dtype=torch.long)) == 0


def test_derivatives():
    torch.manual_seed(0)
    logits = torch.randn(3, V, dtype=torch.double, requires_grad=True)
    columns = torch.stack([logits.argmax(-1), torch.zeros(3, dtype=torch.long)], -1)
    chosen = torch.rand(3, V) < 0.5
    chosen[0, logits[0].argmax()] = True

    def both(x):
        found = Distribution.of(x, 0.7, 4.0)
        return found.log_probs(columns), found.log_rest(chosen)

    assert torch.autograd.gradcheck(both, logits)
    assert torch.autograd.gradgradcheck(both, logits)
