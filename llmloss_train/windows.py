"""Batches: windows of a token sequence, and the order in which training visits them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmloss_ext.cli import UserError

IGNORED = -100
_VALIDATION_SHARE = 0.05
_VALIDATION_TOKENS = 8192


class Windows:
    """Consecutive windows of ``seq_len`` inputs, each with its next tokens as targets.

    Every token but the first is a target once. Two kinds of targets are ignored: the first token of
    a document, which has no context, and the padding of the last window. So the number of valid
    tokens varies between batches, as it does in practice.
    """

    def __init__(self, ids: Tensor, seq_len: int, separator: int) -> None:
        """Cuts ``ids`` (tokens,) into windows; ``separator`` ends documents and pads."""
        self._count = math.ceil((len(ids) - 1) / seq_len)
        padding = self._count * seq_len + 1 - len(ids)
        ids = torch.nn.functional.pad(ids.long(), (0, padding), value=separator)
        self._inputs = ids[:-1].view(self._count, seq_len)
        targets = ids[1:].clone()
        targets[ids[:-1] == separator] = IGNORED
        targets[len(targets) - padding :] = IGNORED
        self._targets = targets.view(self._count, seq_len)

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (len(indices), seq_len), int64."""
        rows = list(indices)
        return self._inputs[rows], self._targets[rows]


class Order:
    """A random order of the windows, new in each epoch and determined by the seed.

    To continue exactly, a run only needs the position: the number of windows visited so far.
    """

    def __init__(self, count: int, seed: int) -> None:
        """Orders ``count`` windows."""
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, position: int, size: int) -> list[int]:
        """The ``size`` windows from ``position`` on, across epochs if necessary."""
        return [self._at(position + i) for i in range(size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(self._count, generator=generator).tolist()
            self._epoch = epoch
        return self._order[place]


def split(ids: Tensor, seq_len: int, separator: int) -> tuple[Windows, Windows]:
    """Splits a text into windows for training and for validation, which gets the end of the text.

    Raises:
        UserError: The text is too short for a window of each.
    """
    if len(ids) < 2 * (seq_len + 1):
        raise UserError(
            f"the text is too short: {len(ids)} tokens, but --seq-len {seq_len} needs at least "
            f"{2 * (seq_len + 1)}"
        )
    held_out = min(_VALIDATION_TOKENS, int(_VALIDATION_SHARE * len(ids)))
    cut = len(ids) - max(held_out, seq_len + 1)
    return (
        Windows(ids[:cut], seq_len, separator),
        Windows(ids[cut:], seq_len, separator),
    )
