"""Unlikelihood against Welleck et al. 2020, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import linear_log_probs, losses

B, S, D, V, USED = 2, 7, 4, 11, 9


class Batch:
    def __init__(self, seed, dtype=torch.double):
        torch.manual_seed(seed)
        self.hidden = torch.randn(B, S, D).to(dtype).requires_grad_()
        self.weight = torch.randn(V, D).to(dtype).requires_grad_()
        self.bias = torch.randn(V).to(dtype).requires_grad_()
        self.ids = torch.randint(0, 5, (B, S))
        self.mask = torch.ones(B, S)
        self.mask[0, :2] = self.mask[1, 5:] = 0
        self.documents = torch.tensor([0, 0, 0, 1, 1, 1, 0])
        self.labels = self.ids.clone()
        self.labels[0, 3] = -100

    @property
    def leaves(self):
        return [self.hidden, self.weight, self.bias]

    def ours(self, way, **given):
        if way == "dense":
            logits = self.hidden @ self.weight.t() + self.bias
            return losses.unlikelihood_loss(logits, self.ids, vocab_size=USED, **given)
        return losses.unlikelihood_loss(
            self.hidden, self.ids, self.weight, linear_bias=self.bias, vocab_size=USED,
            chunk_tokens=3, drop_ignored=way == "dropped", **given,
        )  # fmt: skip


def by_definition(b, labels=None, mask=None, documents=None, context=None, scale=1.0, softcap=None,
                  temperature=1.0):  # fmt: skip
    """Each position's sum over the different tokens of its context, and which positions count."""
    labels = b.ids if labels is None else labels
    z = (b.hidden.double() @ b.weight.double().t() + b.bias.double())[..., :USED] * scale
    p = ((softcap * torch.tanh(z / softcap) if softcap else z) / temperature).softmax(-1)
    rows, counts = torch.zeros(B, S).double(), torch.zeros(B, S, dtype=torch.bool)
    for n in range(B):

        def one_text(i, j, n=n):
            """Whether tokens i to j are real and of one document."""
            span = range(min(i, j), max(i, j) + 1)
            real = mask is None or all(mask[n, k] for k in span)
            return real and (documents is None or len({int(documents[k]) for k in span}) == 1)

        for i in range(S - 1):
            target = int(labels[n, i + 1])
            if target == -100 or not one_text(i, i + 1):
                continue
            counts[n, i] = True
            first = 0 if context is None else max(i + 1 - context, 0)
            candidates = {int(b.ids[n, j]) for j in range(first, i + 1) if one_text(j, i)}
            for c in candidates - {target}:
                rows[n, i] = rows[n, i] - torch.log1p(-p[n, i, c])
    return rows, counts


