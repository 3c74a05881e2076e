"""Multi-token prediction against one cross entropy after the other in float64, and its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st
from torch.utils.flop_counter import FlopCounterMode

from llmloss_ext import losses

B, S, D, V, USED, K = 2, 8, 4, 11, 9, 3
WEIGHTS = [1.0, 0.5, -0.25]


class Batch:
    def __init__(self, seed, dtype=torch.double):
        torch.manual_seed(seed)
        self.hidden = [torch.randn(B, S, D).to(dtype).requires_grad_() for _ in range(K)]
        self.heads = [torch.randn(V, D).to(dtype).requires_grad_() for _ in range(K)]
        self.biases = [torch.randn(V).to(dtype).requires_grad_() for _ in range(K)]
        self.ids = torch.randint(0, USED, (B, S))
        self.ids[0, 2] = -100
        self.mask = torch.ones(B, S)
        self.mask[0, :2] = self.mask[1, 6:] = 0
        self.documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
        self.token_weight = torch.rand(B, S)
        self.token_weight[1, 3] = 0


# What is given: K hidden states or one, K heads or one.
WAYS = {
    "K heads": (False, True),
    "K hidden states": (True, False),
    "K of both": (True, True),
    "one of both": (False, False),
}


def ours(batch, way, *, dense=False, **given):
    many_hidden, many_heads = WAYS[way]
    given = {"offsets": K, "weights": WEIGHTS, "vocab_size": USED, **given}
    if dense:
        logits = [
            batch.hidden[i if many_hidden else 0] @ batch.heads[i if many_heads else 0].t()
            + batch.biases[i if many_heads else 0]
            for i in range(K)
        ]
        one = not (many_hidden or many_heads)
        return losses.multi_token_prediction_loss(logits[0] if one else logits, batch.ids, **given)
    return losses.multi_token_prediction_loss(
        batch.hidden if many_hidden else batch.hidden[0],
        batch.ids,
        batch.heads if many_heads else batch.heads[0],
        linear_bias=batch.biases if many_heads else batch.biases[0],
        chunk_tokens=5,
        **given,
    )


def by_definition(batch, way, *, mask=None, documents=None, token_weight=None, items=None,
                  smoothing=0.0, z_loss=0.0, gamma=0.0, scale=1.0, softcap=None,
                  temperature=1.0):  # fmt: skip
    many_hidden, many_heads = WAYS[way]
    found = []
    for place in range(K):
        k, head = place + 1, place if many_heads else 0
        h, w, b = (x[y].double() for x, y in (
            (batch.hidden, place if many_hidden else 0), (batch.heads, head), (batch.biases, head)
        ))  # fmt: skip
        z = (h @ w.t() + b)[..., :USED] * scale
        z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
        total, count = 0.0, 0.0
        for n in range(B):
            for i in range(S - k):
                span = range(i, i + k + 1)
                target = int(batch.ids[n, i + k])
                if target == -100 or (mask is not None and not all(mask[n, j] for j in span)):
                    continue
                if documents is not None and len({int(documents[j]) for j in span}) > 1:
                    continue
                factor = 1.0 if token_weight is None else float(token_weight[n, i + k])
                log_p = z[n, i].log_softmax(-1)
                loss = -(1 - smoothing) * log_p[target] - smoothing * log_p.mean()
                loss = loss * (1 - log_p[target].exp()) ** gamma
                total = total + factor * (loss + z_loss * z[n, i].logsumexp(-1).square())
                count += factor
        found.append(total / (count if items is None else items[place]))
    return sum(f * w for f, w in zip(found, WEIGHTS, strict=True)), found


GIVEN = {
    "plain": lambda b: ({}, {}),
    "mask": lambda b: ({"attention_mask": b.mask}, {"mask": b.mask}),
    "documents": lambda b: ({"document_ids": b.documents}, {"documents": b.documents}),
    "token weights": lambda b: (
        {"token_weight": b.token_weight}, {"token_weight": b.token_weight}
    ),
    "options": lambda b: (
        {
            "label_smoothing": 0.1, "z_loss": 0.01, "focal_gamma": 1.5, "logit_scale": 0.7,
            "softcap": 3.0, "temperature": 1.3,
        },
        {
            "smoothing": 0.1, "z_loss": 0.01, "gamma": 1.5, "scale": 0.7, "softcap": 3.0,
            "temperature": 1.3,
        },
    ),
    "items": lambda b: ({"num_items": [5, 6, 7]}, {"items": [5, 6, 7]}),
    "a tensor of items": lambda b: ({"num_items": torch.tensor([5, 6, 7])}, {"items": [5, 6, 7]}),
    "one number of items": lambda b: ({"num_items": 9}, {"items": [9] * 3}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("dense", [False, True])
@hypothesis.settings(SETTINGS, max_examples=3)
@hypothesis.given(st.integers(0, 1000))
def test_against_one_cross_entropy_after_the_other(way, name, dense, seed):
    batch = Batch(seed)
    given, theirs = GIVEN[name](batch)
    found = ours(batch, way, dense=dense, **given)
    wanted, each = by_definition(batch, way, **theirs)
    assert_close(found.loss, wanted, 1e-9)
    assert_close(found.losses, torch.stack(each), 1e-9)
    assert not found.losses.requires_grad
    leaves = [*batch.hidden, *batch.heads, *batch.biases]
    for one, other in zip(
        torch.autograd.grad(found.loss, leaves, allow_unused=True),
        torch.autograd.grad(wanted, leaves, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, 1e-9)


def test_a_learned_scale():
    batch = Batch(0)
    scale = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    grads = [
        torch.autograd.grad(loss, scale)[0]
        for loss in (
            ours(batch, "one of both", logit_scale=scale, temperature=1.3).loss,
            by_definition(batch, "one of both", scale=scale, temperature=1.3)[0],
        )
    ]
    assert_close(*grads, 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches(way):
    batch = Batch(4)
    how = {"document_ids": batch.documents}
    counts = losses.count_multi_token_items(batch.ids, K, **how)
    whole = ours(batch, way, **how)
    parts = []
    for n in range(B):
        part = Batch(4)
        part.hidden = [h[n : n + 1] for h in batch.hidden]
        part.heads, part.biases, part.ids = batch.heads, batch.biases, batch.ids[n : n + 1]
        parts.append(ours(part, way, num_items=counts, **how).loss)
    assert_close(sum(parts), whole.loss, 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_takes_no_part_spoils_nothing(way, value):
    results = []
    for spoil in (False, True):
        batch = Batch(5, torch.float32)
        gone = batch.mask == 0
        if spoil:
            with torch.no_grad():
                for h, w, b in zip(batch.hidden, batch.heads, batch.biases, strict=True):
                    h[gone], w[USED:], b[USED:] = value, value, value
            batch.ids[gone] = 10**9
        leaves = [batch.hidden[0], batch.heads[0], batch.biases[0]]
        loss = ours(batch, way, attention_mask=batch.mask).loss
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[1][1][gone] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["one of both", "K heads"])
def test_types(way, dtype):
    batch = Batch(1, dtype)
    found, (wanted, _) = ours(batch, way).loss, by_definition(batch, way)
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(found, wanted, tolerance)
    if dtype != torch.float32:
        assert_close(ours(batch, way, logits_dtype=torch.float32).loss, wanted, 1e-4)
    leaves = [batch.hidden[0], batch.heads[0]]
    for one, other in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        assert (one.double() - other.double()).norm() < tolerance * other.double().norm()


def test_short_texts_and_weights_of_0():
    batch = Batch(2)
    found = losses.multi_token_prediction_loss(
        batch.hidden[0], batch.ids, batch.heads[0], offsets=9
    )
    assert found.losses[-2:].tolist() == [0.0, 0.0]
    assert found.loss.isfinite()
    one = losses.multi_token_prediction_loss(
        batch.hidden, batch.ids, batch.heads, offsets=[2, 5, 1], weights=[0.0, 1.0, 0.0]
    )
    assert one.losses[0] == one.losses[2] == 0
    alone = losses.multi_token_prediction_loss(
        batch.hidden[1], batch.ids, batch.heads[1], offsets=[5]
    )
    assert_close(one.loss, alone.loss, 1e-12)
    one.loss.backward()
    assert batch.hidden[0].grad is None
    for hidden, heads in ((batch.hidden, batch.heads), (batch.hidden[0], batch.heads[0])):
        nothing = losses.multi_token_prediction_loss(
            hidden, batch.ids, heads, offsets=[2, 5, 1], weights=[0.0, 0.0, 0.0]
        )
        leaves = [*hidden, *heads] if isinstance(hidden, list) else [hidden, heads]
        assert nothing.loss == 0
        assert all(not grad.any() for grad in torch.autograd.grad(nothing.loss, leaves))
    none = ours(batch, "one of both", num_items=0)
    assert none.loss == 0
    assert torch.autograd.grad(none.loss, batch.heads[0])[0].abs().max() == 0


def test_the_number_of_labels():
    batch = Batch(0)
    found = losses.count_multi_token_items(
        batch.ids, [1, 3], document_ids=batch.documents, attention_mask=batch.mask
    )
    wanted = []
    for k in (1, 3):
        wanted.append(sum(
            batch.ids[n, i + k] != -100
            and all(batch.mask[n, j] for j in range(i, i + k + 1))
            and len({int(batch.documents[j]) for j in range(i, i + k + 1)}) == 1
            for n in range(B) for i in range(S - k)
        ))  # fmt: skip
    assert found.tolist() == [int(x) for x in wanted]


def test_one_head_and_one_hidden_state_are_projected_once():
    batch = Batch(0)
    product = 2 * B * S * D * USED
    counted = {}
    for way in ("one of both", "K heads"):
        with FlopCounterMode(display=False) as counter:
            ours(
                batch,
                way,
            ).loss.backward()
        counted[way] = counter.get_total_flops() / product
    assert counted["one of both"] <= 4
    assert counted["K heads"] > 2 * K


def test_derivatives():
    batch = Batch(0)

    def call(h, w, b):
        return losses.multi_token_prediction_loss(h, batch.ids, w, linear_bias=b, offsets=2).loss

    leaves = [batch.hidden[0], batch.heads[0], batch.biases[0]]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_what_does_not_fit():
    b = Batch(0)
    call = losses.multi_token_prediction_loss
    h, w = b.hidden[0], b.heads[0]
    for arguments, given, message in (
        ((h, b.ids, w), {"offsets": 0}, "offsets must be"),
        ((h, b.ids, w), {"offsets": [0, 1]}, "offsets must be"),
        ((h, b.ids, w), {"offsets": 2, "weights": [1.0]}, "expected 2 weights"),
        ((h, b.ids, w), {"offsets": 1, "weights": [float("nan")]}, "must be finite"),
        ((h, b.ids, b.heads), {"offsets": 2}, "expected one linear_weight, or 2"),
        ((h, b.ids[0], w), {"offsets": 2}, "labels"),
        ((h, b.ids, w), {"offsets": 2, "num_items": [1, 2, 3]}, "num_items"),
        ((h, b.ids), {"offsets": 2, "chunk_tokens": 3}, "belongs to hidden states"),
        ((h, b.ids), {"offsets": 2, "logits_dtype": h.dtype}, "logits_dtype belongs to"),
        ((h, b.ids, w), {"offsets": 1, "token_weight": torch.rand(B, S).requires_grad_()},
         "token_weight must not require"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call(*arguments, **given)
    with pytest.raises(TypeError, match="offsets must be an integer"):
        call(h, b.ids, w, offsets=[1.5])
    bad = b.ids.clone()
    bad[1, 4] = USED
    with pytest.raises(IndexError, match=rf"Target {USED} at position \(1, 4\)"):
        call(h, bad, w, offsets=2, vocab_size=USED)


MEASURE = """
import ctypes, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from linear.peak_memory import map_large_blocks, resident
from llmloss_ext import losses, plan
map_large_blocks()
torch.set_num_threads(1)
n, d, v, k = 512, 64, 32000, 4
hidden = torch.randn(1, n, d, requires_grad=True)
weight = (torch.randn(v, d) * 0.02).requires_grad_()
ids = torch.randint(0, v, (1, n))
for _ in range(2):
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    losses.multi_token_prediction_loss(
        hidden, ids, weight, offsets=k, chunk_tokens=64
    ).loss.backward()
    peak = resident("VmHWM") - before
planned = plan(n, d, v, chunk_tokens=64, recompute=True)
print(peak, planned.peak_bytes, planned.chunk_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_the_peak_is_that_of_one_chunk():
    """A chunk's logits, and float32 copies of an eighth of it; not those of all tokens."""
    tests = Path(__file__).parents[1]
    code = MEASURE.format(tests=str(tests))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tests.parent,
    )  # fmt: skip
    peak, planned, chunk = map(int, done.stdout.split())
    assert peak < planned + 2.5 * chunk
    assert peak < 512 * 32000 * 4  # of the logits alone
