"""Micro-batches of any sizes add up to the batch, for every loss that averages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_kl_div,
    losses,
    nn,
)

B, S, D, V = 6, 5, 4, 11


class Batch:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.logits = torch.randn(B, S, V).double()
        self.teacher = torch.randn(B, S, V).double()
        self.hidden = torch.randn(B, S, D).double()
        self.head = torch.randn(V, D).double()
        self.mask = torch.rand(B, S) < 0.6
        self.mask[0, 1] = True
        self.ids = torch.randint(1, V, (B, S))
        self.labels = torch.where(self.mask, self.ids, -100)
        self.weights = torch.where(self.mask, torch.rand(B, S).double(), 0.0)
        self.policy = -torch.rand(B, S).double()
        self.old = self.policy + 0.1 * torch.randn(B, S).double()
        self.advantages = torch.randn(B).double()
        self.top_ids = torch.arange(3).expand(B, S, 3)
        self.top = torch.log_softmax(self.teacher, -1)[..., :3]

    def rows(self, rows: slice) -> Batch:
        part = Batch.__new__(Batch)
        vars(part).update({k: t if k == "head" else t[rows] for k, t in vars(self).items()})
        return part


def tokens(b: Batch) -> float:
    return int(b.mask.sum())


def predicted(b: Batch) -> float:
    """Tokens that the one before predicts."""
    return int((b.mask[:, 1:] & b.mask[:, :-1]).sum())


def pairs(b: Batch) -> float:
    """Labels that a position before predicts."""
    return int((b.labels[:, 1:] != -100).sum())


def sequences(b: Batch) -> float:
    return len(b.mask)


def lm(penalty: float, stats: bool) -> Callable[..., Any]:
    module = losses.LanguageModelLoss(V, confidence_penalty=penalty)

    def loss(b: Batch, x: torch.Tensor, n: Any) -> torch.Tensor:
        if stats:
            return module.compute_loss_with_stats(x, b.ids, b.mask, num_items=n).loss
        return module(x, b.ids, b.mask, num_items=n)

    return loss


# The loss, whose gradient is asked of which tensor, and what its mean counts.
LOSSES: dict[str, tuple[Callable[..., Any], str, Callable[[Batch], float]]] = {
    "cross_entropy": (
        lambda b, x, n: cross_entropy(x, b.labels, class_dim=-1, num_items=n), "logits", tokens,
    ),
    "token weights": (
        lambda b, x, n: cross_entropy(
            x, b.ids, class_dim=-1, token_weight=b.weights, num_items=n
        ),
        "logits", lambda b: float(b.weights.sum()),
    ),
    "module": (
        lambda b, x, n: nn.CrossEntropyLoss(class_dim=-1)(x, b.labels, num_items=n),
        "logits", tokens,
    ),
    "linear": (
        lambda b, x, n: linear_cross_entropy(x, b.head, b.labels, num_items=n), "hidden", tokens,
    ),
    "kl": (
        lambda b, x, n: linear_kl_div(
            x, b.head, b.hidden.detach().flip(-1), b.head.flip(0), target=b.labels, num_items=n
        ),
        "hidden", tokens,
    ),
    "distillation": (
        lambda b, x, n: losses.distillation_loss(x, b.teacher, target=b.labels, num_items=n),
        "logits", tokens,
    ),
    "top k": (
        lambda b, x, n: losses.top_k_distillation_loss(
            x, b.top_ids, b.top, target=b.labels, num_items=n
        ),
        "logits", tokens,
    ),
    "total variation": (
        lambda b, x, n: losses.distillation_loss(
            x, teacher_log_probs=b.teacher, direction="tvd", target=b.labels, num_items=n
        ),
        "logits", tokens,
    ),
    "hard and soft": (
        lambda b, x, n: losses.hard_soft_distillation_loss(
            x, b.teacher, b.labels, num_items=n
        ).loss,
        "logits", tokens,
    ),
    "hard and soft in one walk": (
        lambda b, x, n: linear_distillation_loss(
            x, b.head, target=b.labels, teacher_ids=b.top_ids, teacher_log_probs=b.top, num_items=n
        ).loss,
        "hidden", tokens,
    ),
    "cosine": (
        lambda b, x, n: losses.cosine_distillation_loss(
            x, b.hidden.flip(-1), target=b.labels, num_items=n
        ),
        "hidden", tokens,
    ),
    "on policy": (
        lambda b, x, n: losses.sampled_reverse_kl(
            x, b.old, b.mask, old_log_probs=b.old - 0.1, epsilon=0.2, num_items=n
        ).loss,
        "policy", tokens,
    ),
    "causal": (
        lambda b, x, n: losses.causal_lm_loss(x, b.ids, attention_mask=b.mask, num_items=n),
        "logits", predicted,
    ),
    "language model": (lm(0.0, False), "logits", predicted),
    "with statistics": (lm(0.0, True), "logits", predicted),
    "penalty": (lm(0.2, False), "logits", predicted),
    "confidence": (
        lambda b, x, n: losses.confidence_penalty_loss(x, b.labels, num_items=n),
        "logits", tokens,
    ),
    "smoothing": (
        lambda b, x, n: losses.LabelSmoothingCrossEntropy()(x, b.labels, num_items=n),
        "logits", tokens,
    ),
    "mlm": (lambda b, x, n: losses.mlm_loss(x, b.labels, num_items=n), "logits", tokens),
    "ppo": (
        lambda b, x, n: losses.ppo_clip_loss(
            x, b.old, b.advantages[:, None], b.mask, num_items=n
        ),
        "policy", tokens,
    ),
    "grpo": (
        lambda b, x, n: losses.grpo_loss(
            x, b.old, b.advantages, b.mask, reference_log_probs=b.old - 0.2, beta=0.1,
            loss_type="grpo", num_items=n,
        ).loss,
        "policy", sequences,
    ),
    "dapo": (
        lambda b, x, n: losses.grpo_loss(x, b.old, b.advantages, b.mask, num_items=n).loss,
        "policy", tokens,
    ),
    "value": (
        lambda b, x, n: losses.value_loss(x, b.old, b.old.flip(-1), b.mask, num_items=n).loss,
        "policy", tokens,
    ),
    "dpo": (
        lambda b, x, n: losses.dpo_loss(
            x.sum(1), b.old.sum(1), b.old.sum(1), x.detach().sum(1), num_items=n
        ).loss,
        "policy", sequences,
    ),
    "simpo": (
        lambda b, x, n: losses.simpo_loss(x.mean(1), b.old.mean(1), num_items=n).loss,
        "policy", sequences,
    ),
    "cpo": (
        lambda b, x, n: losses.cpo_loss(
            x.sum(1), b.old.sum(1), kind="hinge", cpo_alpha=0.0, num_items=n
        ).loss,
        "policy", sequences,
    ),
    "orpo": (
        lambda b, x, n: losses.orpo_loss(
            x.mean(1) - 0.1, b.old.mean(1) - 0.2, b.old.new_zeros(()), num_items=n
        ).loss,
        "policy", sequences,
    ),
    "kto": (
        lambda b, x, n: losses.kto_loss(
            x.sum(1), b.old.sum(1), b.mask[:, 0], kl=b.old.new_tensor(0.3), num_items=n
        ).loss,
        "policy", sequences,
    ),
    "bco": (
        lambda b, x, n: losses.bco_loss(
            x.sum(1), b.old.sum(1), b.mask[:, 0], shift=0.3, num_items=n
        ).loss,
        "policy", sequences,
    ),
    "discriminator": (
        lambda b, x, n: losses.discriminator_loss(
            x, x * 0.5 - 1, kind="hinge", real_mask=b.mask, fake_mask=b.mask, num_items=n
        ).loss,
        "policy", tokens,
    ),
    "generator": (
        lambda b, x, n: losses.generator_loss(x, mask=b.mask, num_items=n).loss,
        "policy", tokens,
    ),
    "policy gradient": (
        lambda b, x, n: losses.policy_gradient_loss(
            x, b.advantages, b.mask, baseline=torch.tensor(0.2), num_items=n
        ).loss,
        "policy", tokens,
    ),
    "unlikelihood": (
        lambda b, x, n: losses.unlikelihood_loss(x, b.ids, labels=b.labels, num_items=n),
        "logits", pairs,
    ),
    "linear unlikelihood": (
        lambda b, x, n: losses.unlikelihood_loss(x, b.ids, b.head, labels=b.labels, num_items=n),
        "hidden", pairs,
    ),
    "generated": (
        lambda b, x, n: losses.sequence_unlikelihood_loss(
            x, losses.repeated_ngrams(b.ids % 2, 2), b.mask, num_items=n
        ),
        "policy", tokens,
    ),
    "next token of several": (
        lambda b, x, n: losses.multi_token_prediction_loss(
            x, b.labels, b.head, offsets=1, num_items=n
        ).loss,
        "hidden", pairs,
    ),
}  # fmt: skip


def run(name: str, batch: Batch, items: Any) -> tuple[torch.Tensor, torch.Tensor]:
    loss, of, _ = LOSSES[name]
    leaf = getattr(batch, of).clone().requires_grad_()
    value = loss(batch, leaf, items)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
@SETTINGS
@hypothesis.given(st.integers(0, 1000), st.sets(st.integers(0, B), max_size=3), st.booleans())
def test_micro_batches_add_up(name, seed, cuts, as_tensor):
    batch = Batch(seed)
    count = LOSSES[name][2](batch)
    hypothesis.assume(count > 0)
    items = torch.tensor(float(count)) if as_tensor else count
    cuts = sorted({0, B, *cuts})
    ends = [*itertools.pairwise(cuts), (2, 2)]  # the last micro-batch is empty
    parts = [run(name, batch.rows(slice(*ends)), items) for ends in ends]
    whole = sum(value for value, _ in parts), torch.cat([grad for _, grad in parts])
    expected = run(name, batch, None)
    assert_close(whole[0], expected[0], 1e-6)
    assert_close(whole[1], expected[1], 1e-6)
