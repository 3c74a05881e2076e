"""What the model is called with: windows of a text, or a choice after its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmloss_ext.cli import UserError

from .inputs import Question
from .language_model import LanguageModel

_IGNORED = -100


class Piece(NamedTuple):
    """Token ids (S,), and the first of them that is scored: all before it are context."""

    ids: Tensor
    first: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first


def windows(ids: Tensor, window: int, stride: int) -> list[Piece]:
    """Windows that slide over a text, as in Hugging Face's guide to perplexity.

    Each token but the first, which nothing predicts, is scored once: in the first window that
    reaches it, after at least ``window - stride`` tokens of context (fewer at the beginning).

    Args:
        ids: (tokens,).
        window: Tokens of a window.
        stride: How far it moves, below ``window``.
    """
    pieces, scored = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end > scored:
            pieces.append(Piece(ids[begin:end], scored - begin))
        scored = end
        if end == len(ids):
            break
    return pieces


def choices(question: Question, model: LanguageModel, window: int) -> list[Piece]:
    """Each choice after the context, of which the end is kept if both are too long.

    Blanks at the end of the context go to the choice, as tokenizers want it, and both are encoded
    together, as in EleutherAI's evaluation harness. An empty context is the token that begins or
    ends documents.

    Raises:
        UserError: A choice has no token of its own, or does not fit into the window; or the context
            is empty, and the model has no such token.
    """
    blanks = len(question.context) - len(question.context.rstrip())
    context = question.context[: len(question.context) - blanks]
    between = question.context[len(context) :]
    of_context = model.encode(context) if context else []
    before = model.prefix + of_context
    if not before and model.separator is not None:
        before = [model.separator]
    if not before:
        raise UserError(
            f"line {question.line}: the context is empty, and the tokenizer has no token that "
            "begins a text"
        )
    pieces = []
    for number, choice in enumerate(question.choices):
        own = model.encode(context + between + choice)[len(of_context) :]
        if not 0 < len(own) < window:
            why = f"has {len(own)} tokens" if own else "adds no token"
            raise UserError(
                f"line {question.line}: choice {number} {why}; it must have from 1 to "
                f"{window - 1}, below the window"
            )
        ids = model.known((before + own)[-window:])
        pieces.append(Piece(ids, len(ids) - len(own)))
    return pieces


def batch_of(pieces: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, S) of some pieces, int64.

    Padding stands at the end, where nothing that is scored sees it.
    """
    size = max(len(piece.ids) for piece in pieces) - 1
    inputs = torch.zeros(len(pieces), size, dtype=torch.int64)
    targets = torch.full((len(pieces), size), _IGNORED)
    for row, (ids, first) in enumerate(pieces):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, first - 1 : len(ids) - 1] = ids[first:]
    return inputs.to(device), targets.to(device)