WAYS = ["dense", "dropped", "kept"]
GIVEN = {
    "plain": lambda b: ({}, {}),
    "labels": lambda b: ({"labels": b.labels}, {"labels": b.labels}),
    "mask": lambda b: ({"attention_mask": b.mask}, {"mask": b.mask}),
    "documents": lambda b: ({"document_ids": b.documents}, {"documents": b.documents}),
    "context": lambda b: ({"context": 2}, {"context": 2}),
    "scale": lambda b: (
        {"logit_scale": 0.7, "softcap": 2.0}, {"scale": 0.7, "softcap": 2.0}
    ),
    "temperature": lambda b: (
        {"temperature": 1.7, "logit_scale": 0.7, "softcap": 2.0},
        {"temperature": 1.7, "scale": 0.7, "softcap": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GIVEN)
@hypothesis.settings(SETTINGS, max_examples=5)
@hypothesis.given(st.integers(0, 1000))
def test_against_the_definition(way, name, seed):
    batch = Batch(seed)
    ours, theirs = GIVEN[name](batch)
    rows, counts = by_definition(batch, **theirs)
    found = batch.ours(way, reduction="none", **ours)
    assert_close(found, rows, 1e-9)
    wanted = rows.sum() / counts.sum()
    mean = batch.ours(way, **ours)
    assert_close(mean, wanted, 1e-9)
    assert_close(batch.ours(way, reduction="sum", **ours), rows.sum(), 1e-9)
    assert_close(batch.ours(way, num_items=7, **ours), rows.sum() / 7, 1e-9)
    for one, other in zip(
        torch.autograd.grad(mean, batch.leaves), torch.autograd.grad(wanted, batch.leaves),
        strict=True,
    ):  # fmt: skip
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_a_learned_scale(way):
    batch = Batch(0)
    scale = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    rows, counts = by_definition(batch, scale=scale, softcap=2.0, temperature=1.7)
    found = batch.ours(way, logit_scale=scale, softcap=2.0, temperature=1.7)
    (one,) = torch.autograd.grad(found, scale)
    (other,) = torch.autograd.grad(rows.sum() / counts.sum(), scale)
    assert_close(one, other, 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_takes_no_part_spoils_nothing(way, value):
    results = []
    for spoil in (False, True):
        batch = Batch(3, torch.float32)
        gone = batch.mask == 0
        logits = (batch.hidden @ batch.weight.t() + batch.bias).detach()
        if spoil:
            batch.ids[gone] = 10**9
            logits[gone], logits[..., USED:] = value, value
            with torch.no_grad():
                batch.hidden[gone], batch.weight[USED:], batch.bias[USED:] = value, value, value
        leaves = [logits.requires_grad_()] if way == "dense" else batch.leaves
        scale = torch.tensor(1.3, requires_grad=True)
        options = {"attention_mask": batch.mask, "logit_scale": scale}
        if way == "dense":
            loss = losses.unlikelihood_loss(logits, batch.ids, vocab_size=USED, **options)
        else:
            loss = batch.ours(way, **options)
        results.append([loss, *torch.autograd.grad(loss, [*leaves, scale])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[1][1][gone] == 0).all()
    assert results[1][-1] != 0


@pytest.mark.parametrize("way", ["dense", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(way, dtype):
    batch = Batch(1, dtype)
    rows, counts = by_definition(batch)
    found = batch.ours(way)
    assert found.dtype == torch.float32
    wanted = rows.sum() / counts.sum()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(found, wanted, tolerance)
    if way != "dense" and dtype != torch.float32:
        assert_close(batch.ours(way, logits_dtype=torch.float32), wanted, 1e-4)
    for one, other in zip(
        torch.autograd.grad(found, batch.leaves), torch.autograd.grad(wanted, batch.leaves),
        strict=True,
    ):  # fmt: skip
        assert (one.double() - other.double()).norm() < tolerance * other.double().norm()


@pytest.mark.parametrize("lead", [5.0, 20.0, 60.0, 1e4])
def test_a_repeated_token_that_is_nearly_certain(lead):
    """In float32: -log(1 - p), and a gradient that is neither 0 nor infinite."""
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1] = lead
    logits.requires_grad_()
    loss = losses.unlikelihood_loss(logits, torch.tensor([[1, 2]]))
    exact = lead - math.log(2) + math.log1p(2 * math.exp(-lead))
    assert abs(loss.item() / exact - 1) < 1e-6
    (grad,) = torch.autograd.grad(loss, logits)
    p = math.exp(lead) / (math.exp(lead) + 2) if lead < 100 else 1.0
    assert_close(grad[0, 0], torch.tensor([-p / 2, p, -p / 2]), 1e-6 if lead < 100 else 3e-4)


@pytest.mark.slow
def test_derivatives():
    batch = Batch(0)
    scale = torch.tensor(1.3, dtype=torch.double, requires_grad=True)
    for way in ("dense", "dropped"):

        def call(h, w, b, s, way=way):
            batch.hidden, batch.weight, batch.bias = h, w, b
            return batch.ours(way, logit_scale=s)

        assert torch.autograd.gradcheck(call, [*batch.leaves, scale])
        assert torch.autograd.gradgradcheck(call, [*batch.leaves, scale])


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_of_16_bit_logits_is_not_rounded_into_them(way):
    batch = Batch(2, torch.bfloat16)
    scales = torch.tensor(1.234, requires_grad=True), 1.234
    one, other = (batch.ours(way, logit_scale=scale) for scale in scales)
    assert_close(one, other, 1e-6)


def test_a_scale_alone_is_learned():
    """Of logits without a gradient, twice over too."""
    batch = Batch(0)
    scale = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    logits = (batch.hidden @ batch.weight.t()).detach()

    def call(s):
        return losses.unlikelihood_loss(logits, batch.ids, logit_scale=s)

    assert torch.autograd.gradcheck(call, [scale])
    assert torch.autograd.gradgradcheck(call, [scale])


def test_texts_of_no_token():
    ids = torch.zeros(2, 0, dtype=torch.int64)
    logits = torch.zeros(2, 0, 5, requires_grad=True)
    assert losses.unlikelihood_loss(logits, ids, reduction="sum") == 0
    assert losses.unlikelihood_loss(logits, ids, reduction="none").shape == (2, 0)
    hidden, weight = torch.zeros(2, 0, 4), torch.zeros(5, 4)
    assert losses.unlikelihood_loss(hidden, ids, weight, num_items=3) == 0


def ngrams_by_hand(row, n, mask):
    found, seen = [False] * len(row), set()
    for i in range(len(row) - n + 1):
        if not all(mask[i : i + n]):
            continue
        gram = tuple(row[i : i + n])
        if gram in seen:
            found[i : i + n] = [True] * n
        seen.add(gram)
    return found


@SETTINGS
@hypothesis.given(
    st.lists(st.integers(-1, 2), min_size=0, max_size=12), st.integers(1, 5), st.randoms()
)
def test_repeated_ngrams(row, n, random):
    mask = [random.random() < 0.8 for _ in row]
    other = [random.randint(0, 2) for _ in row]
    ids = torch.tensor([row, other], dtype=torch.long)
    masks = torch.tensor([mask, [True] * len(row)])
    found = losses.repeated_ngrams(ids, n, masks)
    assert found.tolist() == [ngrams_by_hand(row, n, mask), ngrams_by_hand(other, n, [True] * 99)]
    whole = losses.repeated_ngrams(ids * 10**12, n)
    assert whole[0].tolist() == ngrams_by_hand(row, n, [True] * 99)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_a_generated_sequence(dtype):
    log_p = torch.tensor([[-0.5, -2.0, -1e-3], [-1.0, -3.0, -0.1]]).to(dtype)
    wrong = torch.tensor([[1, 0, 1], [0, 1, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    spoilt = log_p.clone()
    spoilt[1, 2] = float("nan")
    spoilt.requires_grad_()
    found = losses.sequence_unlikelihood_loss(spoilt, wrong, mask)
    x = log_p.double()
    assert_close(found, -torch.log(1 - x[[0, 0, 1], [0, 2, 1]].exp()).sum() / 5, 1e-6)
    (grad,) = torch.autograd.grad(found, spoilt)
    p = x.exp()
    wanted = torch.where((wrong * mask).bool(), p / (1 - p) / 5, 0.0)
    assert_close(grad / 200, wanted / 200, 1e-2 if dtype.itemsize == 2 else 1e-6)
    assert (grad[~(wrong * mask).bool()] == 0).all()


def test_a_gradient_beyond_float16():
    log_probs = torch.tensor([-6e-8, -1.0]).half().requires_grad_()
    loss = losses.sequence_unlikelihood_loss(log_probs, torch.ones(2))
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert grad[0] == -65504 or grad[0] == 65504
    assert grad.isfinite().all()


def test_of_a_certain_token():
    """Log p of the kernels tells 1 - p; of p = 1 exactly the loss is finite, without gradient."""
    hidden = torch.tensor([[20.0, 0.0]], requires_grad=True)
    log_p = linear_log_probs(hidden, torch.eye(2), torch.tensor([0]))
    loss = losses.sequence_unlikelihood_loss(log_p, torch.ones(1))
    assert abs(loss.item() - 20) < 1e-5
    assert_close(torch.autograd.grad(loss, hidden)[0], torch.tensor([[1.0, -1.0]]), 1e-5)
    certain = torch.zeros(1, requires_grad=True)
    loss = losses.sequence_unlikelihood_loss(certain, torch.ones(1))
    assert 80 < loss < 90
    assert torch.autograd.grad(loss, certain)[0] == 0


def test_training_stops_to_repeat():
    """A model that copies its last token learns not to."""
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (8, 10))
    weight = torch.nn.Parameter(torch.eye(6) * 4)
    hidden = torch.nn.functional.one_hot(ids, 6).float()
    optimizer = torch.optim.Adam([weight], lr=0.1)
    chance = []
    for _ in range(60):
        probs = (hidden @ weight.t()).softmax(-1)
        chance.append(probs.gather(-1, ids.unsqueeze(-1)).mean().item())
        loss = losses.unlikelihood_loss(hidden, ids, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert chance[0] > 0.9
    assert chance[-1] < 0.25


def test_what_does_not_fit():
    b = Batch(0)
    z = torch.zeros(B, S, V)
    for call, message in (
        (lambda: losses.unlikelihood_loss(z, b.ids[0]), "input_ids must have"),
        (lambda: losses.unlikelihood_loss(z, b.ids, labels=b.ids[0]), "labels must have"),
        (lambda: losses.unlikelihood_loss(z, b.ids, reduction="max"), "reduction must be"),
        (lambda: losses.unlikelihood_loss(z, b.ids, context=0), "context must be"),
        (lambda: losses.unlikelihood_loss(z, b.ids, chunk_tokens=3), "belongs to hidden states"),
        (lambda: losses.unlikelihood_loss(z, b.ids, logits_dtype=z.dtype), "logits_dtype belongs"),
        (lambda: losses.unlikelihood_loss(z, b.ids, vocab_size=V + 1), "vocab_size must be"),
        (lambda: losses.repeated_ngrams(b.ids, 0), "n >= 1"),
        (lambda: losses.sequence_unlikelihood_loss(z, b.ids), "penalised must have"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
