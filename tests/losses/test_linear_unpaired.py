"""KTO and BCO from hidden states, against whole logits in float64 written out."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import linear_log_probs, losses
from llmloss_ext.linear import projection
from llmloss_ext.losses import linear_unpaired_loss

B, S, C, T, D, E, V = 5, 7, 4, 6, 8, 10, 29
BETA = 0.3


class Batch:
    def __init__(self, device, dtype=torch.float64):
        torch.manual_seed(7)

        def normal(*shape):
            return torch.randn(*shape, device=device).to(dtype)

        self.hidden, self.weight, self.bias = normal(B, S, D), normal(V, D), normal(V)
        self.reference, self.its_weight, self.its_bias = normal(B, S, E), normal(V, E), normal(V)
        self.others, self.their_reference = normal(C, T, D), normal(C, T, E)
        self.target = torch.randint(0, V, (B, S), device=device)
        self.other_target = torch.randint(0, V, (C, T), device=device)
        lengths = torch.tensor([5, 7, 2, 4, 6], device=device)
        self.valid = torch.arange(S, device=device) < lengths[:, None]
        self.other_valid = torch.arange(T, device=device) < lengths[:C, None] - 1
        self.target[~self.valid] = -100
        self.other_target[~self.other_valid] = -100
        self.good = torch.tensor([1, 0, 0, 1, 1], device=device)

    def leaves(self):
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    @property
    def theirs(self):
        return {
            "reference_input": self.reference, "reference_weight": self.its_weight,
            "reference_bias": self.its_bias,
        }  # fmt: skip

    @property
    def mismatched(self):
        return {
            "kl_input": self.others, "kl_target": self.other_target,
            "kl_reference_input": self.their_reference,
        }  # fmt: skip

    def ours(self, h, w, b, loss="kto", **options):
        given = {**self.theirs, "beta": BETA, **options}
        if loss == "kto" and options.get("kind") != "apo_zero_unpaired" and "kl" not in options:
            given = {**self.mismatched, **given}
        return linear_unpaired_loss(
            h, w, self.target, desirable=self.good, loss=loss, linear_bias=b, **given
        )


def scores(h, w, b, target):
    """Sums of log p over the tokens, from whole logits."""
    log_p = F.linear(h, w, b).double().log_softmax(-1)
    chosen = log_p.gather(-1, target.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(target == -100, 0, chosen).sum(-1)


def definition(batch, h, w, b, kind="kto", shift=0.1, weights=(1.0, 1.0)):
    """The mean over sequences, one at a time."""
    policy = scores(h, w, b, batch.target)
    with torch.no_grad():
        reference = scores(batch.reference, batch.its_weight, batch.its_bias, batch.target)
        mine = scores(batch.others, w, b, batch.other_target)
        theirs = scores(batch.their_reference, batch.its_weight, batch.its_bias, batch.other_target)
        kl = max(float((mine - theirs).mean()), 0.0)
    total = 0.0
    for d, good in zip(policy - reference, batch.good.tolist(), strict=True):
        sign = 1 if good else -1
        if kind == "bco":
            total = total - torch.log(torch.sigmoid(sign * (BETA * d - shift)))
        else:
            z = kl if kind == "kto" else 0.0
            total = total + weights[1 - good] * (1 - torch.sigmoid(sign * BETA * (d - z)))
    return total / B


CASES = {
    "kto": ({}, {}),
    "weights": (
        {"desirable_weight": 1.3, "undesirable_weight": 0.6}, {"weights": (1.3, 0.6)}
    ),
    "apo_zero_unpaired": ({"kind": "apo_zero_unpaired"}, {"kind": "apo"}),
    "bco": ({"loss": "bco", "reward_shift": 0.1}, {"kind": "bco"}),
}  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [None, 2 * S, S, 5])
def test_against_the_definition(device, case, chunk, sign):
    """Of a KL that counts, and of one below 0."""
    batch = Batch(device)
    # The reference's logits of the mismatched completions decide the KL's sign.
    batch.their_reference = batch.their_reference * (3 if sign == 1 else 0)
    options, wanted = CASES[case]
    one, other = batch.leaves(), batch.leaves()
    found = batch.ours(*one, chunk_tokens=chunk, **options)
    exact = definition(batch, *other, **wanted)
    assert_close(found.loss, exact, 1e-11)
    if case == "kto":
        assert (float(found.shift) > 0) == (sign == 1)
    for mine, theirs in zip(
        torch.autograd.grad(found.loss, one), torch.autograd.grad(exact, other), strict=True
    ):
        assert_close(mine, theirs, 1e-10)
        assert theirs.any()


@pytest.mark.parametrize("case", CASES)
def test_as_composed_of_public_functions(device, case):
    batch, (options, _) = Batch(device), CASES[case]
    leaves = batch.leaves()
    found = batch.ours(*leaves, **options)
    how = dict(options)
    loss, shift = how.pop("loss", "kto"), how.pop("reward_shift", None)

    def summed(h, w, b, target):
        return losses.sequence_log_probs(linear_log_probs(h, w, target, linear_bias=b))

    policy = summed(*leaves, batch.target)
    reference = summed(batch.reference, batch.its_weight, batch.its_bias, batch.target)
    if loss == "bco":
        wanted = losses.bco_loss(policy, reference, batch.good, shift=shift, beta=BETA)
    else:
        if "kind" not in how:
            how["kl"] = losses.kl_estimate(
                summed(batch.others, *leaves[1:], batch.other_target),
                summed(batch.their_reference, batch.its_weight, batch.its_bias, batch.other_target),
            )
        wanted = losses.kto_loss(policy, reference, batch.good, beta=BETA, **how)
    for name in found._fields:
        assert_close(getattr(found, name).detach(), getattr(wanted, name).detach(), 1e-12)
        assert name == "loss" or not getattr(found, name).requires_grad


@pytest.mark.parametrize("drop", [True, False])
def test_masked_tokens_may_hold_anything(device, drop):
    """Also those of the mismatched completions; a mask is as good as a target."""
    batch = Batch(device)
    plain = batch.leaves()
    wanted = batch.ours(*plain)
    grads = torch.autograd.grad(wanted.loss, plain)
    batch.hidden[~batch.valid], batch.reference[~batch.valid] = math.nan, math.inf
    batch.others[~batch.other_valid], batch.their_reference[~batch.other_valid] = math.inf, math.nan
    batch.target[~batch.valid], batch.other_target[~batch.other_valid] = 3, 4
    leaves = batch.leaves()
    found = batch.ours(*leaves, mask=batch.valid, kl_mask=batch.other_valid, drop_ignored=drop)
    assert_close(found.loss, wanted.loss, 1e-12)
    for one, other in zip(torch.autograd.grad(found.loss, leaves), grads, strict=True):
        assert_close(one, other, 1e-11)


@pytest.mark.parametrize("case", ["kto", "bco"])
def test_neither_padding_nor_order_matters(device, case):
    batch, (options, _) = Batch(device), CASES[case]
    plain = batch.leaves()
    wanted = batch.ours(*plain, **options)
    grads = torch.autograd.grad(wanted.loss, plain)
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    other = Batch(device)
    padding = (0, 0, 2, 1)  # tokens before and behind
    for name in ("hidden", "reference"):
        setattr(other, name, F.pad(getattr(batch, name)[order], padding, value=9.0))
    other.target = F.pad(batch.target[order], padding[2:], value=-100)
    other.good = batch.good[order]
    other.others = F.pad(batch.others.flip(0), padding)
    other.their_reference = F.pad(batch.their_reference.flip(0), padding)
    other.other_target = F.pad(batch.other_target.flip(0), padding[2:], value=-100)
    leaves = other.leaves()
    found = other.ours(*leaves, **options)
    assert_close(found.loss, wanted.loss, 1e-12)
    assert_close(found.rewards, wanted.rewards[order], 1e-12)
    of_hidden, *of_weights = torch.autograd.grad(found.loss, leaves)
    assert_close(of_hidden[:, 2:-1], grads[0][order], 1e-11)
    assert (of_hidden[:, :2] == 0).all()
    for one, other_grad in zip(of_weights, grads[1:], strict=True):
        assert_close(one, other_grad, 1e-11)


def test_a_stored_reference_and_a_given_kl(device):
    batch = Batch(device)
    leaves = batch.leaves()
    wanted = batch.ours(*leaves).loss

    def tokens(h, target):
        return linear_log_probs(h, batch.its_weight, target, linear_bias=batch.its_bias)

    own = tokens(batch.reference, batch.target)
    of_others = tokens(batch.their_reference, batch.other_target)
    kl = losses.kl_estimate(
        scores(batch.others, batch.weight, batch.bias, batch.other_target), of_others.sum(-1)
    )
    mismatched = {"kl_input": batch.others, "kl_target": batch.other_target}
    for reference, more in (
        (own, {**mismatched, "kl_reference_log_probs": of_others}),
        (own.sum(-1), {**mismatched, "kl_reference_log_probs": of_others.sum(-1)}),
        (own, {"kl": kl}),
    ):
        found = linear_unpaired_loss(
            leaves[0], leaves[1], batch.target, linear_bias=leaves[2], desirable=batch.good,
            reference_log_probs=reference, beta=BETA, **more,
        )  # fmt: skip
        assert_close(found.loss, wanted, 1e-12)


def test_micro_batches_add_up(device):
    batch = Batch(device)
    whole = batch.leaves()
    kl = torch.tensor(0.2, dtype=torch.float64, device=device)
    batch.ours(*whole, kl=kl).loss.backward()
    parts = batch.leaves()
    for rows in (slice(0, 2), slice(2, B)):
        one = Batch(device)
        one.target, one.reference, one.good = (
            x[rows] for x in (batch.target, batch.reference, batch.good)
        )
        one.ours(parts[0][rows], parts[1], parts[2], kl=kl, num_items=B).loss.backward()
    for mine, theirs in zip(parts, whole, strict=True):
        assert_close(mine.grad, theirs.grad, 1e-11)


def test_a_shift_of_the_labels(device):
    batch = Batch(device)
    plain = batch.ours(*batch.leaves()).loss
    ahead = {}
    for name in ("target", "other_target"):
        ahead[name] = F.pad(getattr(batch, name), (1, 0), value=-100)[..., :-1]
    # Position i predicts label i + 1: what stood at the last position is lost on both ways.
    lost = Batch(device)
    lost.target[:, -1] = lost.other_target[:, -1] = -100
    wanted = lost.ours(*lost.leaves()).loss
    batch.target, batch.other_target = ahead["target"], ahead["other_target"]
    found = batch.ours(*batch.leaves(), shift=1).loss
    assert_close(found, wanted, 1e-12)
    assert not torch.equal(found, plain)


def test_walks(monkeypatch):
    """One after the other: the KL's two, the reference, the policy."""
    batch, seen = Batch("cpu"), []
    project = projection.Projection.project

    def counted(self, hidden, out):
        seen.append((len(hidden), torch.is_grad_enabled()))
        return project(self, hidden, out)

    monkeypatch.setattr(projection.Projection, "project", counted)
    leaves = batch.leaves()
    batch.others.requires_grad_()
    batch.reference.requires_grad_()
    batch.ours(*leaves).loss.backward()
    own, others = int(batch.valid.sum()), int(batch.other_valid.sum())
    assert [tokens for tokens, _ in seen] == [others, others, own, own]
    assert batch.others.grad is None
    assert batch.reference.grad is None
    seen.clear()
    lengths = batch.valid.sum(-1).tolist()
    batch.ours(*batch.leaves(), loss="bco", reward_shift=0.0, chunk_tokens=S).loss.backward()
    assert lengths == [5, 7, 2, 4, 6]
    assert [tokens for tokens, _ in seen][-4:] == [5, 7, 6, 6]
    # The policy again in backward: of a sequence that is cut, and of a mean that sees all first.
    for options, shift in (({"max_chunk_bytes": 6 * 32 * 8}, 0.0), ({}, losses.RunningMean())):
        seen.clear()
        batch.ours(*batch.leaves(), loss="bco", reward_shift=shift, **options).loss.backward()
        assert sum(tokens for tokens, _ in seen) == 3 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(device, dtype):
    batch = Batch(device, dtype)
    wide = {} if dtype == torch.float32 else {"logits_dtype": torch.float32}
    leaves = batch.leaves()
    found = batch.ours(*leaves, **wide)
    assert found.loss.dtype == torch.float32
    grads = torch.autograd.grad(found.loss, leaves)
    exact = Batch(device)
    for name, x in vars(batch).items():
        setattr(exact, name, x.double() if x.is_floating_point() else x)
    doubles = exact.leaves()
    wanted = definition(exact, *doubles)
    assert_close(found.loss.double(), wanted, 1e-4)
    for one, true in zip(grads, torch.autograd.grad(wanted, doubles), strict=True):
        assert one.dtype == dtype
        assert (one.double() - true).norm() <= 2e-2 * true.norm()


