"""What takes no part cannot spoil what does: nan, inf and impossible ids, against zeros, by bits.

A token takes no part if it is ignored, has weight 0, is masked by what follows, or belongs to a
step of 0 items; a class, if it is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from properties import SETTINGS, hypothesis, st

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    losses,
    token_stats,
)

B, S, D, V, USED = 2, 6, 8, 23, 19
GARBAGE = [float("nan"), float("inf"), float("-inf")]
OUT = 10**9  # no class
Results = list[torch.Tensor]
Loss = Callable[..., torch.Tensor]


def results(loss: Loss, *leaves: torch.Tensor, second: bool = False) -> Results:
    """The loss, its gradients, and with ``second`` the gradients of a function of these.

    In one thread, as on a CPU. Of nodes that wait, autograd runs the youngest of their thread: in a
    graph that the device's thread has made a part of, the order of a sum, and with it a last bit,
    would depend on how many nodes each of the two threads has ever made.
    """
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves)
    with torch.autograd.set_multithreading_enabled(False):
        grads = torch.autograd.grad(value, leaves, create_graph=second)
        found = [value, *grads]
        if second:
            size = sum((g * g).sum() + g.sum() for g in grads)
            found += torch.autograd.grad(size, leaves)
    return [t.detach() for t in found]


def check(clean: Results, dirty: Results, absent: torch.Tensor, per_token: list[int]) -> None:
    """The same bits; exactly 0 at ``absent`` tokens of the results ``per_token``."""
    for one, other in zip(clean, dirty, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    for place in per_token:
        assert (dirty[place][absent] == 0).all()


def spoilt(tensor: torch.Tensor, rows: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[rows] = value
    return tensor


class Batch:
    """Logits, hidden states and a head with padded classes; tokens ``absent`` take no part."""

    def __init__(self, seed: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.absent = torch.rand(B, S, device=device) < 0.4
        self.absent[0, 0], self.absent[0, 1] = True, False
        self.target = torch.randint(0, USED, (B, S), device=device)
        self.ignored = torch.where(self.absent, -100, self.target)
        self.token_weight = torch.where(self.absent, 0.0, torch.rand(B, S, device=device) + 0.5)
        self.impossible = torch.where(self.absent, OUT, self.target)
        self.logits = torch.randn(B, S, V, device=device).to(dtype)
        self.hidden = torch.randn(B, S, D, device=device).to(dtype)
        self.weight = (torch.randn(V, D, device=device) / 2).to(dtype)
        self.bias = torch.randn(V, device=device).to(dtype)

    def with_garbage(self, value: float) -> Batch:
        """The same, with ``value`` at the absent tokens and the padded classes."""
        other = Batch.__new__(Batch)
        vars(other).update(vars(self))
        other.logits = spoilt(self.logits, self.absent, value)
        other.logits[..., USED:] = value
        other.hidden = spoilt(self.hidden, self.absent, value)
        padding = torch.arange(V, device=self.weight.device) >= USED
        other.weight = spoilt(self.weight, padding, value)
        other.bias = spoilt(self.bias, padding, value)
        return other


WAYS: dict[str, Callable[[Batch], dict[str, Any]]] = {
    "ignored": lambda b: {"target": b.ignored},
    "weight 0": lambda b: {"target": b.impossible, "token_weight": b.token_weight},
    "both": lambda b: {"target": b.ignored, "token_weight": b.token_weight},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "focal and softcap": {"focal_gamma": 1.5, "softcap": 4.0},
    "class weights": {"weight": True, "z_loss": 1e-2, "label_smoothing": 0.1},
    "scale": {"logit_scale": torch.tensor(0.7)},
    "items": {"num_items": 5},
}


def options_of(name: str, device: Any) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if options.pop("weight", False):
        options["weight"] = torch.linspace(0.5, 2, V, device=device)
        options["weight"][USED:] = float("nan")
    if isinstance(options.get("logit_scale"), torch.Tensor):
        options["logit_scale"] = options["logit_scale"].to(device)
    return options


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_from_logits(device, way, option, reduction):
    batch = Batch(0, device)
    options = options_of(option, device) | WAYS[way](batch)
    if reduction != "mean":
        options.pop("num_items", None)
    target = options.pop("target")

    def loss(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        x = x * 1 if inplace else x
        value = cross_entropy(
            x,
            target,
            vocab_size=USED,
            class_dim=-1,
            reduction=reduction,
            inplace=inplace,
            **options,
        )
        return value.sum()

    for second in (False, True):
        clean = results(loss, batch.logits, second=second)
        for value in GARBAGE:
            dirty = results(loss, batch.with_garbage(value).logits, second=second)
            check(clean, dirty, batch.absent, [*range(1, len(dirty))])
            assert (dirty[1][..., USED:] == 0).all()
    clean = results(lambda x: loss(x, inplace=True), batch.logits)
    for value in GARBAGE:
        # The product with 1 that makes room for the gradient has garbage and a gradient of 0.
        dirty = results(lambda x: loss(x, inplace=True), batch.with_garbage(value).logits)
        check(clean, dirty, batch.absent, [1])


WALKS: dict[str, dict[str, Any]] = {
    "one chunk": {},
    "many chunks": {"chunk_tokens": 3},
    "not dropped": {"drop_ignored": False},
    "many chunks, not dropped": {"chunk_tokens": 3, "drop_ignored": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_from_hidden_states(device, way, walk, reduction):
    batch = Batch(1, device)
    for option in OPTIONS:
        options = options_of(option, device) | WAYS[way](batch) | WALKS[walk]
        if reduction != "mean":
            options.pop("num_items", None)
        target = options.pop("target")

        def loss(h, w, b, target=target, options=options):
            return linear_cross_entropy(
                h, w, target, linear_bias=b, vocab_size=USED, reduction=reduction, **options
            ).sum()

        for second in (False, True):
            leaves = (batch.hidden, batch.weight, batch.bias)
            clean = results(loss, *leaves, second=second)
            for value in GARBAGE:
                other = batch.with_garbage(value)
                dirty = results(loss, other.hidden, other.weight, other.bias, second=second)
                check(clean, dirty, batch.absent, [1])
                assert (dirty[2][USED:] == 0).all()
                assert (dirty[3][USED:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(device, dtype):
    batch = Batch(2, device, dtype)
    for way in WAYS:
        options = WAYS[way](batch)
        target = options.pop("target")

        def dense(x, target=target, options=options):
            return cross_entropy(x, target, vocab_size=USED, class_dim=-1, **options)

        def linear(h, w, target=target, options=options):
            return linear_cross_entropy(
                h, w, target, vocab_size=USED, chunk_tokens=5, drop_ignored=False, **options
            )

        other = batch.with_garbage(float("nan"))
        check(results(dense, batch.logits), results(dense, other.logits), batch.absent, [1])
        clean = results(linear, batch.hidden, batch.weight)
        check(clean, results(linear, other.hidden, other.weight), batch.absent, [1])


def test_an_accumulator_and_a_learned_weight(device):
    batch = Batch(3, device)
    other = batch.with_garbage(float("nan"))
    sums = []
    for one in (batch, other):
        main = torch.zeros(V, D, device=device)
        hidden = one.hidden.clone().requires_grad_()
        weight = one.weight.clone().requires_grad_()
        loss = linear_cross_entropy(
            hidden, weight, batch.ignored, vocab_size=USED, drop_ignored=False,
            weight_grad_accumulator=main,
        )  # fmt: skip
        loss.backward()
        sums.append([loss.detach(), hidden.grad, main])
    check(*sums, batch.absent, [1])
    for option, inplace in itertools.product(OPTIONS, (False, True)):
        options = options_of(option, device)
        if inplace and "weight" in options:
            continue  # refused

        def dense(x, w, options=options, inplace=inplace):
            return cross_entropy(
                x * 1, batch.target, token_weight=w, vocab_size=USED, class_dim=-1,
                inplace=inplace, **options,
            )  # fmt: skip

        def linear(h, w, options=options):
            return linear_cross_entropy(
                h, batch.weight, batch.target, token_weight=w, vocab_size=USED, **options
            )

        for loss, clean, dirty in (
            (dense, batch.logits, spoilt(batch.logits, batch.absent, float("nan"))),
            (linear, batch.hidden, spoilt(batch.hidden, batch.absent, float("nan"))),
        ):
            ours = results(loss, clean, batch.token_weight)
            theirs = results(loss, dirty, batch.token_weight)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert theirs[2].isfinite().all()
            there = ~batch.absent
            assert torch.equal(ours[2][there], theirs[2][there])


@pytest.mark.parametrize("second", [False, True])
def test_probability_targets_of_weight_0(device, second):
    batch = Batch(4, device)
    target = batch.logits.softmax(-1)

    def dense(x, q):
        return cross_entropy(x, q, token_weight=batch.token_weight, class_dim=-1)

    def linear(h, w, drop):
        return linear_cross_entropy(
            h, w, target, token_weight=batch.token_weight, drop_ignored=drop, chunk_tokens=5
        )

    clean = results(dense, batch.logits, target, second=second)
    for value in GARBAGE:
        dirty = (spoilt(t, batch.absent, value) for t in (batch.logits, target))
        check(clean, results(dense, *dirty, second=second), batch.absent, [1, 2])
        for drop in (False, True):
            hidden = spoilt(batch.hidden, batch.absent, value)
            one, other = (
                results(lambda h, w, drop=drop: linear(h, w, drop), h, batch.weight, second=second)
                for h in (batch.hidden, hidden)
            )
            check(one, other, batch.absent, [1])


@pytest.mark.parametrize("second", [False, True])
def test_probability_targets_masked_by_what_follows(device, second):
    batch = Batch(4, device)

    def loss(x, q):
        rows = cross_entropy(x, q, reduction="none", class_dim=-1)
        return torch.where(batch.absent, 0.0, rows).square().sum()

    target = batch.logits.softmax(-1)
    clean = results(loss, batch.logits, target, second=second)
    for value in GARBAGE[:2]:
        dirty = (spoilt(t, batch.absent, value) for t in (batch.logits, target))
        check(clean, results(loss, *dirty, second=second), batch.absent, [1, 2])
        logits = (batch.logits, spoilt(target, batch.absent, value))
        check(clean, results(loss, *logits, second=second), batch.absent, [1, 2])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_times_0(device, compiled):
    """Of what the forward pass has made from nan, nothing is left."""
    batch = Batch(4, device)
    scale, bias = torch.tensor(2.0), torch.zeros(V)
    leaves = (spoilt(batch.hidden, batch.absent, float("nan")), batch.weight, bias, scale)
    leaves = tuple(x.detach().to(device).clone().requires_grad_() for x in leaves)

    def loss(h, w, b, s):
        return linear_cross_entropy(h, w, batch.target % V, linear_bias=b, logit_scale=s) * 0

    if compiled:
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert not any(g.any() for g in torch.autograd.grad(loss(*leaves), leaves))


STATISTICS = ("log_prob", "lse", "entropy", "mean_log_prob", "log_sum_sq_probs")


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("second", [False, True])
def test_tokens_masked_by_what_follows(device, name, second):
    """Of a statistic that nobody uses, the gradient is exactly 0, and no row is read for it."""
    batch = Batch(5, device)

    def masked(stats):
        return torch.where(batch.absent, 0.0, getattr(stats, name)).square().sum()

    def dense(x):
        extra = ("log_sum_sq_probs",)
        return masked(token_stats(x, batch.target, vocab_size=USED, extra=extra))

    def linear(h, w, drop):
        return masked(
            linear_token_stats(
                h, w, batch.target, vocab_size=USED, drop_ignored=drop, chunk_tokens=5,
                extra=("log_sum_sq_probs",),
            )
        )  # fmt: skip

    clean = results(dense, batch.logits, second=second)
    for value in GARBAGE[:2]:
        other = batch.with_garbage(value)
        check(clean, results(dense, other.logits, second=second), batch.absent, [1])
        for drop in (False, True):
            one, spoiled = (
                results(
                    lambda h, w, drop=drop: linear(h, w, drop), b.hidden, b.weight, second=second
                )
                for b in (batch, other)
            )
            check(one, spoiled, batch.absent, [1])


def test_losses_masked_by_what_follows(device):
    batch = Batch(6, device)

    def dense(x, inplace):
        rows = cross_entropy(
            x * 1, batch.target, reduction="none", class_dim=-1, vocab_size=USED, inplace=inplace
        )
        return torch.where(batch.absent, 0.0, rows).square().sum()

    def log_probs(h, w, drop):
        rows = linear_log_probs(h, w, batch.target, vocab_size=USED, drop_ignored=drop)
        return torch.where(batch.absent, 0.0, rows).square().sum()

    other = batch.with_garbage(float("nan"))
    for flag in (False, True):
        one, spoiled = (
            results(lambda x, flag=flag: dense(x, flag), b.logits) for b in (batch, other)
        )
        check(one, spoiled, batch.absent, [1])
        one, spoiled = (
            results(lambda h, w, flag=flag: log_probs(h, w, flag), b.hidden, b.weight)
            for b in (batch, other)
        )
        check(one, spoiled, batch.absent, [1])


def by_tokens(function: Loss, *others: torch.Tensor) -> Loss:
    """A policy loss of log-probabilities whose absent tokens the mask leaves out."""
    return lambda x, mask: function(x, *others, mask)


@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.sampled_from(GARBAGE))
def test_policy_and_preference_losses(seed, value):
    batch = Batch(seed)
    batch.absent[1] = True  # a sequence of nothing
    mask = ~batch.absent
    policy, old, reference = (torch.randn(3, B, S) * 0.3 - 2).unbind()
    entropy, advantages = torch.rand(B, S), torch.randn(B, S)
    by_sequence = advantages[:, 0].clone()

    def ppo(policy, old, reference, entropy, advantages):
        return losses.ppo_clip_loss(
            policy, old, advantages, mask, entropy=entropy, entropy_coef=0.1
        )

    def grpo(policy, old, reference, entropy, advantages):
        return losses.grpo_loss(
            policy, old, by_sequence, mask, reference_log_probs=reference, beta=0.1,
            loss_type="grpo", entropy=entropy, entropy_coef=0.1,
        ).loss  # fmt: skip

    def critic(policy, old, reference, entropy, advantages):
        return losses.value_loss(policy, old, losses.gae(old, reference, mask).returns, mask).loss

    def dpo(policy, old, reference, entropy, advantages):
        sums = [losses.sequence_log_probs(x, mask) for x in (policy, old, reference, entropy)]
        return losses.dpo_loss(*sums).loss

    def mean(policy, *others):
        return losses.sequence_log_probs(policy, mask, average=True)[0]

    def pairs(policy, old, reference, entropy, advantages):
        weights = losses.wpo_weights(policy, old, mask)
        of_policy = losses.length_desensitized_log_probs(policy, old, mask, mask, ld_alpha=0.5)
        of_reference = losses.length_desensitized_log_probs(
            reference, entropy, mask, mask, ld_alpha=0.5
        )
        how = {"kind": ("sigmoid", "hinge"), "pair_weight": weights}
        return losses.dpo_loss(*of_policy, *of_reference, **how).loss

    def without_reference(policy, old, reference, entropy, advantages):
        # Without the sequence of nothing, which has no mean.
        x, y = (losses.sequence_log_probs(t, mask, average=True)[::2] for t in (policy, old))
        both = losses.simpo_loss(x, y).loss, losses.orpo_loss(x, y, x.new_zeros(())).loss
        return sum(both)

    def unpaired(policy, old, reference, entropy, advantages):
        x, y, z = (losses.sequence_log_probs(t, mask) for t in (policy, old, reference))
        good = torch.arange(B) % 2
        kto = losses.kto_loss(x, y, good, kl=losses.kl_estimate(z, y)).loss
        return kto + losses.bco_loss(x, y, good, shift=losses.RunningMean()).loss

    given_clean = (policy, old, reference, entropy, advantages)
    given_dirty = tuple(spoilt(x, batch.absent, value) for x in given_clean)
    for function in (ppo, grpo, critic, dpo, mean, pairs, without_reference, unpaired):
        one, other = (
            results(lambda x, f=function, t=tensors: f(x, *t[1:]), tensors[0])
            for tensors in (given_clean, given_dirty)
        )
        check(one, other, batch.absent, [1])


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd", "tvd", "skew_reverse"])
@pytest.mark.parametrize("second", [False, True])
def test_distillation(device, direction, second):
    batch = Batch(7, device)
    teacher, teacher_hidden = torch.randn(B, S, V + 2), torch.randn(B, S, D + 1)
    head = torch.randn(V + 5, D + 1)
    teacher, teacher_hidden, head = (t.to(device) for t in (teacher, teacher_hidden, head))
    ids = torch.arange(3, device=device).expand(B, S, 3)
    log_p = torch.log_softmax(teacher[..., :USED], -1)[..., :3]
    how = {"direction": direction, "target": batch.ignored, "vocab_size": USED}

    def from_logits(x, teacher):
        return losses.distillation_loss(x, teacher, **how)

    def from_top_k(x, log_p):
        return losses.top_k_distillation_loss(x, ids, log_p, **how)

    for loss, given in ((from_logits, teacher), (from_top_k, log_p)):
        clean = results(
            lambda x, loss=loss, given=given: loss(x, given), batch.logits, second=second
        )
        for value in GARBAGE:
            other, theirs = batch.with_garbage(value), spoilt(given, batch.absent, value)
            dirty = results(
                lambda x, loss=loss, given=theirs: loss(x, given), other.logits, second=second
            )
            check(clean, dirty, batch.absent, [1])

    def masked(x):
        rows = losses.distillation_loss(x, teacher, direction=direction, reduction="none",
                                        vocab_size=USED)  # fmt: skip
        return torch.where(batch.absent, 0.0, rows).square().sum()

    clean = results(masked, batch.logits, second=second)
    dirty = results(masked, batch.with_garbage(float("nan")).logits, second=second)
    check(clean, dirty, batch.absent, [1])
    if second:
        return
    for drop, chunk in itertools.product((False, True), (None, 4)):
        found = []
        for b, t in ((batch, teacher_hidden), (other, spoilt(teacher_hidden, batch.absent, value))):
            padded = spoilt(head, torch.arange(V + 5, device=device) >= USED, value)
            found.append(
                results(
                    lambda h, w, t=t, p=padded, drop=drop, chunk=chunk: linear_kl_div(
                        h, w, t, p, drop_ignored=drop, chunk_tokens=chunk, **how
                    ),
                    b.hidden, b.weight,
                )
            )  # fmt: skip
        check(*found, batch.absent, [1])


MODULES: dict[str, Loss] = {
    "causal_lm_loss": lambda x, ids, mask: losses.causal_lm_loss(x, ids, attention_mask=mask),
    "language model": lambda x, ids, mask: losses.LanguageModelLoss(V)(x, ids, mask),
    "with statistics": lambda x, ids, mask: (
        losses.LanguageModelLoss(V).compute_loss_with_stats(x, ids, mask).loss
    ),
    "penalty": lambda x, ids, mask: losses.LanguageModelLoss(V, confidence_penalty=0.1)(
        x, ids, mask
    ),
    "mlm": lambda x, ids, mask: losses.mlm_loss(x, torch.where(mask, ids, -100)),
    "confidence": lambda x, ids, mask: losses.confidence_penalty_loss(
        x, torch.where(mask, ids, -100)
    ),
    "smoothing": lambda x, ids, mask: losses.LabelSmoothingCrossEntropy()(
        x, torch.where(mask, ids, -100)
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_language_models(device, name):
    batch = Batch(8, device)
    mask = ~batch.absent
    clean = results(lambda x: MODULES[name](x, batch.target, mask), batch.logits)
    for value in GARBAGE:
        logits = spoilt(batch.logits, batch.absent, value)
        dirty = results(lambda x: MODULES[name](x, batch.impossible, mask), logits)
        check(clean, dirty, batch.absent, [1])


ZERO_ITEMS: dict[str, Loss] = {
    "dense": lambda b, n: cross_entropy(b.logits, b.ignored, num_items=n, class_dim=-1),
    "in place": lambda b, n: cross_entropy(
        b.logits * 1, b.ignored, num_items=n, class_dim=-1, inplace=True
    ),
    "class weights": lambda b, n: cross_entropy(
        b.logits, b.ignored, num_items=n, class_dim=-1, z_loss=0.1,
        weight=torch.ones(V, device=b.logits.device),
    ),
    "linear": lambda b, n: linear_cross_entropy(b.hidden, b.weight, b.ignored, num_items=n),
    "not dropped": lambda b, n: linear_cross_entropy(
        b.hidden, b.weight, b.ignored, num_items=n, drop_ignored=False
    ),
    "learned weight": lambda b, n: linear_cross_entropy(
        b.hidden, b.weight, b.ignored, num_items=n, token_weight=b.token_weight.requires_grad_()
    ),
    "kl": lambda b, n: linear_kl_div(
        b.hidden, b.weight, b.hidden.detach(), b.weight.detach(), target=b.ignored, num_items=n
    ),
    "distillation": lambda b, n: losses.distillation_loss(
        b.logits, b.logits.detach(), target=b.ignored, num_items=n
    ),
    "hard and soft": lambda b, n: losses.hard_soft_distillation_loss(
        b.logits, b.logits.detach().flip(-1), b.ignored, num_items=n
    ).loss,
    "hard and soft in one walk": lambda b, n: linear_distillation_loss(
        b.hidden, b.weight, b.hidden.flip(-1), b.weight, b.ignored, num_items=n
    ).loss,
    "cosine": lambda b, n: losses.cosine_distillation_loss(
        b.hidden, b.hidden.flip(-1), target=b.ignored, num_items=n
    ),
    "on policy": lambda b, n: losses.sampled_reverse_kl(
        b.logits[..., 0], b.logits[..., 1], ~b.absent, num_items=n
    ).loss,
    "mlm": lambda b, n: losses.mlm_loss(b.logits, b.ignored, num_items=n),
    "confidence": lambda b, n: losses.confidence_penalty_loss(b.logits, b.ignored, num_items=n),
    "language model": lambda b, n: losses.LanguageModelLoss(V)(
        b.logits, b.target, ~b.absent, num_items=n
    ),
    "ppo": lambda b, n: losses.ppo_clip_loss(
        b.logits[..., 0], b.logits[..., 1].detach(), b.token_weight, ~b.absent, num_items=n
    ),
    "grpo": lambda b, n: losses.grpo_loss(
        b.logits[..., 0], b.logits[..., 1].detach(), b.token_weight[:, 0], ~b.absent, num_items=n
    ).loss,
    "value": lambda b, n: losses.value_loss(
        b.logits[..., 0], b.logits[..., 1].detach(), b.token_weight, ~b.absent, num_items=n
    ).loss,
    "discriminator": lambda b, n: losses.discriminator_loss(
        b.logits[..., 0], b.logits[..., 1], real_mask=~b.absent, fake_mask=~b.absent, num_items=n
    ).loss,
    "policy gradient": lambda b, n: losses.policy_gradient_loss(
        b.logits[..., 0], b.logits[:, 0, 1], ~b.absent, num_items=n
    ).loss,
    "unlikelihood": lambda b, n: losses.unlikelihood_loss(
        b.logits, b.target, labels=b.ignored, num_items=n
    ),
    "linear unlikelihood": lambda b, n: losses.unlikelihood_loss(
        b.hidden, b.target, b.weight, labels=b.ignored, num_items=n
    ),
    "several tokens": lambda b, n: losses.multi_token_prediction_loss(
        b.hidden, b.ignored, b.weight, offsets=2, num_items=n
    ).loss,
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO_ITEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_0_items(device, name, dtype):
    """A step whose tokens are all masked: loss and gradients are 0, with an int or a tensor."""
    for items in (0, 0.0, torch.tensor(0, device=device), torch.tensor([0.0], device=device)):
        for value in (0.5, float("nan")):
            batch = Batch(9, device, dtype)
            batch.absent[:] = True
            batch.ignored[:] = -100
            batch.token_weight[:] = 0
            if name not in ("ppo", "grpo", "value"):
                batch.hidden[:] = batch.logits[:] = value
            leaves = [batch.logits, batch.hidden, batch.weight]
            for leaf in leaves:
                leaf.requires_grad_()
            loss = ZERO_ITEMS[name](batch, items)
            loss.backward()
            assert loss == 0
            grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
            assert grads
            if name != "in place":
                assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("function", [cross_entropy, linear_cross_entropy])
def test_a_mean_of_nothing_is_nan_and_spoils_no_gradient(device, function):
    """As torch's: without num_items."""
    batch = Batch(10, device)
    ignored = torch.full_like(batch.ignored, -100)
    inputs = [batch.logits] if function is cross_entropy else [batch.hidden, batch.weight]
    how = {"class_dim": -1} if function is cross_entropy else {}
    found = results(lambda *x: function(*x, ignored, **how), *inputs)
    assert found[0].isnan()
    assert all((grad == 0).all() for grad in found[1:])
