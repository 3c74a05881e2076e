"""Auxiliary losses, on the same micro-batch and with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmloss_ext import linear_cross_entropy
from llmloss_ext.losses import contrastive_loss, mask_tokens, mlm_loss
from llmloss_ext.training import count_items

from .adversary import Adversary
from .config import TrainConfig
from .model import GPT
from .parallel import Layout, local
from .windows import IGNORED

_MASK_TOKEN = 0
"""Tekken's <unk>, which no text contains."""
_FURTHER_WEIGHT = 0.3
"""Of the mean over the further tokens, as in DeepSeek-V3."""


class Auxiliary:
    """The auxiliary terms of a run, computed one micro-batch at a time.

    Attributes:
        weights: The weight of each term, by name.
    """

    def __init__(self, config: TrainConfig, model: GPT, layout: Layout, separator: int) -> None:
        """Selects the terms whose weight is not 0."""
        self._model, self._layout = model, layout
        self._separator = separator
        self._micro_batches = config.accumulate
        self._masked_tokens: list[tuple[Tensor, Tensor]] = []
        self._items = torch.ones((), dtype=torch.int64)
        self._further_labels: list[list[Tensor]] = []
        self._further_items: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._target_items = self._items
        every = {
            "contrastive": config.contrastive,
            "mlm": config.mlm,
            "mtp": _FURTHER_WEIGHT if config.mtp else 0.0,
            "adversarial": config.adversarial,
            "discriminator": 1.0 if config.adversarial else 0.0,
        }
        self.weights = {name: weight for name, weight in every.items() if weight}

    def begin_step(self, step: list[tuple[Tensor, Tensor]]) -> None:
        """Prepares the labels of each micro-batch, and counts them: the divisor of their losses.

        Args:
            step: Token ids and targets (B, S) of each micro-batch on the host, of all ranks: each
                rank draws what one process draws, and takes its part.
        """
        if "mlm" in self.weights:
            self._mask([inputs for inputs, _ in step])
        if "mtp" in self.weights:
            self._look_further([targets for _, targets in step])
        if "adversarial" in self.weights:
            self._targets = [targets[self._layout.rows(len(targets))] for _, targets in step]
            self._target_items = self._layout.divisor(count_items(t for _, t in step))

    def _mask(self, inputs: list[Tensor]) -> None:
        vocab_size = self._model.head.weight.shape[0]
        # Drawn on the host, because a checkpoint stores the random state of the host.
        masked_tokens = [
            mask_tokens(ids, _MASK_TOKEN, vocab_size, special_tokens=[self._separator])
            for ids in inputs
        ]
        self._items = self._layout.divisor(count_items(labels for _, labels in masked_tokens))
        self._masked_tokens = [
            (masked[self._layout.rows(len(masked))], labels[self._layout.rows(len(labels))])
            for masked, labels in masked_tokens
        ]

    def _look_further(self, targets: list[Tensor]) -> None:
        offsets = range(1, len(self._model.further) + 1)
        labels = [[further_targets(t, offset) for t in targets] for offset in offsets]
        self._further_items = [self._layout.divisor(count_items(each)) for each in labels]
        self._further_labels = [[t[self._layout.rows(len(t))] for t in each] for each in labels]

    def terms(self, micro_batch: int, hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
        """A function for each term. Its values for all micro-batches add up to the step's term.

        Args:
            micro_batch: The index of the micro-batch in the step.
            hidden: Its hidden states (B, S, D).
        """
        every: dict[str, Callable[[], Tensor]] = {
            "contrastive": partial(self._contrastive, hidden),
            "mlm": partial(self._masked, micro_batch, hidden.device),
            "mtp": partial(self._further, micro_batch, hidden),
        }
        if "adversarial" in self.weights:
            device = hidden.device
            targets, items = self._targets[micro_batch].to(device), self._target_items.to(device)
            adversary = Adversary(self._model, hidden, targets, items)
            every["adversarial"] = adversary.of_model
            every["discriminator"] = adversary.of_discriminator
        return {name: every[name] for name in self.weights}

    def _contrastive(self, hidden: Tensor) -> Tensor:
        """The two halves of a sequence are a positive pair, all other halves are negatives."""
        middle, hidden = hidden.shape[1] // 2, local(hidden)
        halves = (hidden[:, :middle].mean(1), hidden[:, middle:].mean(1))
        first, second = map(self._layout.gather, halves)
        return contrastive_loss(first, second, symmetric=True) / self._micro_batches

    def _masked(self, micro_batch: int, device: torch.device) -> Tensor:
        """Predicts the masked tokens from both sides: attention is not causal here."""
        masked, labels = (t.to(device) for t in self._masked_tokens[micro_batch])
        hidden = self._model.hidden(masked, causal=False)
        weight = self._model.head.weight
        return local(mlm_loss(hidden, labels, weight, num_items=self._items.to(device)))

    def _further(self, micro_batch: int, hidden: Tensor) -> Tensor:
        """The mean over the offsets of the cross entropy of the token that lies so far ahead."""
        weight, losses = self._model.head.weight, []
        for module, labels, items in zip(
            self._model.further, self._further_labels, self._further_items, strict=True
        ):
            targets = labels[micro_batch].to(hidden.device)
            loss = linear_cross_entropy(
                module(hidden), weight, targets, ignore_index=IGNORED,
                num_items=items.to(hidden.device),
            )  # fmt: skip
            losses.append(local(loss))
        return torch.stack(losses).mean()


def further_targets(targets: Tensor, offset: int) -> Tensor:
    """The targets (B, S) of so many tokens further on, in the same document.

    Ignored where a document ends before: a target that is ignored begins the next one.
    """
    valid = targets != IGNORED
    result = torch.full_like(targets, IGNORED)
    here, ahead = slice(None, -offset), slice(offset, None)
    unbroken = torch.stack([valid.roll(-i, -1) for i in range(offset + 1)]).all(0)
    result[:, here] = torch.where(unbroken[:, here], targets[:, ahead], IGNORED)
    return result
