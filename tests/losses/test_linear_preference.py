"""Preference losses from hidden states, against whole logits in float64 written out."""

from __future__ import annotations

import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import linear_log_probs, losses
from llmloss_ext.linear import planning, projection, walk
from llmloss_ext.losses import linear_preference_loss

B, S, D, V = 3, 7, 8, 29


class Batch:
    def __init__(self, device, dtype=torch.float64):
        torch.manual_seed(5)
        self.hidden = torch.randn(2 * B, S, D, device=device).to(dtype)
        self.weight = torch.randn(V, D, device=device).to(dtype)
        self.bias = torch.randn(V, device=device).to(dtype)
        self.reference = self.hidden + (0.2 * torch.randn_like(self.hidden.float())).to(dtype)
        self.target = torch.randint(0, V, (2 * B, S), device=device)
        lengths = torch.tensor([5, 7, 2, 4, 6, 7], device=device)
        self.valid = torch.arange(S, device=device) < lengths[:, None]
        self.target[~self.valid] = -100
        self.theirs = {
            "reference_input": self.reference, "reference_weight": self.weight,
            "reference_bias": self.bias,
        }  # fmt: skip

    def leaves(self):
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def log_probs(self, h, w, b):
        log_p = F.linear(h, w, b).log_softmax(-1)
        chosen = log_p.gather(-1, self.target.clamp_min(0)[..., None]).squeeze(-1)
        squares = (2 * log_p).logsumexp(-1)
        return torch.where(self.valid, chosen, 0), torch.where(self.valid, squares, 0)


def by_hand(batch, h, w, b, loss="dpo", ld_alpha=None, use_weighting=False, **options):
    """The loss of (B) scores made from whole logits."""
    tokens, squares = batch.log_probs(h, w, b)
    counts = batch.valid.sum(-1)

    def scores(x):
        if ld_alpha is None:
            return x.sum(-1)
        shared = torch.minimum(*counts.chunk(2)).repeat(2)
        first = torch.arange(S, device=x.device) < shared[:, None]
        return torch.where(first, x, ld_alpha * x).sum(-1)

    of = scores(tokens)
    kind = options.get("kind", "sigmoid")
    if loss in ("simpo", "orpo") or (loss == "cpo" and kind in ("simpo", "ipo")):
        of = of / counts
    nll = -tokens[:B].sum() / batch.valid[:B].sum()
    if loss == "dpo":
        with torch.no_grad():
            reference = scores(batch.log_probs(batch.reference, batch.weight, batch.bias)[0])
        if use_weighting:
            each = ((tokens - squares).sum(-1) / counts).exp().detach()
            options["pair_weight"] = each[:B] * each[B:]
        if kind in ("ipo", "sigmoid_norm"):
            options |= {"chosen_lengths": counts[:B], "rejected_lengths": counts[B:]}
        if "sft" in kind:
            options["nll_loss"] = nll
        return losses.dpo_loss(*of.chunk(2), *reference.chunk(2), **options)
    function = getattr(losses, f"{loss}_loss")
    if loss == "orpo" or (loss == "cpo" and options.get("cpo_alpha") != 0):
        options["nll_loss"] = nll
    return function(*of.chunk(2), **options)


CASES = {
    "dpo": {},
    "ipo": {"kind": "ipo"},
    "sigmoid_norm": {"kind": "sigmoid_norm"},
    "rpo": {"kind": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)},
    "several": {"kind": ("apo_zero", "bco_pair")},
    "ld-dpo": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True, "beta": 0.3},
    "simpo": {"loss": "simpo", "gamma": 0.7},
    "cpo": {"loss": "cpo"},
    "cpo-simpo": {"loss": "cpo", "kind": "simpo", "cpo_alpha": 0.5},
    "cpo without nll": {"loss": "cpo", "kind": "hinge", "cpo_alpha": 0},
    "orpo": {"loss": "orpo", "beta": 0.2},
}


