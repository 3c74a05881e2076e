"""A slice of the vocabulary: what this rank's columns are, and whole rows' statistics from them.

Each rank runs the kernels on its own columns, and the ranks' partial states are merged. The merged
state goes into the gradient kernel in place of the rank's own; it asks for nothing else of the
other columns. So the statistics cost one exchange of a few numbers per token, their gradient none.

Nothing here is differentiable itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llmloss_ext import fake
from llmloss_ext.composite import LogitOptions, real_of
from llmloss_ext.partial_state import merge, part_of

__all__ = ["Merged", "Shard", "Wanted", "refuse_second_order"]

LIBRARY = fake.LIBRARY
_ops = torch.ops.llmloss

_ELSEWHERE = -1
"""The kernels' target of a token whose class is a column of another rank."""
_IGNORED = -100
_COMPARISONS = 16 << 20
"""Logits that are compared with the target's at a time: a byte each."""


class Wanted(NamedTuple):
    """What is asked for beside log_prob and lse."""

    entropy: bool = False
    mean_log_prob: bool = False
    rank: bool = False


class Merged(NamedTuple):
    """Statistics of whole rows, one number per token; those not asked for have no elements."""

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor
    mean_log_prob: Tensor
    argmax: Tensor
    rank: Tensor
    state: Tensor
    """(3, N): what `Shard.gradient` needs beside the entropy."""


