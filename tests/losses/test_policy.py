"""Policy losses against their definitions, and what must hold of all of them."""

from __future__ import annotations

import inspect
import itertools
import math
import re

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import linear_token_stats, losses
from llmloss_ext.losses.policy_options import (
    BY_SEQUENCES,
    CLIPPED,
    LEVELS,
    LOSS_TYPES,
    POLICY_OPTIONS,
    PolicyOptions,
)
from losses.policy_definition import Problem, by_definition, number

LENGTH = 6
# What every loss has, then what some have.
GENERAL = {
    "plain": {},
    "kl": {"beta": 0.3},
    "kl without correction": {"beta": 0.3, "use_bias_correction_kl": False},
    "k1": {"beta": 0.3, "kl_estimator": "k1"},
    "k2": {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": False},
    "entropy": {"entropy_coef": 0.2},
    "off policy": {"off_policy_mask_threshold": 0.05},
}
SPECIAL = {
    "clip": {"epsilon": 0.1, "epsilon_high": 0.3},
    "delta": {"delta": 1.3, "epsilon_high": 0.1},
    "cispo": {"epsilon_high": 1.1},
    "sapo": {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    "vespo": {
        "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 0.5,
    },
}  # fmt: skip
OF = {"clip": CLIPPED, "delta": CLIPPED, "cispo": ("cispo",), "sapo": ("sapo",),
      "vespo": ("vespo",)}  # fmt: skip


# Every loss type at every level that it has.
KINDS = [
    (loss_type, level)
    for loss_type in LOSS_TYPES
    for level in (("token",) if loss_type == "vespo" else LEVELS)
]


def options_of(loss_type, level="token", **others):
    always = {"max_completion_length": 9} if loss_type == "dr_grpo" else {}
    return {"loss_type": loss_type, "importance_sampling_level": level, **always, **others}


def given(p, by_tokens=False, weights=True):
    """Everything that a loss takes."""
    advantages = p.advantages[:, None] * (1 + p.entropy) if by_tokens else p.advantages
    tensors = {"reference_log_probs": p.reference, "entropy": p.entropy}
    if weights:
        tensors |= {"entropy_mask": p.entropy_mask, "importance_sampling_ratio": p.rollout}
    return (p.old, advantages, p.mask), tensors


def with_gradient(function, x, *others, **how):
    leaf = x.clone().requires_grad_()
    loss = function(leaf, *others, **how)
    loss = loss if isinstance(loss, torch.Tensor) else loss[0]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


CASES = [
    (loss_type, level, name)
    for loss_type, level in KINDS
    for name in (*GENERAL, *(n for n, owners in OF.items() if loss_type in owners))
]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("loss_type", "level", "name"), CASES)
def test_every_loss_is_what_the_papers_say(device, loss_type, level, name, weights):
    for seed, by_tokens in ((0, False), (1, True)):
        p = Problem(seed)
        how = options_of(loss_type, level, **(GENERAL | SPECIAL)[name])
        positional, tensors = given(p, by_tokens, weights)
        if name == "off policy":
            tensors["sampling_log_probs"] = p.sampling
        want = with_gradient(by_definition, p.log_probs, *positional, **tensors, **how)
        positional, tensors = given(p.to(device), by_tokens, weights)
        if name == "off policy":
            tensors["sampling_log_probs"] = p.sampling.to(device)
        x = p.log_probs.to(device)
        found = with_gradient(losses.grpo_loss, x, *positional, **tensors, **how)
        for one, other in zip(found, want, strict=True):
            assert_close(one, other, 1e-10)
        # Float32 is as near as float32 is.
        small, single = p.to(torch.float32).to(device), torch.float32
        positional, tensors = given(small, by_tokens, weights)
        if name == "off policy":
            tensors["sampling_log_probs"] = small.sampling
        found = with_gradient(losses.grpo_loss, x.to(single), *positional, **tensors, **how)
        for one, other in zip(found, want, strict=True):
            assert one.dtype == single
            assert_close(one, other, 2e-5)


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_the_losses_of_tokens(loss_type, level):
    p = Problem(2)
    how = options_of(loss_type, level, beta=0.3)
    positional, tensors = given(p)
    want = by_definition(p.log_probs, *positional, **tensors, **how)[1]
    found = losses.grpo_loss(p.log_probs, *positional, **tensors, **how, reduction="none")
    assert_close(found.loss, want, 1e-10)
    assert (found.loss[~p.mask] == 0).all()
    bonus = losses.grpo_loss(
        p.log_probs, *positional, **tensors, **how, reduction="none", entropy_coef=0.5
    )
    acts = p.mask & p.entropy_mask
    assert_close(found.loss - bonus.loss, torch.where(acts, 0.5 * p.entropy, 0.0), 1e-10)
    whole = losses.grpo_loss(p.log_probs, *positional, **tensors, **how)
    for one, other in zip(found.metrics, whole.metrics, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.metrics.policy_loss, whole.loss)


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_on_policy_the_old_ones_are_the_policy(loss_type, level):
    p = Problem(3)
    (_, *others), tensors = given(p)
    how = options_of(loss_type, level, beta=0.3, off_policy_mask_threshold=0.1)
    one = with_gradient(losses.grpo_loss, p.log_probs, None, *others, **tensors, **how)
    two = with_gradient(losses.grpo_loss, p.log_probs, p.log_probs, *others, **tensors, **how)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
@hypothesis.settings(SETTINGS, max_examples=10)
@hypothesis.given(
    st.integers(0, 10_000), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), st.booleans()
)
def test_what_masked_tokens_hold_and_the_order_do_not_matter(loss_type, level, seed, value, tokens):
    p = Problem(seed)
    p.mask[1] = False  # a sequence of nothing
    how = options_of(loss_type, level, beta=0.1, entropy_coef=0.1, off_policy_mask_threshold=0.3)

    def run(q):
        positional, tensors = given(q, tokens)
        tensors["sampling_log_probs"] = q.sampling
        leaf, entropy = q.log_probs.clone().requires_grad_(), q.entropy.clone().requires_grad_()
        tensors["entropy"] = entropy
        result = losses.grpo_loss(leaf, *positional, **tensors, **how)
        return result, *torch.autograd.grad(result.loss, (leaf, entropy))

    clean, *grads = run(p)
    spoilt, *others = run(p.spoilt(value))
    assert torch.equal(clean.loss, spoilt.loss)
    for one, other in zip(clean.metrics, spoilt.metrics, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    for one, other in zip(grads, others, strict=True):
        assert torch.equal(one, other)
        assert (one[~p.mask] == 0).all()
    order = torch.randperm(5)
    moved, *gradients = run(p.part(order))
    assert_close(moved.loss, clean.loss, 1e-12)
    assert_close(gradients[0], grads[0][order], 1e-12)


@pytest.mark.parametrize(("loss_type", "level"), [k for k in KINDS if k[0] != "bnpo"])
@hypothesis.settings(SETTINGS, max_examples=8)
@hypothesis.given(st.integers(0, 10_000), st.sets(st.integers(0, 5), max_size=3), st.booleans())
def test_micro_batches_add_up(loss_type, level, seed, cuts, as_tensor):
    p = Problem(seed)
    how = options_of(loss_type, level, beta=0.1, entropy_coef=0.1)
    number = len(p.mask) if loss_type in BY_SEQUENCES else int(p.mask.sum())
    acting = int((p.mask & p.entropy_mask).sum())
    hypothesis.assume(acting > 0)
    items = {"num_items": number, "entropy_items": acting}
    if as_tensor:
        items = {name: torch.tensor(float(n)) for name, n in items.items()}

    def run(q, **how):
        positional, tensors = given(q)
        return with_gradient(losses.grpo_loss, q.log_probs, *positional, **tensors, **how)

    whole = run(p, **how)
    ends = sorted({0, 5, *cuts})
    parts = [run(p.part(slice(*e)), **how, **items) for e in itertools.pairwise(ends)]
    parts.append(run(p.part(slice(2, 2)), **how, **items))  # of no sequence
    assert_close(sum(loss for loss, _ in parts), whole[0], 1e-10)
    assert_close(torch.cat([grad for _, grad in parts]), whole[1], 1e-10)


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_a_micro_batch_of_nothing_is_0(device, loss_type, level):
    p = Problem(4).to(device)
    p.mask[:] = False
    how = options_of(loss_type, level, beta=0.1, entropy_coef=0.1)
    positional, tensors = given(p)
    for items in ({}, {"num_items": 0, "entropy_items": 0}, {"num_items": 7, "entropy_items": 7}):
        if items and loss_type == "bnpo":
            continue
        loss, grad = with_gradient(
            losses.grpo_loss, p.log_probs, *positional, **tensors, **how, **items
        )
        assert loss == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("loss_type", [*CLIPPED, "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_derivatives_of_both_orders(loss_type, level, estimator):
    """Of the losses that hold nothing without a gradient, at a point off every corner."""
    p = Problem(5, sequences=2, length=3)
    how = options_of(loss_type, level, beta=0.3, entropy_coef=0.1, kl_estimator=estimator)
    positional, tensors = given(p)
    entropy = tensors.pop("entropy")

    def function(x, entropy):
        return losses.grpo_loss(x, *positional, entropy=entropy, **tensors, **how).loss

    leaves = p.log_probs.requires_grad_(), entropy.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_one_rule_for_every_number_of_leading_dimensions():
    p = Problem(6, sequences=4)
    positional, tensors = given(p)
    flat = losses.grpo_loss(p.log_probs, *positional, **tensors, loss_type="grpo", beta=0.1)
    deep = losses.grpo_loss(
        p.log_probs.view(2, 2, LENGTH), p.old.view(2, 2, LENGTH), p.advantages.view(2, 2),
        p.mask.view(2, 2, LENGTH), loss_type="grpo", beta=0.1,
        **{name: x.view(2, 2, LENGTH) for name, x in tensors.items()},
    )  # fmt: skip
    assert torch.equal(flat.loss, deep.loss)
    column = losses.grpo_loss(
        p.log_probs, p.old, p.advantages[:, None], p.mask, loss_type="grpo", beta=0.1, **tensors
    )
    assert torch.equal(flat.loss, column.loss)


def test_vmap_and_functional_gradients():
    p = Problem(7)

    def loss(x, old):
        return losses.grpo_loss(
            x, old, p.advantages, p.mask, reference_log_probs=p.reference, beta=0.1, num_items=9
        ).loss

    many = torch.stack([p.log_probs, p.old, p.reference])
    found = torch.func.vmap(torch.func.grad(loss), (0, None))(many, p.old)
    for one, x in zip(found, many, strict=True):
        assert_close(one, with_gradient(loss, x, p.old)[1], 1e-12)


def test_the_metrics():
    p = Problem(8, sequences=30)
    clip = {"epsilon": 0.1, "epsilon_high": 0.2}
    m = losses.grpo_loss(
        p.log_probs, p.old, p.advantages, p.mask, reference_log_probs=p.reference,
        entropy=p.entropy, **clip,
    ).metrics  # fmt: skip
    log_ratio = (p.log_probs - p.old)[p.mask]
    ratio, a = log_ratio.exp(), p.advantages[:, None].expand(p.mask.shape)[p.mask]
    low, high = (ratio < 0.9) & (a < 0), (ratio > 1.2) & (a > 0)
    assert 0 < low.sum() < len(low)
    assert 0 < high.sum() < len(high)
    d = (p.reference - p.log_probs)[p.mask]
    want = {
        "clip_low": low.double().mean(), "clip_high": high.double().mean(),
        "ratio": ratio.mean(), "approx_kl": -log_ratio.mean(),
        "kl": (ratio * (d.exp() - d - 1)).mean(), "entropy": p.entropy[p.mask].mean(),
    }  # fmt: skip
    for name, value in want.items():
        assert_close(getattr(m, name), value, 1e-12)
    of_sequences = torch.stack(
        [(x - y)[k].mean().exp() for x, y, k in zip(p.log_probs, p.old, p.mask, strict=True)]
    )
    m = losses.grpo_loss(
        p.log_probs, p.old, p.advantages, p.mask, importance_sampling_level="sequence", **clip
    ).metrics
    assert_close(m.ratio, of_sequences.mean(), 1e-12)
    high = (of_sequences > 1.2) & (p.advantages > 0)
    assert 0 < high.sum() < len(high)
    assert_close(m.clip_high, high.double().mean(), 1e-12)
    assert m.kl is None
    assert m.entropy is None
    m = losses.grpo_loss(
        p.log_probs, p.old, p.advantages, p.mask, loss_type="cispo", epsilon_high=1.3
    ).metrics
    assert_close(m.clip_high, ((ratio > 1.3) & (a > 0)).double().mean(), 1e-12)
    assert m.clip_low == 0
    m = losses.grpo_loss(p.log_probs, p.old, p.advantages, p.mask, loss_type="sapo").metrics
    assert m.clip_low == m.clip_high == 0


def test_ppo_is_the_mean_over_tokens():
    p = Problem(9)
    a = p.advantages[:, None] * (1 + p.entropy)
    how = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "entropy_coef": 0.05}
    want = with_gradient(by_definition, p.log_probs, p.old, a, p.mask, entropy=p.entropy, **how)
    found = with_gradient(
        losses.ppo_clip_loss, p.log_probs, p.old, a, p.mask, entropy=p.entropy, **how
    )
    for one, other in zip(found, want, strict=True):
        assert_close(one, other, 1e-12)
    count = int(p.mask.sum())
    half = losses.ppo_clip_loss(
        p.log_probs, p.old, a, p.mask, entropy=p.entropy, num_items=2 * count, **how
    )
    assert_close(2 * half, want[0], 1e-12)
    plain = losses.ppo_clip_loss(p.log_probs, p.old, a, p.mask)
    result = losses.grpo_loss(p.log_probs.requires_grad_(), p.old, a, p.mask)
    assert result.item() == plain
    result.backward()
    assert p.log_probs.grad.abs().sum() > 0


def test_a_policy_loss_from_hidden_states():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    ids = torch.randint(0, 11, (2, 5))
    stats = linear_token_stats(hidden, weight, ids)
    a = torch.tensor([1.0, -2.0])
    how = {"loss_type": "grpo", "entropy_coef": 0.1}
    found = losses.grpo_loss(
        stats.log_prob, None, a, torch.ones(2, 5), entropy=stats.entropy, **how
    )
    log_p = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    x, entropy = log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    want, _ = by_definition(x, None, a.double(), torch.ones(2, 5), entropy=entropy, **how)
    assert_close(found.loss, want, 1e-5)
    for one, other in zip(
        torch.autograd.grad(found.loss, (hidden, weight)),
        torch.autograd.grad(want, (hidden, weight)),
        strict=True,
    ):
        assert_close(one, other, 1e-5)


def test_signatures_and_documentation_are_those_of_the_table():
    for function in (losses.grpo_loss, losses.ppo_clip_loss):
        parameters = inspect.signature(function).parameters
        shared = [name for name in parameters if name in POLICY_OPTIONS]
        for name in shared:
            assert parameters[name].default == POLICY_OPTIONS[name].default, name
            assert parameters[name].annotation == POLICY_OPTIONS[name].type, name
        text = inspect.getdoc(function)
        arguments = text[text.index("Args:") : text.index("Returns:")]
        described = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
        assert sorted(described) == sorted(parameters)
        assert all(len(line) <= 100 for line in function.__doc__.splitlines())
    assert set(POLICY_OPTIONS) == set(PolicyOptions._fields)
    assert set(POLICY_OPTIONS) < set(inspect.signature(losses.grpo_loss).parameters)


OWNED = {
    "importance_sampling_level": [kind for kind in LOSS_TYPES if kind != "vespo"],
    "epsilon": [*CLIPPED, "cispo"], "epsilon_high": [*CLIPPED, "cispo"], "delta": CLIPPED,
    "max_completion_length": ["dr_grpo"],
    **{name: [name[:5].rstrip("_")] for name in POLICY_OPTIONS if name[:5] in ("sapo_", "vespo")},
}  # fmt: skip


@pytest.mark.parametrize("name", POLICY_OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_option_is_accepted_and_ignored(loss_type, name):
    """Whatever an option is set to, either the result is another or the option is refused."""
    others = {
        "loss_type": "luspo" if loss_type == "sapo" else "sapo", "kl_estimator": "k2",
        "importance_sampling_level": "sequence", "use_bias_correction_kl": False, "epsilon": 0.05,
        "epsilon_high": 0.31, "delta": 1.05, "off_policy_mask_threshold": 1e-3,
        "max_completion_length": 4,
    }  # fmt: skip
    value = others[name] if name in others else POLICY_OPTIONS[name].default + 0.25
    p = Problem(10, sequences=20)
    before = options_of(loss_type, beta=0.2)

    def run(how):
        positional, tensors = given(p, weights=False)
        return losses.grpo_loss(p.log_probs, *positional, **tensors, **how).loss

    owned = OWNED.get(name, LOSS_TYPES)
    if name == "loss_type":  # with the options of both
        after = options_of(value, beta=0.2)
        assert run(after) != run(before)
    elif loss_type in owned:
        assert run(before | {name: value}) != run(before)
    else:
        with pytest.raises(ValueError, match="belongs to|own ratio"):
            run(before | {name: value})


REFUSED = [
    ({"loss_type": "ppo"}, "loss_type must be one of"),
    ({"importance_sampling_level": "batch"}, "importance_sampling_level must be"),
    ({"kl_estimator": "k4"}, "kl_estimator must be"),
    ({"epsilon": 0.0}, "epsilon must be a finite number > 0"),
    ({"epsilon_high": -0.1}, "epsilon_high must be"),
    ({"delta": 0.9}, "delta must be > 1"),
    ({"delta": math.inf}, "delta must be a finite"),
    ({"beta": -1.0}, "beta must be a finite number >= 0"),
    ({"beta": 0.1}, "beta needs reference_log_probs"),
    ({"entropy_coef": math.nan}, "entropy_coef must be"),
    ({"entropy_coef": 0.1}, "entropy_coef needs the entropy"),
    ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold must be"),
    ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
    ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "own ratio"),
    ({"loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 5.0}, "cispo has one bound"),
    ({"loss_type": "bnpo", "num_items": 3}, "bnpo divides by the tokens of one call"),
    ({"num_items": -1}, "num_items must be >= 0"),
    ({"reduction": "none", "num_items": 3}, "num_items replaces"),
    ({"reduction": "sum"}, "reduction must be"),
    ({"sampling_log_probs": torch.zeros(2, 3)}, "belongs to off_policy_mask_threshold"),
    ({"reference_log_probs": torch.zeros(2, 1)}, "reference_log_probs must have the shape"),
    ({"entropy_mask": torch.zeros(3, 3)}, "entropy_mask must have the shape"),
    ({"entropy": torch.zeros(3)}, "entropy must have the shape"),
    ({"importance_sampling_ratio": torch.zeros(3, 1)}, "importance_sampling_ratio must have one"),
    ({"entropy": torch.ones(2, 3), "entropy_coef": 0.1, "num_items": 3}, "needs entropy_items"),
]


@pytest.mark.parametrize(("how", "message"), REFUSED, ids=[str(list(h)) for h, _ in REFUSED])
def test_what_is_refused(how, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        losses.grpo_loss(x, x, torch.ones(2), torch.ones(2, 3), **how)


def test_tensors_that_do_not_fit():
    x, ones = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="advantages must have one number per token"):
        losses.grpo_loss(x, x, torch.ones(3), ones)
    with pytest.raises(ValueError, match="mask must have the shape"):
        losses.grpo_loss(x, x, torch.ones(2), ones[:, :2])
    with pytest.raises(ValueError, match="old_log_probs must have the shape"):
        losses.ppo_clip_loss(x, x[:1], torch.ones(2), ones)
    with pytest.raises(TypeError, match="no option clip"):
        PolicyOptions.of(clip=0.1)


@pytest.mark.parametrize("name", ["old_log_probs", "advantages", "mask", "entropy",
                                  "reference_log_probs", "entropy_mask"])  # fmt: skip
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 5), (3, 1), (3, 5, 1)])
def test_policy_losses_do_not_broadcast(name, shape):
    whole = dict.fromkeys(("log_probs", "old_log_probs", "mask", "entropy"), torch.ones(3, 5))
    ppo = {**whole, "advantages": torch.ones(3, 5)}
    grpo = {**ppo, "reference_log_probs": torch.ones(3, 5), "entropy_mask": torch.ones(3, 5)}
    for function, arguments in ((losses.ppo_clip_loss, ppo), (losses.grpo_loss, grpo)):
        if name not in arguments:
            continue
        function(**arguments)
        if (name, shape) == ("advantages", (3, 1)):
            function(**{**arguments, name: torch.ones(shape)})  # one for each sequence
            continue
        with pytest.raises(ValueError, match=name.split("_")[0]):
            function(**{**arguments, name: torch.ones(shape)})


def value_by_definition(v, old, wanted, mask, clip):
    chosen = [
        max(
            ((v[at] - wanted[at]) ** 2, (min(max(v[at], old[at] - clip), old[at] + clip)
                                         - wanted[at]) ** 2),
            key=number,
        )
        for at in map(tuple, mask.nonzero().tolist())
    ]  # fmt: skip
    return 0.5 * sum(chosen) / len(chosen)


def test_value_loss(device):
    p = Problem(11)
    v, old, wanted = p.log_probs, p.old, p.reference
    v.requires_grad_()
    want = value_by_definition(v, old, wanted, p.mask, 0.2)
    (gradient,) = torch.autograd.grad(want, v)
    dirty = p.spoilt(math.nan).to(device)
    leaf = dirty.log_probs.detach().requires_grad_()
    found = losses.value_loss(leaf, dirty.old, dirty.reference, dirty.mask)
    assert_close(found.loss, want, 1e-12)
    assert_close(torch.autograd.grad(found.loss, leaf)[0], gradient, 1e-12)
    squares = (v - wanted).square(), (v.clamp(old - 0.2, old + 0.2) - wanted).square()
    fraction = (squares[1] > squares[0])[p.mask].double().mean()
    assert 0 < fraction < 1
    assert_close(found.clip_fraction, fraction, 1e-6)
    plain = losses.value_loss(
        leaf, dirty.old * math.nan, dirty.reference, dirty.mask, cliprange_value=None
    )
    assert_close(plain.loss, 0.5 * squares[0][p.mask].mean(), 1e-12)
    half = losses.value_loss(
        leaf, dirty.old, dirty.reference, dirty.mask, num_items=2 * int(p.mask.sum())
    )
    assert_close(2 * half.loss, want, 1e-12)
    nothing = losses.value_loss(leaf, dirty.old, dirty.reference, dirty.mask & False)
    assert nothing.loss == nothing.clip_fraction == 0
    with pytest.raises(ValueError, match="cliprange_value"):
        losses.value_loss(leaf, leaf, leaf, dirty.mask, cliprange_value=0.0)
    with pytest.raises(ValueError, match="returns must have"):
        losses.value_loss(leaf, leaf, leaf[:1], dirty.mask)
