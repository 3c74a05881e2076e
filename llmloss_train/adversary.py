"""The language model against a discriminator: its sampled tokens beside those of the text.

At each position the discriminator reads the hidden state and a token, which is the text's next one
or one that the model has sampled, and scores how real it looks. The model's samples have a gradient
by Gumbel-softmax (`llmloss_ext.losses.linear_gumbel_embeddings`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call

from llmloss_ext.losses import (
    GumbelEmbeddings,
    discriminator_loss,
    generator_loss,
    linear_gumbel_embeddings,
)

from .model import GPT, Discriminator
from .windows import IGNORED


class Adversary:
    """The samples of one micro-batch, and the losses of both players."""

    def __init__(self, model: GPT, hidden: Tensor, targets: Tensor, num_items: Tensor) -> None:
        """Samples nothing yet.

        Args:
            model: With a discriminator.
            hidden: Its hidden states (B, S, D).
            targets: (B, S): the next tokens, `IGNORED` where there is none.
            num_items: The number of next tokens of all micro-batches, 0-d.
        """
        assert model.discriminator is not None
        self._judge: Discriminator = model.discriminator
        self._hidden, self._head = hidden, model.head.weight
        # A table to read from: it learns nothing here.
        self._table = model.embedding.weight.detach()
        self._targets, self._items = targets, num_items
        self._valid = targets != IGNORED

    @cached_property
    def _sampled(self) -> GumbelEmbeddings:
        # The seed is drawn on the host, because a checkpoint stores the random state of the host.
        seed = int(torch.randint(2**62, ()))
        return linear_gumbel_embeddings(
            self._hidden, self._head, self._table, mask=self._valid,
            generator=torch.Generator(self._hidden.device).manual_seed(seed),
        )  # fmt: skip

    def of_model(self) -> Tensor:
        """What the model minimises; the discriminator's weights are constants."""
        constants = {name: p.detach() for name, p in self._judge.named_parameters()}
        scores = functional_call(
            self._judge, constants, (self._hidden.detach(), self._sampled.embeddings)
        )
        return generator_loss(scores, mask=self._valid, num_items=self._items).loss

    def of_discriminator(self) -> Tensor:
        """What the discriminator minimises; the model's hidden states and samples are constants."""
        real = self._table[torch.where(self._valid, self._targets, 0)]
        real_scores, fake_scores = (
            self._judge(self._hidden.detach(), tokens.detach())
            for tokens in (real, self._sampled.embeddings)
        )
        return discriminator_loss(
            real_scores, fake_scores, real_mask=self._valid, fake_mask=self._valid,
            num_items=self._items,
        ).loss  # fmt: skip