def ours(batch, h, w, b, **options):
    given = options if options.get("loss", "dpo") != "dpo" else {**batch.theirs, **options}
    return linear_preference_loss(h, w, batch.target, linear_bias=b, **given)


@pytest.fixture
def chunks(monkeypatch):
    """The tokens of each chunk whose statistics are computed, as it goes."""
    seen, statistics = [], walk.LocalRows.statistics

    def counted(self, logits, target, wanted):
        seen.append(len(logits))
        return statistics(self, logits, target, wanted)

    monkeypatch.setattr(walk.LocalRows, "statistics", counted)
    return seen


@pytest.fixture
def _chunks_of_4(monkeypatch):
    """By default a chunk has four tokens."""
    monkeypatch.setattr(planning, "_LEAST_TOKENS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(planning, "_DEFAULT_BYTES", {"cpu": 4 * 32 * 8, "cuda": 1})


CHUNKS = {
    "all in one": {},
    "a pair": {"chunk_tokens": 13},
    "two pairs": {"chunk_tokens": 2 * 2 * S, "drop_ignored": False},
    "less than a pair": {"chunk_tokens": 5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_as_by_hand(device, case, chunk):
    batch, results = Batch(device), []
    for function, how in ((ours, CHUNKS[chunk]), (by_hand, {})):
        leaves = batch.leaves()
        found = function(batch, *leaves, **CASES[case], **how)
        results.append((found, torch.autograd.grad(found.loss, leaves)))
    (one, gradients), (other, wanted) = results
    for field in one._fields:
        mine, theirs = getattr(one, field), getattr(other, field)
        assert (mine is None) == (theirs is None), field
        if mine is not None:
            assert_close(mine.detach(), theirs.detach(), 1e-10)
            assert field == "loss" or not mine.requires_grad
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert_close(mine, theirs, 1e-9)
        assert theirs.any()


@pytest.mark.parametrize("case", ["dpo", "orpo"])
def test_masked_tokens_may_hold_anything(device, case):
    batch = Batch(device)
    plain = batch.leaves()
    wanted = torch.autograd.grad(ours(batch, *plain, **CASES[case]).loss, plain)
    batch.hidden[~batch.valid] = torch.nan
    batch.reference[~batch.valid] = torch.inf
    whole = batch.target.clone()
    batch.target[~batch.valid] = 3
    for drop in (True, False):
        leaves = batch.leaves()
        found = ours(batch, *leaves, mask=batch.valid, drop_ignored=drop, **CASES[case])
        for one, other in zip(torch.autograd.grad(found.loss, leaves), wanted, strict=True):
            assert_close(one, other, 1e-9)
    assert (whole == -100).any()


def test_a_stored_reference(device):
    batch = Batch(device)
    leaves = batch.leaves()
    tokens, _ = batch.log_probs(batch.reference, batch.weight, batch.bias)
    wanted = ours(batch, *leaves).loss
    for stored in (tokens, tokens.sum(-1)):
        found = linear_preference_loss(
            leaves[0], leaves[1], batch.target, linear_bias=leaves[2], reference_log_probs=stored
        ).loss
        assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("case", ["dpo", "orpo", "rpo"])
def test_micro_batches_add_up(device, case):
    batch, options = Batch(device), CASES[case]
    whole = batch.leaves()
    ours(batch, *whole, num_items=B, **options).loss.backward()
    parts = batch.leaves()
    items = {} if case == "dpo" else {"nll_items": int(batch.valid[:B].sum())}
    for rows in ([0, B], [1, 2, B + 1, B + 2]):
        one = Batch(device)
        one.target = batch.target[rows]
        one.theirs["reference_input"] = batch.reference[rows]
        ours(
            one, parts[0][rows], parts[1], parts[2], num_items=B, **items, **options
        ).loss.backward()
    for mine, theirs in zip(parts, whole, strict=True):
        assert_close(mine.grad, theirs.grad, 1e-9)


PAIRS = [9, 13, 9]  # tokens that count
WALKS = {
    "all in one": ({}, [31]),
    "a pair": ({"chunk_tokens": 13}, PAIRS),
    "a pair, nothing dropped": ({"chunk_tokens": 14, "drop_ignored": False}, [14, 14, 14]),
    "two pairs": ({"chunk_tokens": 29, "drop_ignored": False}, [28, 14]),
    "by bytes": ({"max_chunk_bytes": 13 * 32 * 8}, PAIRS),
    "less than a pair": ({"chunk_tokens": 12}, 2 * [11, 11, 9]),
    "compared": ({"chunk_tokens": 13, "kind": "aot"}, 2 * [11, 11, 9]),
    "each by itself": ({"chunk_tokens": 13, "reduction": "none"}, 2 * [11, 11, 9]),
}


@pytest.mark.parametrize("case", WALKS)
def test_walks(monkeypatch, case):
    """The reference, then the policy: once where a chunk has whole pairs, else backward again."""
    batch, seen = Batch("cpu"), []
    options, wanted = WALKS[case]
    project = projection.Projection.project

    def counted(self, hidden, out):
        seen.append(len(hidden))
        return project(self, hidden, out)

    monkeypatch.setattr(projection.Projection, "project", counted)
    ours(batch, *batch.leaves(), **options).loss.sum().backward()
    assert seen[-len(wanted) :] == wanted
    reference = seen[: -len(wanted)]
    assert sum(reference) == (31 if options.get("drop_ignored", True) else 2 * B * S)


@pytest.mark.usefixtures("_chunks_of_4")
def test_a_pair_that_is_larger_than_a_chunk_need_be(monkeypatch, chunks):
    """By default: it costs memory, and spares a product. Not where there is none to spare."""
    batch = Batch("cpu")
    options = {"reference_log_probs": torch.zeros(2 * B, S)}
    how = {"reference_input": None, "reference_weight": None, "reference_bias": None} | options
    ours(batch, *batch.leaves(), **how)
    assert chunks == PAIRS
    chunks.clear()
    monkeypatch.setattr(planning, "_BYTES_BESIDE_SUMS", 12 * 32 * 8)
    ours(batch, *batch.leaves(), **how)
    assert max(chunks) <= 4


@pytest.mark.parametrize("drop", [True, False])
def test_a_pair_without_tokens(device, drop):
    """Its margin is 0, and it counts."""
    batch = Batch(device)
    batch.target[[1, B + 1]] = -100
    batch.valid[[1, B + 1]] = False
    for how in ({"chunk_tokens": 2 * S}, {"chunk_tokens": 2 * 2 * S}, {}):
        leaves, theirs = batch.leaves(), batch.leaves()
        found, wanted = ours(batch, *leaves, drop_ignored=drop, **how), by_hand(batch, *theirs)
        assert_close(found.loss.detach(), wanted.loss.detach(), 1e-12)
        assert found.margins[1] == 0
        for one, other in zip(
            torch.autograd.grad(found.loss, leaves), torch.autograd.grad(wanted.loss, theirs),
            strict=True,
        ):  # fmt: skip
            assert_close(one, other, 1e-9)


@pytest.mark.parametrize("how", [{}, {"chunk_tokens": 13}])
def test_twice_differentiated(device, how):
    batch, found = Batch(device), []
    for function, options in ((ours, how), (by_hand, {})):
        leaves = batch.leaves()
        loss = function(batch, *leaves, **options).loss
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((x * x).sum() for x in first), leaves))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("how", [{}, {"chunk_tokens": 13}, {"chunk_tokens": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(device, dtype, how):
    batch = Batch(device, dtype)
    leaves = batch.leaves()
    grads = torch.autograd.grad(ours(batch, *leaves, **how).loss, leaves)
    exact = Batch(device)
    for name in ("hidden", "weight", "bias", "reference"):
        setattr(exact, name, getattr(batch, name).double())
    doubles = exact.leaves()
    wanted = torch.autograd.grad(by_hand(exact, *doubles).loss, doubles)
    plain = batch.leaves()
    theirs = torch.autograd.grad(by_hand(batch, *plain).loss, plain)
    for one, other, true in zip(grads, theirs, wanted, strict=True):
        assert one.dtype == dtype
        norm = true.norm()
        assert (one - true).norm() / norm <= 1.2 * (other - true).norm() / norm + 1e-6


@pytest.mark.slow
def test_compiled(device):
    batch = Batch(device)
    leaves = batch.leaves()
    plain = ours(batch, *leaves).loss
    compiled = torch.compile(lambda *x: ours(batch, *x).loss, fullgraph=True)(*leaves)
    assert_close(compiled.detach(), plain.detach(), 1e-12)
    for one, other in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        assert_close(one, other, 1e-9)


def test_lengths_that_differ(chunks):
    """Short pairs share a chunk, whatever the longest takes."""
    batch = Batch("cpu")
    target = torch.full((2 * 20, S), -100)
    target[:, 0] = 1
    target[7] = 2
    hidden = torch.randn(2 * 20, S, D, dtype=torch.float64, requires_grad=True)
    linear_preference_loss(
        hidden, batch.weight, target, reference_log_probs=torch.zeros(40), chunk_tokens=16
    )
    assert sum(chunks) == 40 - 1 + S
    assert chunks == [14, 16, 16]


@pytest.mark.parametrize("how", [{}, {"chunk_tokens": 2 * 256}, {"chunk_tokens": 64}])
@pytest.mark.parametrize("kind", ["sppo_hard", "forward_kl"])
def test_large_gradients_of_long_sequences_in_float16(device, how, kind):
    """A pair's are about 1 over the pairs, not over the tokens, by which float16 is scaled."""
    torch.manual_seed(1)
    pairs, length = 4, 256
    hidden = torch.randn(2 * pairs, length, 16, device=device).half()
    weight = (torch.randn(64, 16, device=device) / 4).half()
    target = torch.randint(0, 64, (2 * pairs, length), device=device)
    with torch.no_grad():
        scores = losses.sequence_log_probs(
            linear_log_probs(hidden.double(), weight.double(), target)
        )
    far, options = (
        (400.0, {"kind": kind}) if kind == "sppo_hard" else (6.0, {"f_divergence_type": kind})
    )
    given = {"reference_log_probs": scores + far, **options}
    found = []
    for dtype in (torch.float16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = linear_preference_loss(*leaves, target, **given, **how).loss
        found.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*found, strict=True):
        # An exponential of log-probabilities whose logits are float16 is less sure.
        assert (one - other).norm() <= (2e-2 if kind == "sppo_hard" else 0.1) * other.norm()


def test_vectorized(device):
    """Of several batches, each with its own targets."""
    batch = Batch(device)
    targets = torch.stack([batch.target, batch.target.flip(1)])
    hidden = torch.stack([batch.hidden, batch.hidden + 1])
    reference = torch.randn(2 * B, device=device, dtype=torch.float64)

    def loss(h, t):
        return linear_preference_loss(h, batch.weight, t, reference_log_probs=reference).loss

    found = torch.func.vmap(loss)(hidden, targets)
    wanted = torch.stack([loss(h, t) for h, t in zip(hidden, targets, strict=True)])
    assert_close(found, wanted, 1e-12)


@pytest.mark.usefixtures("_chunks_of_4")
def test_without_gradients_no_chunk_is_larger(chunks):
    batch = Batch("cpu")
    with torch.no_grad():
        ours(batch, *batch.leaves())
    assert max(chunks) <= 4


@pytest.mark.parametrize("pairs", [1, 2])
def test_options_as_long_as_there_are_pairs(device, pairs):
    """They are none of pairs: a number of items in a tensor, weights of losses."""
    batch = Batch(device)
    rows = [*range(pairs), *range(B, B + pairs)]
    call = functools.partial(
        linear_preference_loss, batch.hidden[rows], batch.weight, batch.target[rows],
        reference_log_probs=torch.zeros(2 * pairs, device=device),
    )  # fmt: skip
    assert_close(call(num_items=torch.tensor([4], device=device)).loss, call(num_items=4).loss, 0)
    kinds = ("sigmoid", "hinge")[:pairs]
    weights = torch.tensor([0.5, 2.0][:pairs])
    assert_close(
        call(kind=kinds, loss_weights=weights).loss,
        call(kind=kinds, loss_weights=weights.tolist()).loss, 0,
    )  # fmt: skip


def test_sequences_of_no_token(device):
    hidden = torch.zeros(2 * B, 0, D, device=device, requires_grad=True)
    target = torch.zeros(2 * B, 0, dtype=torch.long, device=device)
    weight = torch.zeros(V, D, device=device, requires_grad=True)
    for reference in (torch.zeros(2 * B, 0), torch.zeros(2 * B)):
        found = linear_preference_loss(
            hidden, weight, target, reference_log_probs=reference.to(device)
        )
        assert found.loss.item() == pytest.approx(math.log(2))
        found.loss.backward()


def test_a_sum_stays_finite(device):
    """Each of several parts is the largest number."""
    batch = Batch(device, torch.float32)
    reference = torch.tensor([0.0] * B + [-1000.0] * B, device=device)
    for how in ({}, {"chunk_tokens": 13}, {"chunk_tokens": 5}):
        loss = linear_preference_loss(
            *batch.leaves()[:2], batch.target, reference_log_probs=reference, kind="hinge",
            beta=1e38, num_items=1, **how,
        ).loss  # fmt: skip
        assert loss == torch.finfo(torch.float32).max


@pytest.mark.parametrize("chunk", [None, 13])
def test_the_weight_is_not_spoilt_by_a_pair_without_a_gradient(device, chunk):
    batch = Batch(device)
    batch.hidden[0, 0] = torch.nan
    leaves = batch.leaves()
    weight = torch.tensor([0.0, 1.0, 1.0], device=device, dtype=torch.float64)
    found = ours(batch, *leaves, pair_weight=weight, kind="apo_zero", chunk_tokens=chunk)
    _, of_weight, _ = torch.autograd.grad(found.loss, leaves)
    assert not of_weight.isnan().any()


def test_bad_input(device):
    batch = Batch(device)
    where = (batch.hidden, batch.weight, batch.target)
    for options, message in (
        ({"loss": "kto"}, "loss must be one of"),
        ({}, "needs a reference"),
        ({"loss": "simpo", **batch.theirs}, "has no reference"),
        ({"loss": "simpo", "ld_alpha": 0.5}, "belong to loss"),
        ({"reference_input": batch.hidden}, "a reference is"),
        ({"reference_bias": batch.bias}, "need reference_input"),
        ({"reference_log_probs": torch.zeros(B)}, "reference_log_probs must have"),
        ({"nll_items": 3, **batch.theirs}, "nll_items belongs"),
        ({"mask": batch.valid[:1], **batch.theirs}, "mask must have"),
        ({"beta": -1.0, **batch.theirs}, "beta"),
        ({"chosen_lengths": torch.ones(B), "kind": "ipo", **batch.theirs}, "chosen_lengths comes"),
        (
            {"pair_weight": torch.ones(B), "use_weighting": True, **batch.theirs},
            "pair_weight comes",
        ),
        ({"pair_weight": torch.ones(2), **batch.theirs}, r"pairs \(3,\), pair_weight \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_preference_loss(*where, **options)
    with pytest.raises(ValueError, match="chosen sequences before the rejected"):
        linear_preference_loss(batch.hidden[:3], batch.weight, batch.target[:3], **batch.theirs)
    with pytest.raises(TypeError, match="nothing"):
        linear_preference_loss(*where, nothing=1, **batch.theirs)
    text = inspect.getdoc(linear_preference_loss)
    names = inspect.signature(linear_preference_loss).parameters
    assert all(f"{name}: " in text for name in names)