@dataclass(frozen=True)
class Shard:
    """The classes that this rank's columns stand for.

    Attributes:
        group: The process group that holds all classes between its ranks; None: the default one.
        ranks: How many they are.
        start: The class of the first column.
        columns: How many there are.
        vocab_size: Classes of all ranks. Columns beyond them are padding.
        sum_input_grad: Whether the gradient of hidden states, which each rank knows a part of, is
            summed over the ranks.
    """

    group: Any
    ranks: int
    start: int
    columns: int
    vocab_size: int
    sum_input_grad: bool = True

    @property
    def used(self) -> int:
        """How many of the columns are classes."""
        return min(max(self.vocab_size - self.start, 0), self.columns)

    @property
    def share(self) -> float:
        """Of all classes."""
        return self.used / self.vocab_size

    @property
    def usual_columns(self) -> int:
        """An equal part of the classes: the same number on every rank."""
        return -(-self.vocab_size // self.ranks)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _gather(self, tensor: Tensor) -> Tensor:
        """(ranks, ...)."""
        if self.ranks == 1:
            return tensor.unsqueeze(0)
        every = tensor.new_empty(self.ranks, *tensor.shape)
        dist.all_gather(list(every.unbind(0)), tensor.contiguous(), group=self.group)
        return every

    def localise(self, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Targets as the kernels take them for these columns, and which of them are here.

        What is no class on any rank becomes the number of columns, which is none here either.
        """
        is_class = (target >= 0) & (target < self.vocab_size)
        valid = target != ignore_index
        column = target.long() - self.start
        owned = valid & is_class & (column >= 0) & (column < self.used)
        elsewhere = torch.where(is_class, _ELSEWHERE, self.columns)
        return torch.where(valid, torch.where(owned, column, elsewhere), _IGNORED), owned

    def target_weights(
        self, target: Tensor, weight: Tensor | None, ignore_index: int, real: torch.dtype
    ) -> Tensor:
        """The class weight of each target: 1 without class weights, 0 where ignored."""
        if weight is None:
            return (target != ignore_index).to(real)
        column, owned = self.localise(target, ignore_index)
        return self.sum_(torch.where(owned, weight[torch.where(owned, column, 0)].to(real), 0.0))

    def statistics(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
        wanted: Wanted,
    ) -> Merged:
        """Of whole rows, from this rank's columns and the other ranks' word.

        Args:
            logits: (N, columns) or (B, S, columns).
            target: (N) or (B, S): classes, the same on every rank.
            weight: (columns): class weights.
            logit_scale: 0-d; None: the options' number.
            options: How the logits are read, but for ``vocab_size``.
            wanted: What is asked for.

        Raises:
            ValueError: A class is a column of no rank, or of several. (On CUDA, which would have
                to be waited for, such tokens have nan.)
        """
        real = real_of(logits)
        column, owned = self.localise(target, options.ignore_index)
        here, valid = owned.reshape(-1), (target != options.ignore_index).reshape(-1)
        if self.used:
            log_prob, _, entropy, mean, argmax, _, state = _ops.token_stats(
                logits, column, weight, logit_scale, *self._options(options), *wanted, True
            )
        else:
            nothing = torch.zeros(target.shape, dtype=real, device=logits.device)
            log_prob = entropy = mean = nothing
            argmax = torch.full_like(target, -1, dtype=torch.int64)
            state = nothing.new_zeros(3, nothing.numel())
        mine = part_of(
            log_prob.reshape(-1),
            entropy.reshape(-1) if wanted.entropy else None,
            mean.reshape(-1) if wanted.mean_log_prob else None,
            state,
            here,
            self.share,
        )
        parts = mine.unpack(self._gather(mine.pack().to(real)))
        whole = merge(parts)
        has_one_owner = whole.owners == valid
        if has_one_owner.device.type == "cpu":
            self._check_owners(target, whole.owners, has_one_owner)
        whole = whole._replace(sum_exp=torch.where(has_one_owner, whole.sum_exp, math.nan))

        def column_of(value: Tensor | None) -> Tensor:
            if value is None:
                return state.new_empty(0)
            return torch.where(valid, value, 0.0).to(real)

        log_sum = whole.sum_exp.log()
        entropy_of_all = mean_of_all = None
        if whole.sum_x_exp is not None:
            entropy_of_all = (log_sum - whole.sum_x_exp / whole.sum_exp).clamp_min(0)
        weights = torch.zeros_like(log_sum)
        if whole.sum_weights is not None and whole.sum_weighted is not None:
            mean_of_all = whole.sum_weighted - whole.sum_weights * log_sum
            if self.used:
                weights = whole.sum_weights / self.share  # the kernels' a_i are w_i / used
        indices = (argmax.new_empty(0), argmax.new_empty(0))
        if wanted.rank:
            spoilt = ~valid | whole.sum_exp.isnan()
            found = self._argmax(argmax.reshape(-1), parts.max)
            above = self._rank(logits, column, owned, logit_scale, options.scale)
            indices = (found.masked_fill(spoilt, -1), above.masked_fill(spoilt, self.vocab_size))
        return Merged(
            column_of(whole.target - log_sum),
            column_of(whole.max + log_sum),
            column_of(entropy_of_all),
            column_of(mean_of_all),
            *indices,
            torch.stack([whole.max, whole.sum_exp, weights]).to(real),
        )

    def gradient(
        self,
        grads: Sequence[Tensor | None],
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
        entropy: Tensor,
        state: Tensor,
        with_scale: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of these columns and, this rank's part of it, of ``logit_scale``.

        ``grads`` are those of log_prob, lse, entropy and mean_log_prob, each (N) or None;
        ``entropy`` and ``state`` are as merged, and the other tensors as in `statistics`. With
        ``inplace`` the gradient is written over the logits.
        """
        if not self.used:
            nothing = state.new_zeros(() if with_scale else 0)
            return (logits.zero_() if inplace else torch.zeros_like(logits)), nothing
        *others, grad_mean = grads
        arguments = (
            *others,
            None if grad_mean is None else grad_mean * self.share,
            logits,
            self.localise(target, options.ignore_index)[0],
            weight,
            logit_scale,
            *self._options(options),
            entropy,
            state,
            with_scale,
            True,
        )
        if inplace:
            return logits, _ops.token_stats_backward_(*arguments)
        gradient, scale = _ops.token_stats_backward(*arguments)
        return gradient, scale

    def _options(self, options: LogitOptions) -> LogitOptions:
        return options._replace(ignore_index=_IGNORED, vocab_size=self.used)

    def _check_owners(self, target: Tensor, owners: Tensor, has_one: Tensor) -> None:
        if has_one.all():
            return
        first = int((~has_one).nonzero()[0])
        raise ValueError(
            f"class {int(target.reshape(-1)[first])} is a column of {int(owners[first])} ranks: "
            "the ranks' vocab_start and numbers of columns do not cover the vocabulary once"
        )

    def _argmax(self, argmax: Tensor, maxima: Tensor) -> Tensor:
        """The first class with the largest logit, (N), from each rank's column of its own."""
        classes = self._gather(torch.where(argmax < 0, self.vocab_size, argmax + self.start))
        return torch.where(maxima == maxima.amax(0), classes, self.vocab_size).amin(0)

    def _rank(
        self,
        logits: Tensor,
        column: Tensor,
        owned: Tensor,
        logit_scale: Tensor | None,
        scale: float,
    ) -> Tensor:
        """How many logits of all ranks are above the target's, (N).

        Compared as they are: what is made of logits keeps their order, or with a negative scale
        turns it round.
        """
        index = torch.where(owned, column, 0).unsqueeze(-1)
        at_target = logits.gather(-1, index).squeeze(-1)
        at_target = self.sum_(torch.where(owned, at_target, 0)).unsqueeze(-1)
        sign = logits.new_tensor(scale) if logit_scale is None else logit_scale
        counts = torch.zeros_like(column)
        rows = max(_COMPARISONS // max(logits[:1].numel(), 1), 1)
        for part in range(0, len(logits), rows):
            one = slice(part, part + rows)
            x, y = logits[one, ..., : self.used], at_target[one]
            above = torch.where(sign > 0, x > y, (x < y) & (sign < 0))
            counts[one] = above.sum(-1)
        return self.sum_(counts).reshape(-1)


def refuse_second_order(shard: Shard | None) -> None:
    """Raises a RuntimeError if the vocabulary is spread over ranks."""
    if shard is not None:
        raise RuntimeError(
            "losses over a vocabulary that is spread over ranks have first-order gradients only; "
            "create_graph=True needs all columns on one device"
        )
