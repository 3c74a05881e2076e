"""Losses beside the next token's: on the same micro-batch, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from llmloss_ext.cli.training.config import TrainConfig
from llmloss_ext.cli.training.model import GPT
from llmloss_ext.losses import contrastive_loss, mask_tokens, mlm_loss

_MASK_TOKEN = 0
"""Tekken's <unk>, which no text contains."""


class Auxiliary:
    """The auxiliary terms that a run asks for.

    Attributes:
        weights: Of each term, by name.
    """

    def __init__(self, config: TrainConfig, model: GPT, separator: int) -> None:
        """Prepares those whose weight is not 0."""
        self._model = model
        self._separator = separator
        # A micro-batch's share of the step.
        self.weights = {
            name: weight / config.accumulate
            for name, weight in (("contrastive", config.contrastive), ("mlm", config.mlm))
            if weight
        }

    def terms(self, inputs: Tensor, hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
        """A function for each term.

        Args:
            inputs: Token ids (B, S).
            hidden: Their hidden states (B, S, D).
        """
        every = {
            "contrastive": partial(self._contrastive, hidden),
            "mlm": partial(self._masked, inputs),
        }
        return {name: every[name] for name in self.weights}

    def _contrastive(self, hidden: Tensor) -> Tensor:
        """The two halves of a sequence belong together; those of others do not."""
        middle = hidden.shape[1] // 2
        first, second = hidden[:, :middle].mean(1), hidden[:, middle:].mean(1)
        return contrastive_loss(first, second, symmetric=True)

    def _masked(self, inputs: Tensor) -> Tensor:
        """Hidden tokens, predicted from both sides: attention is not causal here."""
        # Drawn on the host, whose random state a checkpoint keeps.
        masked, labels = mask_tokens(
            inputs.cpu(),
            _MASK_TOKEN,
            self._model.head.weight.shape[0],
            special_tokens=[self._separator],
        )
        hidden = self._model.hidden(masked.to(inputs.device), causal=False)
        return mlm_loss(hidden, labels.to(inputs.device), self._model.head.weight)
