"""A slice of the vocabulary: what this rank's columns are, and whole rows' statistics from them.

Each rank runs the kernels on its own columns, and says what came out. The same merge that joins
threads and blocks joins the ranks (csrc/core/shards.h), and the merged state goes into the gradient
kernel in place of the rank's own: it asks for nothing else of the other columns. So the statistics
cost one exchange of nine numbers per token, and their gradient none.

Nothing here is differentiable itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llmloss_ext import fake
from llmloss_ext.composite import LogitOptions, real_of

__all__ = ["Merged", "Shard", "Wanted", "refuse_second_order"]

LIBRARY = fake.LIBRARY
_ops = torch.ops.llmloss

_ELSEWHERE = -1
"""The kernels' target of a token whose class is a column of another rank."""
_IGNORED = -100
_FIELDS = 9
"""What a rank says of a row: ShardField in csrc/core/shards.h."""
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
            ValueError: The ranks' columns are not as many as the classes, or the target is a column
                of none or of several. (On CUDA, which would have to be waited for: nan.)
        """
        column, owned = self.localise(target, options.ignore_index)
        classes = target.reshape(-1)
        said = self._say(logits, column, owned, weight, logit_scale, options, wanted)
        log_prob, lse, entropy, mean, argmax, state, owners = _ops.merge_shards(
            self._gather(said), classes.contiguous(), options.ignore_index, self.vocab_size
        )
        if owners.device.type == "cpu":
            self._check_owners(classes, owners, options.ignore_index)
        nothing, rank = argmax.new_empty(0), argmax
        if wanted.rank:
            # A row without statistics has no rank either: ignored, or spoilt by nan or inf.
            above = self._rank(logits, column, owned, logit_scale, options.scale)
            rank = torch.where(argmax < 0, self.vocab_size, above)
        return Merged(
            log_prob,
            lse,
            entropy if wanted.entropy else log_prob.new_empty(0),
            mean if wanted.mean_log_prob else log_prob.new_empty(0),
            argmax if wanted.rank else nothing,
            rank if wanted.rank else nothing,
            state,
        )

    def _say(
        self,
        logits: Tensor,
        column: Tensor,
        owned: Tensor,
        weight: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
        wanted: Wanted,
    ) -> Tensor:
        """What this rank tells the others of its columns, (fields, N)."""
        real, rows = real_of(logits), column.numel()
        said = torch.zeros(_FIELDS, rows, dtype=real, device=logits.device)
        said[7] = -1
        said[8] = self.used
        if not self.used:
            return said
        log_prob, _, entropy, mean, argmax, _, state = _ops.token_stats(
            logits, column, weight, logit_scale, *self._options(options), *wanted, self.vocab_size
        )
        said[0] = log_prob.reshape(-1)
        if wanted.entropy:
            said[1] = entropy.reshape(-1)
        if wanted.mean_log_prob:
            said[2] = mean.reshape(-1)
        said[3:6] = state
        said[6] = owned.reshape(-1)
        if wanted.rank:
            said[7] = torch.where(argmax < 0, -1, argmax + self.start).reshape(-1)
        return said

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
        arguments = (
            *grads,
            logits,
            self.localise(target, options.ignore_index)[0],
            weight,
            logit_scale,
            *self._options(options),
            entropy,
            state,
            with_scale,
            self.vocab_size,
        )
        if inplace:
            return logits, _ops.token_stats_backward_(*arguments)
        gradient, scale = _ops.token_stats_backward(*arguments)
        return gradient, scale

    def _options(self, options: LogitOptions) -> LogitOptions:
        return options._replace(ignore_index=_IGNORED, vocab_size=self.used)

    def _check_owners(self, target: Tensor, owners: Tensor, ignore_index: int) -> None:
        has_one = (owners == 1) | ((target == ignore_index) & (owners >= 0))
        if has_one.all():
            return
        first = int((~has_one).nonzero()[0])
        what = f"class {int(target[first])} is a column of {int(owners[first])} ranks"
        if owners[first] < 0:
            what = f"the ranks' columns are not {self.vocab_size} classes"
        raise ValueError(
            f"{what}: their vocab_start and numbers of columns do not cover the vocabulary once"
        )

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
