"""Fake tensors, meta tensors and symbolic sizes go through every function, with every option."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    losses,
    metrics,
    token_stats,
)
from llmloss_ext.losses import preference

B, S, D, V = 2, 5, 4, 13


class Batch:
    """Tensors of a device or mode, and numbers."""

    def __init__(self, device="cpu"):
        self.logits = torch.randn(B, S, V, device=device, requires_grad=True)
        self.hidden = torch.randn(B, S, D, device=device, requires_grad=True)
        self.weight = torch.randn(V, D, device=device, requires_grad=True)
        self.bias = torch.randn(V, device=device, requires_grad=True)
        self.class_weight = torch.rand(V, device=device)
        self.ids = torch.zeros(B, S, dtype=torch.long, device=device)
        self.mask = torch.ones(B, S, device=device)
        self.number = torch.ones((), device=device)
        self.ends = torch.arange(3, device=device) * S


# Each option as a number and as a tensor.
OPTIONS = {
    "plain": lambda b: {},
    "numbers": lambda b: {
        "label_smoothing": 0.1, "z_loss": 0.1, "focal_gamma": 1.0, "softcap": 3.0,
        "logit_scale": 0.5, "temperature": 0.8, "vocab_size": V - 1, "num_items": 4,
        "ignore_index": 1,
    },
    "whole numbers": lambda b: {
        "label_smoothing": 0, "z_loss": 1, "focal_gamma": 2, "softcap": 3, "logit_scale": 2,
        "temperature": 2, "num_items": 4.5,
    },
    "0 items": lambda b: {"num_items": 0},
    "tensors": lambda b: {
        "weight": b.class_weight, "token_weight": b.mask, "num_items": b.number,
        "logit_scale": b.number, "z_loss": 0.1,
    },
    "learned": lambda b: {
        "token_weight": (b.mask * 1).requires_grad_(),
        "logit_scale": (b.number * 1).requires_grad_(), "temperature": 0.8,
        "weight": b.class_weight, "z_loss": 0.1,
    },
}  # fmt: skip
SEQUENCES = {
    "plain": lambda b: {},
    "mask": lambda b: {"attention_mask": b.mask},
    "positions": lambda b: {"position_ids": b.ids[0]},
    "documents": lambda b: {"document_ids": b.ids, "cu_seqlens": b.ends},
}
STATS = ("log_prob", "lse", "entropy", "mean_log_prob", "log_sum_sq_probs")


def without(options, *names):
    return {k: v for k, v in options.items() if k not in names}


def of_loss(b, options, **how):
    for reduction in ("mean", "sum", "none"):
        given = options if reduction == "mean" else without(options, "num_items")
        for inplace in (False, True):
            if inplace and given.get("token_weight", b.ids).requires_grad:
                continue  # refused beside class weights and a z-loss
            x = b.logits * 1 if inplace else b.logits
            yield cross_entropy(
                x, b.ids, class_dim=-1, reduction=reduction, inplace=inplace, **given, **how
            )
        for drop, chunk in itertools.product((None, False, True), (None, 3)):
            yield linear_cross_entropy(
                b.hidden, b.weight, b.ids, linear_bias=b.bias, reduction=reduction,
                drop_ignored=drop, chunk_tokens=chunk, **given, **how,
            )  # fmt: skip


def of_statistics(b, options):
    given = without(
        options, "label_smoothing", "z_loss", "focal_gamma", "token_weight", "num_items"
    )
    extra = ("log_sum_sq_probs",)
    for stats in (
        token_stats(b.logits, b.ids, with_rank=True, extra=extra, **given),
        linear_token_stats(b.hidden, b.weight, b.ids, with_rank=True, extra=extra, **given),
    ):
        assert stats.rank.shape == (B, S)
        yield from (getattr(stats, name) for name in STATS)
    yield linear_log_probs(b.hidden, b.weight, b.ids, **without(given, "weight"))


def of_sequences(b, given):
    yield linear_cross_entropy(b.hidden, b.weight, b.ids, shift=1, **given)
    yield linear_log_probs(b.hidden, b.weight, b.ids, shift=1, **given)
    yield linear_token_stats(b.hidden, b.weight, b.ids, shift=2, **given).lse
    yield losses.causal_lm_loss(b.logits, b.ids, token_weight=b.mask, **given)
    for module in (
        losses.LanguageModelLoss(V),
        losses.LanguageModelLoss(V, confidence_penalty=0.1),
    ):
        yield module(b.logits, b.ids, num_items=b.number, **given)
        yield module.compute_loss_with_stats(b.hidden, b.ids, linear_weight=b.weight, **given).loss


POLICY_KINDS = [
    ("dapo", "token"), ("grpo", "sequence"), ("bnpo", "sequence_token"), ("dr_grpo", "token"),
    ("luspo", "sequence"), ("cispo", "token"), ("sapo", "token"), ("vespo", "token"),
]  # fmt: skip


def of_preferences(policy, old, b, items):
    chosen, reference = (losses.sequence_log_probs(x, b.mask, average=True) for x in (policy, old))
    rejected, nll = chosen - 1, -chosen.mean()
    for kind, entry in preference.KINDS.items():
        how = {"num_items": items}
        if kind in ("robust", "exo_pair"):
            how["label_smoothing"] = 0.1
        if kind == "sigmoid_norm":
            how |= {"chosen_lengths": b.mask.sum(1), "rejected_lengths": b.mask.sum(1)}
        if kind == "sft":
            how["nll_loss"] = nll
        yield losses.dpo_loss(chosen, rejected, reference, reference, kind=kind, **how).loss
        if entry.of_scores:
            how |= {"f_divergence_type": "alpha_divergence", "pair_weight": b.mask[:, 0]}
            yield losses.dpo_loss(chosen, rejected, reference, reference, kind=kind, **how).loss
    yield losses.cpo_loss(chosen, rejected, nll, alpha=0.1, num_items=items).loss
    yield losses.simpo_loss(chosen, rejected, num_items=items).loss
    yield losses.orpo_loss(chosen, rejected, nll, num_items=items).loss
    kl, good = losses.kl_estimate(rejected, reference), b.mask[:, 0]
    yield losses.kto_loss(chosen, reference, good, kl=kl, num_items=items).margins
    yield losses.kto_loss(chosen, reference, good, kl=kl, num_items=items).loss
    yield losses.bco_loss(chosen, reference, good, shift=kl, num_items=items).loss
    ld = losses.length_desensitized_log_probs(policy, old, b.mask, b.mask, ld_alpha=0.5)
    weights = losses.wpo_weights(policy, old, b.mask)
    yield losses.dpo_loss(*ld, *ld, pair_weight=weights).loss


def of_others(b):
    teacher = b.logits.detach()
    for items, direction in itertools.product((None, 3, b.number), ("forward", "reverse", "jsd")):
        how = {"direction": direction, "num_items": items, "target": b.ids}
        yield losses.distillation_loss(b.logits, teacher, vocab_size=V - 2, **how)
        top = b.ids.unsqueeze(-1).expand(B, S, 2)
        yield losses.top_k_distillation_loss(b.logits, top, teacher[..., :2], **how)
        for kind in ("hidden", "top k", "all"):
            given = {"teacher_log_probs": teacher}
            if kind == "hidden":
                given = {"teacher_hidden": b.hidden, "teacher_weight": b.weight}
            elif kind == "top k":
                given = {"teacher_log_probs": teacher[..., :2], "teacher_ids": top}
            yield linear_distillation_loss(b.hidden, b.weight, **given, **how).loss
        yield losses.hard_soft_distillation_loss(b.logits, teacher, **how).loss
        yield linear_kl_div(
            b.hidden, b.weight, b.hidden.detach(), b.weight.detach(), vocab_size=V - 1, **how
        )
    two = b.ids.unsqueeze(-1).expand(B, S, 2)
    yield losses.selected_log_probs(b.logits, two, softcap=3.0)
    yield losses.linear_selected_log_probs(b.hidden, b.weight, two, linear_bias=b.bias)
    for items in (None, 3, b.number):
        yield losses.cosine_distillation_loss(b.hidden, b.hidden, target=b.ids, num_items=items)
        yield losses.sampled_reverse_kl(b.hidden[..., 0], b.mask, b.mask, num_items=items).loss
        policy, old = b.hidden[..., 0], b.hidden[..., 1].detach()
        yield losses.ppo_clip_loss(policy, old, b.mask, b.mask, num_items=items)
        for loss_type, level in POLICY_KINDS:
            how = {"max_completion_length": 9} if loss_type == "dr_grpo" else {}
            result = losses.grpo_loss(
                policy, old, b.mask[:, 0], b.mask, loss_type=loss_type, beta=0.1,
                importance_sampling_level=level, reference_log_probs=old, entropy=policy.exp(),
                entropy_mask=losses.high_entropy_mask(policy.exp(), b.mask, 0.5), entropy_coef=0.1,
                importance_sampling_ratio=losses.rollout_weights(old, old, b.mask),
                off_policy_mask_threshold=0.5, sampling_log_probs=old, entropy_items=3,
                num_items=None if loss_type == "bnpo" else items, **how,
            )  # fmt: skip
            yield result.loss
            yield from result.metrics
        yield losses.value_loss(policy, old, old, b.mask, num_items=items).loss
        sums = (losses.sequence_log_probs(x, b.mask) for x in (policy, old, old, old))
        yield losses.dpo_loss(*sums, num_items=items).loss
        yield from of_preferences(policy, old, b, items)
        yield losses.confidence_penalty_loss(b.logits, b.ids, num_items=items)
        yield losses.LabelSmoothingCrossEntropy()(b.logits, b.ids, num_items=items)
        yield losses.mlm_loss(b.hidden, b.ids, b.weight, num_items=items)
        yield losses.mlm_loss(b.logits, b.ids, num_items=items)
        scores = b.hidden[..., 2]
        for kind in ("logistic", "hinge", "least_squares", "wasserstein"):
            how = {"kind": kind, "num_items": items}
            yield losses.discriminator_loss(scores, policy, real_mask=b.mask, **how).loss
            yield losses.generator_loss(scores, mask=b.mask, **how).loss
        for baseline in ("mean", "leave_one_out", b.number, None):
            yield losses.policy_gradient_loss(
                policy, old, b.mask, baseline=baseline, num_items=items
            ).loss
        yield losses.unlikelihood_loss(b.logits, b.ids, attention_mask=b.mask, num_items=items)
        yield losses.unlikelihood_loss(
            b.hidden, b.ids, b.weight, linear_bias=b.bias, context=2, num_items=items
        )
        wrong = losses.repeated_ngrams(b.ids, 2, b.mask)
        yield losses.sequence_unlikelihood_loss(policy, wrong, b.mask, num_items=items)
        for head in (b.weight, [b.weight, b.weight]):
            how = {"offsets": 2, "document_ids": b.ids, "label_smoothing": 0.1}
            yield losses.multi_token_prediction_loss(
                b.hidden, b.ids, head, num_items=items, token_weight=b.mask, **how
            ).loss

    def critic(x):
        return x.square().sum(-1) * b.weight.sum()

    yield losses.r1_penalty(critic, b.hidden)
    yield losses.gradient_penalty(critic, b.hidden, b.hidden, mask=b.mask)
    assert losses.difficulty_weights(b.mask, b.mask, shift=1).shape == (B, S)
    assert losses.select_difficult_tokens(b.mask, reference_losses=b.mask).shape == (B, S)
    assert losses.min_norm_weights(b.weight @ b.weight.t()).shape == (V,)
    assert losses.count_multi_token_items(b.ids, 3).shape == (3,)
    for hard in (False, True):
        yield losses.gumbel_softmax(b.logits, hard=hard, mask=b.mask)
        yield losses.linear_gumbel_embeddings(
            b.hidden, b.weight, b.weight, hard=hard, linear_bias=b.bias, mask=b.mask
        ).embeddings
    yield losses.conflict_loss(
        {"a": b.hidden.sum(), "b": b.hidden.square().sum()}, [b.hidden]
    ).total
    queries, keys = b.hidden[:, 0], b.hidden[:, 1]
    yield losses.contrastive_loss(queries, keys, symmetric=True, positives=b.ids[:, 0])
    yield losses.contrastive_loss(queries, positives=b.ids[:, 0])
    yield losses.contrastive_loss(queries, keys, logit_scale=b.number)
    assert metrics.top_k_accuracy(b.logits, b.ids, 2).shape == ()


def check(values):
    for value in values:
        if value.requires_grad:
            value.sum().backward(retain_graph=True)


@pytest.fixture(params=["fake", "meta"])
def batch(request):
    if request.param == "meta":
        yield Batch("meta")
        return
    with FakeTensorMode():
        yield Batch()


@pytest.mark.parametrize("name", OPTIONS)
def test_losses(batch, name):
    check(of_loss(batch, OPTIONS[name](batch)))


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics(batch, name):
    check(of_statistics(batch, OPTIONS[name](batch)))


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(batch, name):
    check(of_sequences(batch, SEQUENCES[name](batch)))


@pytest.mark.slow
def test_other_losses(batch):
    check(of_others(batch))


SYMBOLIC = {
    "dense": lambda x, y, w, b: cross_entropy(
        x @ w.t(), y, label_smoothing=0.1, z_loss=0.1, token_weight=b, num_items=y.shape[0]
    ),
    "linear": lambda x, y, w, b: linear_cross_entropy(
        x, w, y, token_weight=b, vocab_size=w.shape[0] - 1, num_items=y.shape[0], shift=1,
        position_ids=y,
    ),
    "rows": lambda x, y, w, b: linear_cross_entropy(x, w, y, reduction="none").sum(),
    "items": lambda x, y, w, b: linear_cross_entropy(x, w, y, num_items=b.sum()),
    "statistics": lambda x, y, w, b: token_stats(x @ w.t(), y).entropy.sum(),
    "selected": lambda x, y, w, b: losses.selected_log_probs(
        x @ w.t(), torch.stack([y, y + 1], -1), temperature=0.7
    ).sum(),
    "linear selected": lambda x, y, w, b: losses.linear_selected_log_probs(
        x, w, torch.stack([y, y + 1], -1), softcap=3.0
    ).sum(),
    "hard and soft": lambda x, y, w, b: linear_distillation_loss(
        x, w, x.detach(), w.detach(), y, num_items=y.shape[0]
    ).loss,
    "hard and soft of logits": lambda x, y, w, b: losses.hard_soft_distillation_loss(
        x @ w.t(), (x @ w.t()).detach(), y, direction="skew_reverse"
    ).loss,
    "cosine": lambda x, y, w, b: losses.cosine_distillation_loss(x, x.detach().flip(-1), target=y),
    "on policy": lambda x, y, w, b: losses.sampled_reverse_kl(
        x[:, 0], x[:, 1], b > 0.2, old_log_probs=x[:, 2], num_items=y.shape[0]
    ).loss,
    "kl": lambda x, y, w, b: linear_kl_div(x, w, x.detach(), w.detach(), num_items=y.shape[0]),
    "distillation": lambda x, y, w, b: losses.distillation_loss(
        x @ w.t(), (x @ w.t()).detach(), target=y
    ),
    "dpo": lambda x, y, w, b: losses.dpo_loss(
        *x[:, :2].unbind(1), *x[:, 2:].detach().unbind(1),
        kind=("sigmoid", "exo_pair", "discopop", "aot"), label_smoothing=0.1, num_items=y.shape[0],
    ).loss,
    "f-divergence": lambda x, y, w, b: losses.dpo_loss(
        *x[:, :2].unbind(1), *x[:, 2:].detach().unbind(1), f_divergence_type="forward_kl"
    ).loss,
    "orpo": lambda x, y, w, b: losses.orpo_loss(
        -x[:, 0].square(), -x[:, 1].square(), x.square().mean()
    ).loss,
    "simpo": lambda x, y, w, b: losses.simpo_loss(x[:, 0], x[:, 1], num_items=y.shape[0]).loss,
    "kto": lambda x, y, w, b: losses.kto_loss(
        x[:, 0], x[:, 1].detach(), y > 5, kl=losses.kl_estimate(x[:, 2], x[:, 3])
    ).loss,
    "bco": lambda x, y, w, b: losses.bco_loss(
        x[:, 0], x[:, 1].detach(), y > 5, shift=losses.RunningMean()
    ).loss,
    "ppo": lambda x, y, w, b: losses.ppo_clip_loss(
        x[:, 0], x[:, 1].detach(), b, b, num_items=y.shape[0]
    ),
    "grpo": lambda x, y, w, b: losses.grpo_loss(
        x[:, :2], x[:, 1:3].detach(), b, x[:, :2] < 1, loss_type="grpo", epsilon_high=0.3,
        importance_sampling_level="sequence", reference_log_probs=x[:, 2:4].detach(), beta=0.1,
        off_policy_mask_threshold=0.5, entropy=x[:, 2:4].exp(), entropy_coef=0.1,
        entropy_mask=losses.high_entropy_mask(x[:, 2:4].exp(), x[:, :2] < 1, 0.5),
        importance_sampling_ratio=losses.rollout_weights(x[:, :2], x[:, 1:3], x[:, :2] < 1),
    ).loss,
    "vespo": lambda x, y, w, b: losses.grpo_loss(
        x[:, :3], None, losses.gae(x[:, :3], x[:, 1:4], x[:, :3] < 1).advantages, x[:, :3] < 1,
        loss_type="vespo", num_items=y.shape[0],
    ).loss,
    "value": lambda x, y, w, b: losses.value_loss(
        x[:, :3], x[:, 1:4].detach(), losses.gae(x[:, :3], x[:, 1:4], x[:, :3] < 1).returns,
        x[:, :3] < 1,
    ).loss,
    "discriminator": lambda x, y, w, b: losses.discriminator_loss(
        x[:, 0], x[:, 1], kind="hinge", real_mask=b > 0.2, num_items=y.shape[0]
    ).loss,
    "policy gradient": lambda x, y, w, b: losses.policy_gradient_loss(
        x, b, b.unsqueeze(-1).expand(-1, D) > 0.2
    ).loss,
    "unlikelihood": lambda x, y, w, b: losses.unlikelihood_loss(
        x.unsqueeze(0), y.unsqueeze(0), w, position_ids=y
    ),
    "unlikelihood of logits": lambda x, y, w, b: losses.unlikelihood_loss(
        (x @ w.t()).unsqueeze(0), y.unsqueeze(0)
    ),
    "generated": lambda x, y, w, b: losses.sequence_unlikelihood_loss(
        -x[:, 0].square() - 0.1, losses.repeated_ngrams(y, 2)
    ),
    "several tokens": lambda x, y, w, b: losses.multi_token_prediction_loss(
        x.unsqueeze(0), y.unsqueeze(0), w, offsets=2, token_weight=b.unsqueeze(0)
    ).loss,
    "difficult": lambda x, y, w, b: linear_cross_entropy(
        x, w, y, token_weight=losses.select_difficult_tokens(b, fraction=0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_one_graph_for_every_number_of_tokens(name):
    """Compiled with symbolic sizes and without a break; the numbers are those of eager calls."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(SYMBOLIC[name], fullgraph=True, dynamic=True, backend=backend)
    weight = torch.randn(V, D, requires_grad=True)
    for tokens in (6, 9, 16):
        x = torch.randn(tokens, D, requires_grad=True)
        y, b = torch.randint(0, V - 1, (tokens,)), torch.rand(tokens)
        grads = []
        for function in (SYMBOLIC[name], compiled):
            loss = function(x, y, weight, b)
            grads.append(
                [loss.detach(), *torch.autograd.grad(loss, (x, weight), allow_unused=True)]
            )
        for one, other in zip(*grads, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
