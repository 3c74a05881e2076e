"""Policy losses from hidden states are those of the tokens' log-probabilities."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import assert_close

from llmloss_ext import linear_token_stats
from llmloss_ext.linear import projection
from llmloss_ext.losses import grpo_loss, linear_policy_loss
from llmloss_ext.losses.policy_options import POLICY_OPTIONS

B, S, D, V = 4, 9, 8, 31

LOSSES = {
    "dapo": {},
    "grpo with a reference": {"loss_type": "grpo", "beta": 0.1},
    "ppo with entropy": {"entropy_coef": 0.1, "epsilon_high": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 16, "delta": 1.5},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "an off-policy mask": {"off_policy_mask_threshold": 0.3},
}
BY_SEQUENCES = ("gspo", "vespo", "an off-policy mask")


class Batch:
    def __init__(self, device, dtype=torch.float64):
        torch.manual_seed(3)
        self.hidden = torch.randn(B, S, D, device=device).to(dtype)
        self.weight = torch.randn(V, D, device=device).to(dtype)
        self.bias = torch.randn(V, device=device).to(dtype)
        self.reference = (self.hidden + 0.1).detach()
        self.target = torch.randint(0, V, (B, S), device=device)
        self.mask = torch.rand(B, S, device=device) < 0.7
        self.mask[0] = False
        real = torch.float64 if dtype == torch.float64 else torch.float32
        self.old = self.stats(self.hidden, self.weight, self.bias).log_prob.to(real)
        self.old = (self.old + 0.3 * torch.randn_like(self.old)).detach()
        self.advantages = torch.randn(B, device=device, dtype=real)

    def leaves(self):
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def stats(self, hidden, weight, bias):
        return linear_token_stats(hidden, weight, self.target, linear_bias=bias)

    def composed(self, h, w, b, mask=None, **options):
        stats, reference = self.stats(h, w, b), None
        if options.get("beta"):
            reference = self.stats(self.reference, self.weight, self.bias).log_prob
        return grpo_loss(
            stats.log_prob, self.old, self.advantages, self.mask if mask is None else mask,
            reference_log_probs=reference, entropy=stats.entropy, **options,
        )  # fmt: skip

    def linear(self, h, w, b, mask=None, **options):
        if options.get("beta"):
            options |= {
                "reference_input": self.reference, "reference_weight": self.weight,
                "reference_bias": self.bias,
            }  # fmt: skip
        return linear_policy_loss(
            h, w, self.target, linear_bias=b, old_log_probs=self.old, advantages=self.advantages,
            mask=self.mask if mask is None else mask, with_entropy=True, **options,
        )  # fmt: skip


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sums_over_long_sequences_in_float16(device, level):
    """luspo's gradients are about 1 over the sequences, not over the tokens: float16 holds them."""
    torch.manual_seed(1)
    length = 1024
    hidden = torch.randn(2, length, 16, device=device).half()
    weight = (torch.randn(64, 16, device=device) / 4).half()
    target = torch.randint(0, 64, (2, length), device=device)
    found = []
    for dtype in (torch.float16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = linear_policy_loss(
            *leaves, target, advantages=torch.tensor([90.0, -80.0], device=device),
            loss_type="luspo", importance_sampling_level=level,
        ).loss  # fmt: skip
        found.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


CHUNKS = {
    "all in one": {},
    "a sequence": {"chunk_tokens": S},
    "two sequences": {"chunk_tokens": 2 * S, "drop_ignored": False},
    "less than a sequence": {"chunk_tokens": 5},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_as_composed(device, name, chunk):
    batch, options = Batch(device), LOSSES[name]
    results = []
    for function, how in ((batch.linear, CHUNKS[chunk]), (batch.composed, {})):
        leaves = batch.leaves()
        found = function(*leaves, **options, **how)
        results.append((found, torch.autograd.grad(2 * found.loss, leaves)))
    (ours, gradients), (theirs, wanted) = results
    assert_close(ours.loss.detach(), theirs.loss.detach(), 1e-12)
    for one, other in zip(gradients, wanted, strict=True):
        assert_close(one, other, 1e-9)
    assert any(x.any() for x in wanted)
    for field in ours.metrics._fields:
        one, other = getattr(ours.metrics, field), getattr(theirs.metrics, field)
        assert (one is None) == (other is None), field
        if one is not None:
            assert not one.requires_grad
            assert_close(one, other, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(device, dtype):
    batch = Batch(device, dtype)
    leaves = batch.leaves()
    ours = torch.autograd.grad(batch.linear(*leaves, chunk_tokens=5).loss, leaves)
    theirs = torch.autograd.grad(batch.composed(*leaves).loss, leaves)
    exact = Batch(device)
    exact.__dict__ |= {n: getattr(batch, n).double() for n in ("hidden", "weight", "bias", "old")}
    exact.advantages = batch.advantages.double()
    leaves = exact.leaves()
    right = torch.autograd.grad(exact.composed(*leaves).loss, leaves)
    for one, other, true in zip(ours, theirs, right, strict=True):
        assert one.dtype == dtype
        norm = true.norm()
        assert (one - true).norm() / norm <= 1.1 * (other - true).norm() / norm + 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, S, 3])
def test_products(name, chunk):
    """One walk, with its three products; two where a token needs those of another chunk."""
    batch = Batch("cpu")
    products, project = [], projection.Projection.project

    def counted(self, hidden, out):
        products.append(len(hidden))
        return project(self, hidden, out)

    options = LOSSES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection.Projection, "project", counted)
        batch.linear(*batch.leaves(), **options, chunk_tokens=chunk).loss.backward()
    walks = (2 if name in BY_SEQUENCES and chunk == 3 else 1) + bool(options.get("beta"))
    if walks == 1 or name != "an off-policy mask":  # which leaves out sequences in backward
        assert sum(products) == walks * batch.mask.sum()
    assert (chunk is None) == (len(products) == walks)
    if chunk == S and name in BY_SEQUENCES:
        assert products == [8, 7, 8]  # and a sequence without a token beside the first


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_may_hold_anything(device, name):
    batch = Batch(device)
    plain = batch.leaves()
    wanted = torch.autograd.grad(batch.linear(*plain, **LOSSES[name]).loss, plain)
    batch.hidden = torch.where(batch.mask[..., None], batch.hidden, torch.nan)
    batch.old = torch.where(batch.mask, batch.old, torch.nan)
    batch.reference = torch.where(batch.mask[..., None], batch.reference, torch.nan)
    for drop in (True, False):
        leaves = batch.leaves()
        found = batch.linear(*leaves, drop_ignored=drop, **LOSSES[name])
        for one, other in zip(torch.autograd.grad(found.loss, leaves), wanted, strict=True):
            assert_close(one, other, 1e-9)
        assert all(x is None or x.isfinite() for x in found.metrics)


