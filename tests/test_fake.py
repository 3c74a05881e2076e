"""Fake tensors, meta tensors and symbolic sizes go through every function, with every option."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    losses,
    metrics,
    token_stats,
)

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


def of_others(b):
    teacher = b.logits.detach()
    for items, direction in itertools.product((None, 3, b.number), ("forward", "reverse", "jsd")):
        how = {"direction": direction, "num_items": items, "target": b.ids}
        yield losses.distillation_loss(b.logits, teacher, vocab_size=V - 2, **how)
        top = b.ids.unsqueeze(-1).expand(B, S, 2)
        yield losses.top_k_distillation_loss(b.logits, top, teacher[..., :2], **how)
        yield linear_kl_div(
            b.hidden, b.weight, b.hidden.detach(), b.weight.detach(), vocab_size=V - 1, **how
        )
    for items in (None, 3, b.number):
        policy, old = b.hidden[..., 0], b.hidden[..., 1].detach()
        yield losses.ppo_clip_loss(policy, old, b.mask, b.mask, num_items=items)
        yield losses.grpo_loss(
            policy, old, b.mask[:, 0], b.mask, reference_log_probs=old, num_items=items
        )
        sums = (losses.sequence_log_probs(x, b.mask) for x in (policy, old, old, old))
        yield losses.dpo_loss(*sums, num_items=items).loss
        yield losses.confidence_penalty_loss(b.logits, b.ids, num_items=items)
        yield losses.LabelSmoothingCrossEntropy()(b.logits, b.ids, num_items=items)
        yield losses.mlm_loss(b.hidden, b.ids, b.weight, num_items=items)
        yield losses.mlm_loss(b.logits, b.ids, num_items=items)
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
    "kl": lambda x, y, w, b: linear_kl_div(x, w, x.detach(), w.detach(), num_items=y.shape[0]),
    "distillation": lambda x, y, w, b: losses.distillation_loss(
        x @ w.t(), (x @ w.t()).detach(), target=y
    ),
    "ppo": lambda x, y, w, b: losses.ppo_clip_loss(
        x[:, 0], x[:, 1].detach(), b, b, num_items=y.shape[0]
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
