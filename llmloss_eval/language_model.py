"""A model that can be evaluated, whatever it is made of."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
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
        return self.known(self.prefix + self.encode(text))

    def known(self, ids: Sequence[int]) -> Tensor:
        """Token ids as a tensor of int64; raises a `UserError` if one is outside the vocabulary."""
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"{self.name}: the tokenizer makes the id {wrong}, outside of the model's "
                f"vocabulary of {self.vocab_size:,}"
            )
        return torch.tensor(ids, dtype=torch.int64)


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
