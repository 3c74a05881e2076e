"""Auxiliary losses, on the same micro-batch and with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmloss_ext.losses import contrastive_loss, mask_tokens, mlm_loss
from llmloss_ext.training import count_items

from .config import TrainConfig
from .model import GPT
from .parallel import Layout, local

_MASK_TOKEN = 0
"""Tekken's <unk>, which no text contains."""


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
        every = {"contrastive": config.contrastive, "mlm": config.mlm}
        self.weights = {name: weight for name, weight in every.items() if weight}

    def begin_step(self, inputs: list[Tensor]) -> None:
        """Masks tokens in each micro-batch, and counts them: the divisor of all their losses.

        Args:
            inputs: Token ids (B, S) of each micro-batch on the host, of all ranks: each rank draws
                what one process draws, and takes its part.
        """
        if "mlm" not in self.weights:
            return
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

    def terms(self, micro_batch: int, hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
        """A function for each term. Its values for all micro-batches add up to the step's term.

        Args:
            micro_batch: The index of the micro-batch in the step.
            hidden: Its hidden states (B, S, D).
        """
        every = {
            "contrastive": partial(self._contrastive, hidden),
            "mlm": partial(self._masked, micro_batch, hidden.device),
        }
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