def test_micro_batches_add_up(device):
    batch = Batch(device)
    whole = batch.leaves()
    batch.linear(*whole, num_items=int(batch.mask.sum())).loss.backward()
    parts = batch.leaves()
    for row in range(B):
        linear_policy_loss(
            parts[0][row], parts[1], batch.target[row], linear_bias=parts[2],
            old_log_probs=batch.old[row], advantages=batch.advantages[row], mask=batch.mask[row],
            num_items=int(batch.mask.sum()),
        ).loss.backward()  # fmt: skip
    for one, other in zip(parts, whole, strict=True):
        assert_close(one.grad, other.grad, 1e-9)
    nothing = batch.leaves()
    loss = batch.linear(*nothing, mask=torch.zeros_like(batch.mask)).loss
    loss.backward()
    assert loss == 0
    assert not any(x.grad.any() for x in nothing)


def test_the_shift_is_that_of_log_probs(device):
    batch = Batch(device)
    h, w, b = batch.leaves()
    one = linear_policy_loss(
        h, w, batch.target, linear_bias=b, shift=1, advantages=batch.advantages, mask=batch.mask
    ).loss
    other = linear_policy_loss(
        h[:, :-1], w, batch.target[:, 1:], linear_bias=b, advantages=batch.advantages,
        mask=batch.mask[:, :-1],
    ).loss  # fmt: skip
    assert_close(one, other, 1e-12)
    assert_close(*(torch.autograd.grad(x, h)[0] for x in (one, other)), 1e-12)


@pytest.mark.slow
def test_compiled_and_of_second_order(device):
    batch = Batch(device)
    leaves = batch.leaves()
    plain = batch.linear(*leaves, beta=0.1)
    compiled = torch.compile(lambda *x: batch.linear(*x, beta=0.1), fullgraph=True)(*leaves)
    assert_close(compiled.loss.detach(), plain.loss.detach(), 1e-12)
    for one, other in zip(
        torch.autograd.grad(compiled.loss, leaves), torch.autograd.grad(plain.loss, leaves),
        strict=True,
    ):  # fmt: skip
        assert_close(one, other, 1e-9)
    second = []
    for loss in (batch.linear(*leaves).loss, batch.composed(*leaves).loss):
        (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), leaves[1])[0])
    assert_close(*second, 1e-9)


def test_options(device):
    batch = Batch(device)
    parameters = inspect.signature(linear_policy_loss).parameters
    assert set(POLICY_OPTIONS) <= set(parameters)
    assert {p.name for p in inspect.signature(grpo_loss).parameters.values()} - set(parameters) == {
        "log_probs", "entropy", "reduction",
    }  # fmt: skip
    text = inspect.getdoc(linear_policy_loss)
    assert all(f"    {name}: " in text for name in parameters), text
    for options, message in (
        ({"epsilon": -1.0}, "epsilon"),
        ({"reference_weight": batch.weight}, "need reference_input"),
        ({"reference_input": batch.hidden}, "a reference is"),
        ({"mask": batch.mask[:, 1:]}, "mask must have the shape"),
        ({"sampling_log_probs": batch.old}, "belongs to off_policy"),
        ({"beta": 0.1}, "beta needs"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(
                batch.hidden, batch.weight, batch.target, advantages=batch.advantages, **options
            )
    with pytest.raises(TypeError, match="no option"):
        linear_policy_loss(
            batch.hidden, batch.weight, batch.target, advantages=batch.advantages, nothing=1
        )
