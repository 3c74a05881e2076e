"""Log-probabilities of several tokens a position: against the definition, and what they cost."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from helpers import FLOATS, assert_close
from torch.utils.flop_counter import FlopCounterMode

from llmloss_ext import linear_log_probs, plan, token_stats
from llmloss_ext.losses import linear_selected_log_probs, selected_log_probs

N, D, V, K, USED = 11, 6, 17, 4, 15
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "everything": {"softcap": 2.5, "temperature": 0.7, "logit_scale": 1.3, "vocab_size": USED},
}


def tensors(dtype=torch.double, device="cpu"):
    torch.manual_seed(0)
    sizes = (N, D), (V, D), (V,)
    hidden, weight, bias = (torch.randn(size).to(device, dtype).requires_grad_() for size in sizes)
    index = torch.randint(0, USED, (N, K), device=device)
    index[:, 1] = (hidden @ weight.t() + bias).detach()[:, :USED].argmax(-1)
    index[2, 0] = index[3, 2] = index[3, 3] = index[5] = -100
    return hidden, weight, bias, index


def by_definition(logits, index, softcap=None, temperature=1.0, logit_scale=1.0, vocab_size=None):
    x = logits.double()[..., :vocab_size] * logit_scale
    x = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    log_p = x - x.exp().sum(-1, keepdim=True).log()
    at = log_p.gather(-1, index.clamp_min(0))
    return torch.where(index == -100, 0.0, at)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("drop", [False, True])
def test_against_the_definition(device, name, chunk, drop):
    hidden, weight, bias, index = tensors(device=device)
    scale = torch.tensor(OPTIONS[name].get("logit_scale", 1.0), dtype=torch.double, device=device)
    leaves = (hidden, weight, bias, scale.requires_grad_())
    options = OPTIONS[name] | {"logit_scale": scale}
    logits = hidden @ weight.t() + bias
    expected = by_definition(logits, index, **options)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for found in (
        selected_log_probs(hidden @ weight.t() + bias, index, **options),
        linear_selected_log_probs(
            hidden,
            weight,
            index,
            linear_bias=bias,
            chunk_tokens=chunk,
            drop_ignored=drop,
            **options,
        ),
    ):
        assert_close(found, expected, 1e-12)
        for one, other in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
            assert_close(one, other, 1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
def test_types(device, dtype):
    hidden, weight, bias, index = tensors(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = (hidden @ weight.t() + bias).detach()
    wanted = by_definition(logits, index)
    leaf = logits.requires_grad_()
    found = selected_log_probs(leaf, index.int())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, wanted, 1e-6)
    double = logits.detach().double().requires_grad_()
    upstream = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, leaf, upstream)
    (want,) = torch.autograd.grad(by_definition(double, index), double, upstream.double())
    small = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    assert_close(grad, want, small)
    linear = linear_selected_log_probs(hidden, weight, index, linear_bias=bias)
    want = by_definition(exact[0] @ exact[1].t() + exact[2], index)
    assert_close(linear, want, 3 * small)
    grads = torch.autograd.grad(linear, (hidden, weight, bias), upstream)
    for one, other in zip(grads, torch.autograd.grad(want, exact, upstream.double()), strict=True):
        assert (one.double() - other).norm() < 2 * small * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_logits(device, dtype):
    """Of 16-bit operands: as good as float64 of the same, which rounded logits are not."""
    hidden, weight, bias, index = tensors(dtype, device)
    hidden, weight = (x.detach().repeat(1, 8).requires_grad_() for x in (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = by_definition(exact[0] @ exact[1].t() + exact[2], index)
    upstream = torch.randn_like(wanted)
    wants = torch.autograd.grad(wanted, exact, upstream)
    errors = []
    for logits_dtype in (torch.float32, None):
        found = linear_selected_log_probs(
            hidden, weight, index, linear_bias=bias, logits_dtype=logits_dtype, chunk_tokens=5
        )
        errors.append(float((found - wanted).detach().abs().max()))
        if logits_dtype is None:
            continue
        for one, other in zip(
            torch.autograd.grad(found, (hidden, weight, bias), upstream.float()), wants, strict=True
        ):
            assert one.dtype == dtype
            assert (one.double() - other).norm() < 2e-2 * other.norm()
    assert errors[0] < 1e-4
    assert errors[1] > 3e-3 if dtype == torch.bfloat16 else errors[1] > errors[0]
    with pytest.raises(ValueError, match="logits_dtype must be"):
        linear_selected_log_probs(hidden, weight, index, logits_dtype=torch.float64)
    # Mixed operands, too, and derivatives of derivatives.
    mixed = linear_selected_log_probs(
        hidden.float(), weight, index, linear_bias=bias, logits_dtype=torch.float32
    )
    assert float((mixed - wanted).detach().abs().max()) < 1e-4
    seconds = []
    again = by_definition(exact[0] @ exact[1].t() + exact[2], index)
    for loss, (_, w, b) in ((mixed, (hidden, weight, bias)), (again, exact)):
        (first,) = torch.autograd.grad(loss.sum(), b, create_graph=True)
        seconds.append(torch.autograd.grad(first.double().square().sum(), w)[0].double())
    assert (seconds[0] - seconds[1]).norm() < 5e-2 * seconds[1].norm()


def test_a_token_named_often_has_one_gradient(device):
    """The sum over its places, in the same order each time."""
    torch.manual_seed(0)
    hidden = torch.randn(500, D, device=device).requires_grad_()
    weight = torch.randn(V, D, device=device).requires_grad_()
    index = torch.randint(0, 2, (500, 40), device=device)
    upstream = torch.randn(500, 40, device=device) * 10.0 ** torch.randint(
        -4, 5, (500, 40), device=device
    )
    for function in (
        lambda: selected_log_probs(hidden @ weight.t(), index),
        lambda: linear_selected_log_probs(hidden, weight, index),
    ):
        grads = [torch.autograd.grad(function(), (hidden, weight), upstream) for _ in range(3)]
        for other in grads[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        wanted = by_definition(exact[0] @ exact[1].t(), index)
        wants = torch.autograd.grad(wanted, exact, upstream.double())
        for one, other in zip(grads[0], wants, strict=True):
            assert (one.double() - other).norm() < 1e-5 * other.norm()


@pytest.mark.slow
def test_derivatives(device):
    hidden, weight, bias, index = tensors(device=device)
    scale = torch.tensor(0.8, dtype=torch.double, device=device, requires_grad=True)
    options = {"softcap": 3.0, "temperature": 1.4}

    def dense(h, s):
        return selected_log_probs(h @ weight.detach().t(), index, logit_scale=s, **options)

    def linear(h, w, b, s):
        return linear_selected_log_probs(
            h, w, index, linear_bias=b, logit_scale=s, chunk_tokens=4, **options
        )

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(dense, (hidden, scale))
        assert check(linear, (hidden, weight, bias, scale))


def test_it_agrees_with_the_log_probability_of_one_token(device):
    hidden, weight, _, index = tensors(torch.float32, device)
    for k in range(K):
        found = linear_selected_log_probs(hidden, weight, index)[:, k]
        assert_close(found, linear_log_probs(hidden, weight, index[:, k]), 1e-6)
    whole = selected_log_probs(hidden @ weight.t(), torch.arange(V, device=device).expand(N, V))
    assert_close(whole, torch.log_softmax(hidden @ weight.t(), -1), 1e-5)
    assert_close(whole.exp().sum(-1), torch.ones(N), 1e-6)


@pytest.mark.parametrize("lead", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("first", [False, True])
def test_a_sure_token_keeps_its_digits(device, lead, first):
    """log p and 1 - p of the largest, wherever it is named, and however often."""
    logits = torch.zeros(1, V, device=device)
    logits[0, 3] = lead
    index = torch.tensor([[3, 2, 3] if first else [2, 3, 3]], device=device)
    leaf = logits.clone().requires_grad_()
    head = torch.eye(V, device=device)
    exact = -math.log1p((V - 1) * math.exp(-lead))
    for found in (selected_log_probs(leaf, index), linear_selected_log_probs(leaf, head, index)):
        for k in range(3):
            if index[0, k] == 3:
                assert found[0, k].item() == pytest.approx(exact, rel=1e-5)
                (grad,) = torch.autograd.grad(found[0, k], leaf, retain_graph=True)
                assert grad[0, 3].item() == pytest.approx(-math.expm1(exact), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("drop", [False, True])
def test_what_has_no_part_may_hold_anything(device, value, drop):
    hidden, weight, _, index = tensors(torch.float32, device)
    # Of position 5 nothing is asked, and classes from USED on are padding.
    results = []
    for spoilt in (False, True):
        h, w = hidden.detach().clone(), weight.detach().clone()
        x = h @ w.t()
        if spoilt:
            h[5], w[USED:], x[5], x[:, USED:] = value, value, value, value
        leaves = [t.requires_grad_() for t in (h, w, x)]
        options = {"vocab_size": USED, "softcap": 3.0}
        linear = linear_selected_log_probs(
            h, w, index, drop_ignored=drop, chunk_tokens=4, **options
        )
        dense = selected_log_probs(x, index, **options)
        assert (dense[index == -100] == 0).all()
        assert (linear[index == -100] == 0).all()
        grads = torch.autograd.grad((linear.square().sum() + dense.square().sum()), leaves)
        assert (grads[0][5] == 0).all()
        assert (grads[1][USED:] == 0).all()
        assert (grads[2][5] == 0).all()
        assert (grads[2][:, USED:] == 0).all()
        results.append((linear.detach(), dense.detach(), *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_impossible_token(device, scaled):
    logits = torch.randn(3, V, device=device)
    logits[:, 2] = -math.inf
    index = torch.tensor([[2, 4], [4, 2], [2, 2]], device=device)
    leaf = logits.requires_grad_()
    scale = torch.tensor(0.9, device=device, requires_grad=True)
    found = selected_log_probs(leaf, index, logit_scale=scale if scaled else 0.9)
    assert (found.isneginf() == (index == 2)).all()
    total = torch.where(index == 2, 0.0, found).sum()
    leaves = (leaf, scale) if scaled else (leaf,)
    for grad in torch.autograd.grad(total, leaves):
        assert grad.isfinite().all()
    rows = [i for i in range(3) if (index[i] != 2).any()]
    want = torch.log_softmax(logits.detach() * 0.9, -1)
    assert_close(total.detach(), want[rows, 4].sum(), 1e-5)


def test_products_and_memory():
    hidden, weight, bias, index = tensors(torch.float32)
    index = index.clamp_min(0)
    product = 2 * N * D * V

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def loss():
        return linear_selected_log_probs(hidden, weight, index, linear_bias=bias).sum()

    assert counted(lambda: loss().backward()) == 4 * product
    with torch.no_grad():
        assert counted(loss) == product


PEAK = """
import resource, torch
from llmloss_ext.losses import linear_selected_log_probs
torch.set_num_threads(1)
n, d, v = 2048, 32, 40_000
h, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
index = torch.randint(0, v, (n, 8))
linear_selected_log_probs(h[:300], w, index[:300], chunk_tokens=128).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_selected_log_probs(h, w, index, chunk_tokens=128).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.slow
def test_the_logits_are_never_there_whole():
    """Seven times the tokens cost next to nothing more: chunks are all that is held."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    chunk = plan(2048, 32, 40_000, chunk_tokens=128).chunk_bytes
    assert int(done.stdout) < 3 * chunk  # all logits would be 16, and as many their gradient


def test_transforms_and_compilation():
    hidden, weight, _, index = tensors(torch.float32)
    texts = torch.randn(3, 5, V)
    ids = torch.randint(0, V, (3, 5, K))
    each = torch.func.vmap(selected_log_probs)(texts, ids)
    assert_close(each, selected_log_probs(texts, ids), 1e-6)
    of_one = torch.func.vmap(torch.func.grad(lambda x, i: selected_log_probs(x, i).square().sum()))
    leaf = texts.clone().requires_grad_()
    (want,) = torch.autograd.grad(selected_log_probs(leaf, ids).square().sum(), leaf)
    assert_close(of_one(texts, ids), want, 1e-5)

    def both(h, w):
        one = selected_log_probs(h @ w.t(), index, softcap=3.0, temperature=0.5)
        other = linear_selected_log_probs(h, w, index, softcap=3.0, temperature=0.5)
        return (one * other).sum()

    torch._dynamo.reset()
    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        value = function(hidden, weight)
        results.append((value.detach(), *torch.autograd.grad(value, (hidden, weight))))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5)


def test_empty_and_wrong():
    logits, index = torch.randn(3, V, requires_grad=True), torch.zeros(3, 2, dtype=torch.long)
    assert selected_log_probs(logits[:0], index[:0]).shape == (0, 2)
    assert selected_log_probs(logits, index[:, :0]).shape == (3, 0)
    weight = torch.randn(V, V)
    assert linear_selected_log_probs(logits[:0], weight, index[:0]).shape == (0, 2)
    assert linear_selected_log_probs(logits, weight, index[:, :0]).shape == (3, 0)
    bad = index.clone()
    bad[1, 1] = V
    for call in (
        lambda i, **k: selected_log_probs(logits, i, **k),
        lambda i, **k: linear_selected_log_probs(logits, weight, i, **k),
    ):
        with pytest.raises(IndexError, match=rf"Target {V} at position \(1, 1\)"):
            call(bad)
        with pytest.raises(IndexError):
            call(index - 1)
        with pytest.raises(ValueError, match="index must have K tokens"):
            call(index[:, 0])
        with pytest.raises(ValueError, match="index must have K tokens"):
            call(index[:2])
        with pytest.raises(RuntimeError, match="int64 or int32"):
            call(index.float())
        for wrong in ({"temperature": 0.0}, {"temperature": math.nan}, {"softcap": -1.0},
                      {"vocab_size": V + 1}):  # fmt: skip
            with pytest.raises(ValueError):
                call(index, **wrong)


def test_the_lse_is_that_of_the_statistics(device):
    hidden, weight, _, index = tensors(torch.float32, device)
    logits = (hidden @ weight.t()).detach()
    stats = token_stats(logits, index[:, 1], class_dim=-1)
    found = selected_log_probs(logits, index)
    small = logits.gather(-1, index.clamp_min(0)) - stats.lse.unsqueeze(-1)
    others = (index != -100) & (index != index[:, 1:2])
    assert torch.equal(found[others], small[others])