@pytest.mark.slow
def test_compiled(device):
    batch = Batch(device)
    leaves = batch.leaves()
    plain = batch.ours(*leaves).loss
    compiled = torch.compile(lambda *x: batch.ours(*x).loss, fullgraph=True)(*leaves)
    assert_close(compiled.detach(), plain.detach(), 1e-12)
    for one, other in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        assert_close(one, other, 1e-11)


def test_bad_input(device):
    batch = Batch(device)
    kl = torch.zeros((), device=device)
    without = {"reference_input": None, "reference_weight": None, "reference_bias": None}
    for options, message in (
        ({"loss": "dpo"}, "loss must be one of kto, bco"),
        ({"loss": "bco"}, "needs a reward_shift"),
        ({"loss": "bco", "reward_shift": 0.1, "kl": kl}, "kl belongs to"),
        ({"loss": "bco", "reward_shift": 0.1, **batch.mismatched}, "kl_input belongs to"),
        ({"kl": kl, "reward_shift": 0.1}, "reward_shift belongs to"),
        ({"kl": kl, **batch.mismatched}, "kl is given already"),
        ({"kl": kl, "kind": "apo_zero_unpaired"}, "kl belongs to"),
        ({"kind": "apo_zero_unpaired", **batch.mismatched}, "kl_input belongs to kind"),
        ({"kl_target": None}, "needs kl_input and kl_target"),
        ({"kl_reference_input": None}, "a reference is needed"),
        ({"kl": kl, **without}, "a reference is needed"),
        ({"kl": kl, "reference_bias": None, "reference_input": None}, "need reference_input"),
        ({"kl": kl, "mask": batch.valid[:1]}, "mask must have"),
        ({"kl": kl, "beta": -1.0}, "beta"),
        ({"kl": kl, **without, "reference_log_probs": kl.expand(3)}, "reference_log_probs must"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.ours(*batch.leaves(), **options)
    with pytest.raises(ValueError, match=r"hidden states \(B, S, D\)"):
        linear_unpaired_loss(
            batch.hidden[0], batch.weight, batch.target[0], desirable=batch.good, kl=kl,
            reference_log_probs=torch.zeros(S, device=device),
        )  # fmt: skip
    with pytest.raises(TypeError, match="nothing"):
        batch.ours(*batch.leaves(), nothing=1)
    text = inspect.getdoc(linear_unpaired_loss)
    assert all(f"{name}: " in text for name in inspect.signature(linear_unpaired_loss).parameters)
