"""Gumbel-softmax: the distribution, the gradient of the relaxed sample, and nothing N x V twice."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from scipy import stats

from llmloss_ext import losses
from llmloss_ext.losses import gumbel

N, D, V, USED, E = 11, 4, 9, 8, 3


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def noise(rows=N, columns=USED, seed=3):
    """What a call with this generator adds, in float64."""
    drawn = torch.randint(0, 2**62, (), generator=seeded(seed))
    return gumbel._gumbel(drawn, torch.arange(rows), columns, torch.float64)


def test_the_noise_is_gumbels():
    g = noise(400, 1000, seed=0)
    _, p = stats.kstest(g.flatten().numpy(), "gumbel_r")
    assert p > 1e-3
    assert abs(g.mean() - 0.5772157) < 0.01
    assert abs(g.var() - math.pi**2 / 6) < 0.02
    # Rows, columns and seeds have nothing to do with each other.
    for one, other in ((g[:-1], g[1:]), (g[:, :-1], g[:, 1:]), (g, noise(400, 1000, seed=1))):
        pair = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))
        assert abs(pair[0, 1]) < 0.006
    assert g.flatten().unique().numel() > 0.999 * g.numel()


def test_the_noise_of_a_row_is_its_own():
    drawn = torch.tensor(2**61 + 12345)
    whole = gumbel._gumbel(drawn, torch.arange(50), 7, torch.float32)
    assert torch.equal(
        gumbel._gumbel(drawn, torch.arange(20, 30), 5, torch.float32), whole[20:30, :5]
    )
    far = gumbel._gumbel(drawn, torch.tensor([2**33]), 7, torch.float32)
    assert not torch.equal(far[0], whole[0])
    assert far.isfinite().all()


def test_hard_samples_are_of_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for way in ("dense", "linear"):
        logits = p.log().expand(40_000, 4)
        if way == "dense":
            sample = losses.gumbel_softmax(logits, generator=seeded())
            assert set(sample.unique().tolist()) == {0.0, 1.0}
            assert (sample.sum(-1) == 1).all()
            ids = sample.argmax(-1)
        else:
            found = losses.linear_gumbel_embeddings(
                logits, torch.eye(4), torch.eye(4), generator=seeded()
            )
            ids = found.ids
            assert torch.equal(found.embeddings, F.one_hot(ids, 4).float())
        _, level = stats.chisquare(ids.bincount(minlength=4).numpy(), (p * 40_000).numpy())
        assert level > 1e-3


def relaxed(logits, temperature=0.7, softcap=0.0):
    """The definition, in float64, with the noise as given numbers."""
    x = softcap * torch.tanh(logits / softcap) if softcap else logits
    return ((x[:, :USED] + noise()) / temperature).softmax(-1)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_is_that_of_the_relaxed_sample(hard, softcap):
    torch.manual_seed(0)
    logits = torch.randn(N, V, dtype=torch.double, requires_grad=True)
    found = losses.gumbel_softmax(
        logits, temperature=0.7, hard=hard, vocab_size=USED, softcap=softcap, generator=seeded()
    )
    soft = relaxed(logits, softcap=softcap or 0.0)
    wanted = F.one_hot(soft.argmax(-1), USED).double() if hard else soft
    assert_close(found, F.pad(wanted, (0, V - USED)), 1e-12)
    above = torch.randn(N, V).double()
    (one,) = torch.autograd.grad(found, logits, above, retain_graph=True)
    (other,) = torch.autograd.grad(soft, logits, above[:, :USED], retain_graph=True)
    assert_close(one, other, 1e-12)
    assert (one[:, USED:] == 0).all()


def linear(h, w, b, table, hard, **how):
    return losses.linear_gumbel_embeddings(
        h, w, table, linear_bias=b, temperature=0.7, hard=hard, vocab_size=USED,
        generator=seeded(), **how,
    )  # fmt: skip


def projection():
    torch.manual_seed(0)
    sizes = (N, D), (V, D), (V,), (V, E)
    return [torch.randn(size, dtype=torch.double, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("chunk", [None, 4])
def test_from_hidden_states(hard, chunk):
    leaves = projection()
    h, w, b, table = leaves
    found = linear(*leaves, hard, chunk_tokens=chunk)
    soft = relaxed(h @ w.t() + b)
    row = F.one_hot(soft.argmax(-1), USED) + soft - soft.detach() if hard else soft
    wanted = row @ table[:USED]
    assert_close(found.embeddings, wanted, 1e-12)
    assert torch.equal(found.ids, soft.argmax(-1))
    above = torch.randn(N, E).double()
    for one, other in zip(
        torch.autograd.grad(found.embeddings, leaves, above),
        torch.autograd.grad(wanted, leaves, above),
        strict=True,
    ):
        assert_close(one, other, 1e-12)


def test_derivatives():
    leaves = projection()
    soft = functools.partial(linear, hard=False, chunk_tokens=4)
    assert torch.autograd.gradcheck(lambda *x: soft(*x).embeddings, leaves)
    assert torch.autograd.gradgradcheck(lambda *x: soft(*x).embeddings, leaves)
    logits = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    call = functools.partial(losses.gumbel_softmax, hard=False)
    assert torch.autograd.gradcheck(lambda x: call(x, generator=seeded()), logits)
    assert torch.autograd.gradgradcheck(lambda x: call(x, generator=seeded()), logits)
    # Straight through: that of the relaxed sample, again.
    above = torch.randn(3, 4).double()
    seconds = []
    for hard in (True, False):
        sample = losses.gumbel_softmax(logits, hard=hard, generator=seeded())
        (first,) = torch.autograd.grad(sample, logits, above, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), logits)[0])
    assert_close(*seconds, 1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("drop", [True, False])
def test_masked_rows(value, drop):
    leaves = projection()
    mask = torch.arange(N) % 3 != 1
    results = []
    for spoil in (False, True):
        h, w, b, table = (x.detach().clone() for x in leaves)
        if spoil:
            h[~mask], w[USED:], b[USED:], table[USED:] = value, value, value, value
        fresh = [x.requires_grad_() for x in (h, w, b, table)]
        found = linear(*fresh, True, mask=mask, drop_ignored=drop)
        assert (found.ids[~mask] == -1).all()
        logits = torch.randn(N, V, generator=seeded(1)).masked_fill(spoil & ~mask[:, None], value)
        logits.requires_grad_()
        sample = losses.gumbel_softmax(logits, mask=mask, generator=seeded())
        (of_logits,) = torch.autograd.grad(sample.square().sum() + sample[:, 0].sum(), logits)
        loss = found.embeddings.sum()
        results.append([found.embeddings, *torch.autograd.grad(loss, fresh), sample, of_logits])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    for place in (0, 1, 5, 6):
        assert (results[1][place][~mask] == 0).all()


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(40, 30, requires_grad=True)
    results = []
    for step in (40, 7):
        monkeypatch.setattr(
            gumbel, "plan", lambda *_, step=step, **__: type("P", (), {"chunk_tokens": 8 * step})
        )
        sample = losses.gumbel_softmax(logits.view(4, 10, 30), generator=seeded())
        results.append([sample, torch.autograd.grad(sample[..., 2].sum(), logits)[0]])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in projection()]
    found = linear(*leaves, False)
    assert found.embeddings.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = linear(*exact, False)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert_close(found.embeddings, wanted.embeddings, tolerance)
    for one, other in zip(
        torch.autograd.grad(found.embeddings.sum(), leaves),
        torch.autograd.grad(wanted.embeddings.sum(), exact),
        strict=True,
    ):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= 2 * tolerance * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_logits(dtype):
    leaves = [x.detach().to(dtype) for x in projection()]
    wanted = linear(*(x.double() for x in leaves), False).embeddings
    errors = [
        float((linear(*leaves[:3], leaves[3].float(), False, logits_dtype=logits_dtype).embeddings
               - wanted).abs().max())
        for logits_dtype in (torch.float32, None)
    ]  # fmt: skip
    assert errors[0] < 1e-5 < 1e-4 < errors[1]


def test_other_ways_of_calling():
    leaves = projection()
    wanted = linear(*leaves, True).embeddings
    three = linear(leaves[0].view(1, N, D), *leaves[1:], True)
    assert_close(three.embeddings[0], wanted, 1e-12)
    grads = torch.autograd.grad(wanted.square().sum(), leaves)
    found = torch.func.grad(lambda *x: linear(*x, True).embeddings.square().sum(), (0, 1, 2, 3))(
        *leaves
    )
    for one, other in zip(found, grads, strict=True):
        assert_close(one, other, 1e-12)
    assert losses.gumbel_softmax(torch.zeros(0, 5)).shape == (0, 5)
    compiled = torch.compile(
        lambda h, w, t: losses.linear_gumbel_embeddings(h, w, t).embeddings
        + losses.gumbel_softmax(h @ w.t()) @ t,
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    value = compiled(leaves[0], leaves[1], leaves[3])
    assert value.shape == (N, E)
    value.sum().backward()
    assert leaves[0].grad.isfinite().all()


def test_what_does_not_fit():
    h, w, _, table = projection()
    for call, message in (
        (lambda: losses.gumbel_softmax(h, temperature=0.0), "temperature must be"),
        (lambda: losses.gumbel_softmax(h, mask=h), "mask must have"),
        (lambda: losses.gumbel_softmax(h.long()), "expected logits"),
        (lambda: losses.linear_gumbel_embeddings(h, w, table[:3]), "rows of 9 tokens"),
        (lambda: losses.linear_gumbel_embeddings(h, w[:, :2], table), "expected hidden states"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
