"""Chunks of whole groups of tokens, such as the two sequences of a pair.

A loss of sequences knows the gradient of a token when it has seen all of the token's group. Where a
chunk holds whole groups, that is before its logits are gone: nothing is computed again.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.rows import Rows, take
from ..statistics import FloatStats
from .planning import group_cuts

__all__ = ["GroupLimit", "Groups", "Part"]


class Groups(NamedTuple):
    """How the N tokens lie: (members, number, length). A group has a sequence of each member."""

    members: int
    number: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a group."""
        return self.members * self.length

    def sizes(self, counts: Tensor) -> list[int]:
        """How many tokens of each group count; ``counts`` (N) bool. Waits for the device."""
        sizes: list[int] = counts.view(self).sum((0, 2)).tolist()
        return sizes

    def of_all(self, stats: FloatStats) -> FloatStats:
        """The statistics of all tokens, (members, number, length) each."""
        return FloatStats(*(None if x is None else x.reshape(self) for x in stats))


class Part(NamedTuple):
    """Some groups, and their tokens."""

    groups: slice
    rows: Rows
    """Of the N tokens: the groups' that are not dropped."""
    place: Tensor | None
    """Which of the groups' tokens these are; None: all."""
    shape: Groups
    """Of these groups alone."""

    def spread(self, stats: FloatStats) -> FloatStats:
        """Statistics of the rows, (members, groups, length) each; dropped tokens have 0."""
        if self.place is None:
            return self.shape.of_all(stats)
        size = self.shape.tokens * self.shape.number
        at = (self.place,)
        whole = (None if x is None else x.new_zeros(size).index_put(at, x) for x in stats)
        return self.shape.of_all(FloatStats(*whole))


class GroupLimit(NamedTuple):
    """How many tokens a chunk of whole groups has; one group may have more."""

    groups: Groups
    tokens: int
    sizes: list[int] | None = None
    """Tokens of each group that are not ignored, if the others are to be dropped."""

    def parts(self, counts: Tensor) -> list[Part]:
        """The parts: neighbours together, in chunks of about as many tokens each.

        ``counts`` (N) bool: tokens that are not ignored.
        """
        cuts = group_cuts(self.sizes or [self.groups.tokens] * self.groups.number, self.tokens)
        return [self._part(slice(*ends), counts) for ends in itertools.pairwise(cuts)]

    def _part(self, groups: slice, counts: Tensor) -> Part:
        members, number, length = self.groups
        shape = Groups(members, groups.stop - groups.start, length)
        size = shape.tokens * shape.number
        rows: Rows = slice(groups.start * length, groups.start * length + size)
        if members > 1 and shape.number < number:
            every = torch.arange(len(counts), device=counts.device)
            rows = every.view(self.groups)[:, groups].reshape(-1)
        if self.sizes is not None:
            place = take(counts, rows).nonzero().squeeze(1)
            if place.numel() < size:
                kept = place + rows.start if isinstance(rows, slice) else rows[place]
                return Part(groups, kept, place, shape)
        return Part(groups, rows, None, shape)
