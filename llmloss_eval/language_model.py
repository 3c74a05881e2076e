"""A model that can be evaluated, whatever it is made of."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmloss_ext.cli import UserError
from llmloss_ext.integrations.scoring import TokenScores

Scorer = Callable[[Tensor, Tensor], TokenScores]


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and how it scores tokens.

    Attributes:
        name: As given on the command line.
        module: Where the weights are.
        score: The scores of targets (B, S) by token ids (B, S); targets of -100 are left out.
        encode: The token ids of a text, without any that the tokenizer adds.
        prefix: What the tokenizer puts before a text.
        separator: The token that stands before an empty context.
        context: The tokens that the model can read at once, if that is known.
        vocab_size: V.
        from_hidden: Whether no logits are made.
    """

    name: str
    module: nn.Module
    score: Scorer
    encode: Callable[[str], list[int]]
    context: int | None
    vocab_size: int
    from_hidden: bool
    prefix: list[int] = field(default_factory=list)
    separator: int | None = None

    def tokens(self, text: str) -> Tensor:
        """The token ids of a text, with the prefix; (tokens,) int64.

        Raises:
            UserError: An id is outside the vocabulary.
        """
        ids = torch.tensor(self.prefix + self.encode(text), dtype=torch.int64)
        self.require_known(ids)
        return ids

    def require_known(self, ids: Tensor) -> None:
        """Raises a `UserError` if an id is outside the vocabulary."""
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise UserError(
                f"{self.name}: the tokenizer makes the id {int(wrong[0])}, outside of the model's "
                f"vocabulary of {self.vocab_size:,}"
            )

    def require_causal(self, ids: Tensor) -> None:
        """Raises a `UserError` if a token changes how one before it is predicted.

        Args:
            ids: Some token ids (S,) on the model's device.
        """
        if len(ids) < 3:
            return
        inputs = ids[:-1].unsqueeze(0)
        targets = torch.full_like(inputs, -100)
        targets[:, :-1] = inputs[:, 1:]
        targets[:, -2] = -100  # whose target is the token that changes
        other = inputs.clone()
        other[:, -1] = (other[:, -1] + 1) % self.vocab_size
        one, two = (self.score(x, targets).log_prob for x in (inputs, other))
        if not torch.allclose(one, two, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise UserError(
                f"{self.name} is no causal language model in evaluation mode: its predictions "
                "depend on later tokens, or on chance"
            )


def digest_of(module: nn.Module) -> str:
    """A hash of the names and the values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in sorted(named.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        size = values.numel() * values.element_size()
        if size:
            digest.update((ctypes.c_char * size).from_address(values.data_ptr()))
    return digest.hexdigest()


def with_dtype(module: Any, dtype: str) -> Any:
    """The module in evaluation mode, its floats in a dtype of `config.DTYPES`."""
    if dtype != "auto":
        module = module.to(getattr(torch, dtype))
    return module.eval().requires_grad_(False)
