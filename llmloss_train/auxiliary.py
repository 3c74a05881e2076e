"""Losses beside the next token's: on the same micro-batch, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmloss_ext.losses import contrastive_loss, mask_tokens, mlm_loss
from llmloss_ext.training import count_items

from .config import TrainConfig
from .model import GPT

_MASK_TOKEN = 0
"""Tekken's <unk>, which no text contains."""


class Auxiliary:
    """The auxiliary terms that a run asks for: their shares in a step, micro-batch by micro-batch.

    Attributes:
        weights: Of each term, by name.
    """

    def __init__(self, config: TrainConfig, model: GPT, separator: int) -> None:
        """Prepares those whose weight is not 0."""
        self._model = model
        self._separator = separator
        self._micro_batches = config.accumulate
        self._hidden_tokens: list[tuple[Tensor, Tensor]] = []
        self._items = torch.ones((), dtype=torch.int64)
        every = {"contrastive": config.contrastive, "mlm": config.mlm}
        self.weights = {name: weight for name, weight in every.items() if weight}

    def begin_step(self, inputs: list[Tensor]) -> None:
        """Hides tokens in each micro-batch: how many in all, every one of their losses must know.

        Args:
            inputs: Token ids (B, S) of each micro-batch.
        """
        if "mlm" not in self.weights:
            return
        vocab_size = self._model.head.weight.shape[0]
        # Drawn on the host, whose random state a checkpoint keeps.
        self._hidden_tokens = [
            mask_tokens(ids.cpu(), _MASK_TOKEN, vocab_size, special_tokens=[self._separator])
            for ids in inputs
        ]
        self._items = count_items(labels for _, labels in self._hidden_tokens).clamp_min(1)

    def terms(self, micro_batch: int, hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
        """A function for each term, whose values add up to the step's term.

        Args:
            micro_batch: Its number in the step.
            hidden: Its hidden states (B, S, D).
        """
        every = {
            "contrastive": partial(self._contrastive, hidden),
            "mlm": partial(self._masked, micro_batch, hidden.device),
        }
        return {name: every[name] for name in self.weights}

    def _contrastive(self, hidden: Tensor) -> Tensor:
        """The two halves of a sequence belong together; those of others do not."""
        middle = hidden.shape[1] // 2
        first, second = hidden[:, :middle].mean(1), hidden[:, middle:].mean(1)
        return contrastive_loss(first, second, symmetric=True) / self._micro_batches

    def _masked(self, micro_batch: int, device: torch.device) -> Tensor:
        """Hidden tokens, predicted from both sides: attention is not causal here."""
        masked, labels = (t.to(device) for t in self._hidden_tokens[micro_batch])
        hidden = self._model.hidden(masked, causal=False)
        weight = self._model.head.weight
        return mlm_loss(hidden, labels, weight, num_items=self._items.to(device))
