"""Vocabulary parallelism: this rank's columns, and the exchange that makes whole rows of them.

Each rank runs the kernels on its own columns and exchanges its statistics of each row with the
other ranks (`csrc/core/shards.h`): the merge that joins threads and blocks also joins ranks. The
merged state goes into the gradient kernel in place of the rank's own; that kernel needs nothing
else of the other columns. So the statistics cost one exchange of a few numbers per token, and
their gradient none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from . import composite
from .composite import real_of
from .ops.derivatives import in_transform, must_be_opaque
from .ops.library import STATE, fields, kernels
from .ops.rows import Labels
from .options import LogitOptions, LossOptions, as_integer, pack
from .statistics import FloatStats, RowStats, asked, is_asked

__all__ = ["Shard", "ShardedColumns", "ShardedRows", "process_group", "refuse_second_order"]

_ELSEWHERE = -1
"""The kernels' target of a token whose class is a column of another rank."""
_IGNORED = -100
_FIELD = {name: row for row, name in enumerate(fields("shard"))}
"""Where each number that a rank exchanges stands."""
_COMPARISONS = 16 << 20
"""Logits that are compared with the target's at a time: a byte each."""


@dataclass(frozen=True)
class Shard:
    """Says that each rank of a process group holds some of the vocabulary's columns.

    Tensor parallelism's output layer leaves each rank the logits, or the rows of the weight, of its
    own classes. Given ``shard=Shard(group)``, the losses take these as ``input`` or
    ``linear_weight`` (and ``weight`` and ``linear_bias`` of the same classes), targets of the whole
    vocabulary, and the same hidden states and targets on every rank; every rank returns the same
    result. Per token, the ranks exchange a few numbers in the forward pass (once more for class
    weights, twice for ``with_rank``). Gradients of hidden states and of ``logit_scale`` are summed
    over the ranks.

    All ranks must make the same calls; one that raises leaves the others waiting for the group's
    timeout. At most 2^24 classes, class indices as targets, first-order gradients only (no
    ``create_graph``, no `torch.func`). A compiled graph holds the calls whole, but for ``inplace``.

    Attributes:
        group: The process group, or a `DeviceMesh` of one dimension; None: the default one.
        vocab_start: The class of this rank's first column. By default all ranks have equally many
            columns, and rank r holds the classes from r * columns on; ``vocab_size`` then tells of
            padding at the end, and finds logits that were gathered already. Other divisions need
            ``vocab_size`` too.
        sum_input_grad: Whether hidden states get their whole gradient, summed over the ranks. With
            False they get this rank's part, for a layer below that sums or scatters it itself (as
            sequence parallelism does).
    """

    group: Any = None
    vocab_start: int | None = None
    sum_input_grad: bool = True

    def columns(self, count: int, target: Tensor, vocab_size: int | None) -> ShardedColumns:
        """The classes of ``count`` columns on this rank.

        Raises:
            RuntimeError: There is no process group, or the call asks for what shards do not have.
            ValueError: The columns do not fit the vocabulary.
        """
        if target.is_floating_point():
            raise RuntimeError(
                "vocabulary-parallel losses take class indices (int64 or int32), not probabilities"
            )
        if in_transform():
            raise RuntimeError("vocabulary-parallel losses do not work under torch.func transforms")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "vocabulary-parallel losses need torch.distributed: call "
                "torch.distributed.init_process_group first"
            )
        if count < 1:
            raise ValueError("each rank needs at least one column, if only of padding")
        group = process_group(self.group)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise RuntimeError("this process is not in the group")
        if self.vocab_start is None:
            start, most = rank * count, ranks * count
            size = most if vocab_size is None else as_integer("vocab_size", vocab_size)
            if not 1 <= size <= most:
                raise ValueError(
                    f"vocab_size must be in [1, {most}], the columns of {ranks} ranks, got {size}"
                )
        elif vocab_size is None:
            raise ValueError("vocab_start needs vocab_size: the ranks' columns may differ")
        else:
            start = as_integer("vocab_start", self.vocab_start)
            size = as_integer("vocab_size", vocab_size)
            if start < 0 or size < 1:
                raise ValueError(
                    f"expected vocab_start >= 0 and vocab_size >= 1, got {start} and {size}"
                )
        return ShardedColumns(group, ranks, start, count, size, self.sum_input_grad)


@dataclass(frozen=True)
class ShardedColumns:
    """The classes that this rank's columns stand for.

    Attributes:
        group: The process group whose ranks hold all classes between them; None: the default one.
        ranks: Their number.
        start: The class of the first column.
        count: The number of columns.
        vocab_size: Classes of all ranks. Columns beyond them are padding.
        sum_input_grad: Whether the gradient of hidden states is summed over the ranks.
    """

    group: Any
    ranks: int
    start: int
    count: int
    vocab_size: int
    sum_input_grad: bool = True

    def pack(self) -> tuple[tuple[int, ...], str]:
        """As operators take it: integers, and the name of the group."""
        group: Any = dist.group.WORLD if self.group is None else self.group
        numbers = (self.ranks, self.start, self.count, self.vocab_size, int(self.sum_input_grad))
        return numbers, group.group_name

    @classmethod
    def unpack(cls, numbers: Sequence[int], group: str) -> ShardedColumns:
        """What was packed."""
        ranks, start, count, vocab_size, sum_input_grad = numbers
        found = distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
        return cls(found, ranks, start, count, vocab_size, bool(sum_input_grad))

    @property
    def used(self) -> int:
        """How many of the columns are classes."""
        return min(max(self.vocab_size - self.start, 0), self.count)

    @property
    def usual_count(self) -> int:
        """An equal part of the classes: the same number on every rank."""
        return -(-self.vocab_size // self.ranks)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(ranks, ...)."""
        if self.ranks == 1:
            return tensor.unsqueeze(0)
        every = tensor.new_empty(self.ranks, *tensor.shape)
        dist.all_gather(list(every.unbind(0)), tensor.contiguous(), group=self.group)
        return every

    def localise(self, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Targets as the kernels take them for these columns, and which of them are here.

        A target that is no class at all becomes the number of columns: out of range here, too.
        """
        is_class = (target >= 0) & (target < self.vocab_size)
        valid = target != ignore_index
        column = target.long() - self.start
        owned = valid & is_class & (column >= 0) & (column < self.used)
        elsewhere = torch.where(is_class, _ELSEWHERE, self.count)
        return torch.where(valid, torch.where(owned, column, elsewhere), _IGNORED), owned

    def target_weights(
        self, target: Tensor, weight: Tensor | None, ignore_index: int, real: torch.dtype
    ) -> Tensor:
        """The class weight of each target: 1 without class weights, 0 where ignored."""
        if weight is None:
            return (target != ignore_index).to(real)
        column, owned = self.localise(target, ignore_index)
        mine = torch.where(owned, weight[torch.where(owned, column, 0)].to(real), 0.0)
        return self.all_reduce_(mine)

    def must_check_targets(self, target: Tensor) -> bool:
        """Whether targets are looked at: on CUDA that has to wait for the device."""
        asked = target.device.type == "cpu" or os.environ.get("LLMLOSS_CHECK_TARGETS") == "1"
        return asked and not must_be_opaque(target)


class ShardedRows:
    """`llmloss_ext.ops.rows.LocalRows` where the rows' columns are spread over ranks."""

    def __init__(
        self,
        shard: ShardedColumns,
        weight: Tensor | None,
        logit_scale: Tensor | None,
        options: LogitOptions,
    ) -> None:
        """weight: class weights of this rank's columns. options: vocab_size is not read."""
        self.shard, self.weight, self.logit_scale = shard, weight, logit_scale
        self.ignore_index = options.ignore_index
        self.scale = options.scale
        self.options = options._replace(
            ignore_index=_IGNORED, vocab_size=shard.used, classes=shard.vocab_size
        )

    def labels(self, input: Tensor, target: Tensor, token_weight: Tensor | None) -> Labels:
        """With the class weights of the targets, and token weights that are 0 where ignored."""
        w_y = self.shard.target_weights(target, self.weight, self.ignore_index, real_of(input))
        tokens = composite.row_weights(token_weight, target, self.ignore_index, w_y.dtype)
        return Labels(target, tokens, w_y)

    def denominator(self, labels: Labels, loss: LossOptions, real: torch.dtype) -> Tensor:
        """What the mean divides by: `llmloss_ext.composite.denominator`."""
        assert labels.target_weight is not None
        assert labels.token_weight is not None
        return composite.denominator(labels.target_weight, labels.token_weight, loss)

    def statistics(self, logits: Tensor, target: Tensor, wanted: int) -> RowStats:
        """Of whole rows, (N) each, from this rank's columns and what the ranks exchange.

        Args:
            logits: (N, columns) or (B, S, columns).
            target: (N) or (B, S): classes, the same on every rank.
            wanted: `llmloss_ext.statistics.asked`.

        Raises:
            ValueError: The ranks' columns are not as many as the classes, or the target is a column
                of none or of several. (On CUDA, which would have to be waited for: nan.)
        """
        column, owned = self.shard.localise(target, self.ignore_index)
        classes = target.reshape(-1).contiguous()
        needed = wanted | asked(["argmax"]) if is_asked(wanted, "rank") else wanted
        shard_stats = self.shard.all_gather(self._shard_stats(logits, column, owned, needed))
        *merged, owners = kernels.merge_shards(
            shard_stats, classes, self.ignore_index, self.shard.vocab_size
        )
        if owners.device.type == "cpu":
            self._check_owners(classes, owners)
        whole = RowStats.of(merged)
        every = whole.floats.only(wanted)
        floats = FloatStats(*(whole.state.new_empty(0) if x is None else x for x in every))
        nothing, rank = whole.argmax.new_empty(0), whole.argmax.new_empty(0)
        if is_asked(wanted, "rank"):
            # A row without statistics has no rank either: it is ignored, or holds nan or inf.
            before = self._rank(logits, target, column, owned)
            # A softcap may make logits equal: the kernels' argmax has the last word.
            before = torch.where(whole.argmax == classes, 0, before.clamp_min(1))
            rank = torch.where(whole.argmax < 0, self.shard.vocab_size, before)
        argmax = whole.argmax if is_asked(wanted, "argmax") else nothing
        return RowStats(whole.state, floats, argmax, rank)

    def _shard_stats(self, logits: Tensor, column: Tensor, owned: Tensor, wanted: int) -> Tensor:
        """This rank's statistics of its columns, (fields, N): what the ranks exchange."""
        real, rows = real_of(logits), column.numel()
        shard_stats = torch.zeros(len(_FIELD), rows, dtype=real, device=logits.device)

        def write(name: str, values: Tensor | int) -> None:
            shard_stats[_FIELD[name]] = values.reshape(-1) if isinstance(values, Tensor) else values

        write("argmax", -1)
        write("columns", self.shard.used)
        if not self.shard.used:
            return shard_stats
        # Where the target is here, the merge takes its term out of the sum: log_prob says how.
        wanted |= asked(("log_prob",))
        mine = RowStats.of(
            kernels.token_stats(
                logits, column, self.weight, self.logit_scale, *pack(self.options), wanted
            )
        )
        for name in FloatStats._fields:
            if is_asked(wanted, name):
                write(name, getattr(mine.floats, name))
        for name, values in zip(STATE, mine.state, strict=True):
            write(name, values)
        write("has_target", owned)
        if is_asked(wanted, "argmax"):
            write("argmax", torch.where(mine.argmax < 0, -1, mine.argmax + self.shard.start))
        return shard_stats

    def gradient(
        self,
        grads: FloatStats,
        logits: Tensor,
        target: Tensor,
        stats: list[Tensor],
        state: Tensor,
        with_scale: bool,
        *,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of these columns, and this rank's part of that of logit_scale.

        ``grads`` are those of the statistics, (N) each; ``stats`` and ``state`` are merged.
        """
        if not self.shard.used:
            zeros = logits.zero_() if inplace else torch.zeros_like(logits)
            return zeros, state.new_zeros(() if with_scale else 0)
        column, _ = self.shard.localise(target, self.ignore_index)
        tensors = (logits, column, self.weight, self.logit_scale)
        arguments = (grads, *tensors, *pack(self.options), stats, state, with_scale)
        if inplace:
            return logits, kernels.token_stats_backward_(*arguments)
        gradient, scale = kernels.token_stats_backward(*arguments)
        return gradient, scale

    def losses(self, logits: Tensor, labels: Labels, divisor: Tensor, loss: LossOptions) -> Tensor:
        """The sum of the losses, divided by ``divisor``: `llmloss_ext.composite.denominator`."""
        stats = self.statistics(logits, labels.target, asked(loss.statistics()))
        items, z_factor = divisor
        rows = composite.losses_of(
            stats.floats, labels.target_weight, labels.token_weight, loss, z_factor
        )
        return composite.total(rows) / items

    def losses_and_gradient_(
        self, logits: Tensor, labels: Labels, divisor: Tensor, loss: LossOptions, with_scale: bool
    ) -> tuple[Tensor, Tensor]:
        """`losses`, with the gradient over the logits; and this rank's part of the scale's."""
        assert labels.target_weight is not None
        assert labels.token_weight is not None
        stats = self.statistics(logits, labels.target, asked(loss.statistics()))
        items, z_factor = divisor
        rows, grads = composite.losses_and_gradients(
            stats.floats, labels.target_weight, labels.token_weight, 1 / items, loss, z_factor
        )
        kept = stats.floats.for_backward()
        _, scale = self.gradient(
            grads, logits, labels.target, kept, stats.state, with_scale, inplace=True
        )
        return composite.total(rows) / items, scale

    def sum_over_ranks(self, grad_hidden: Tensor | None, grad_scale: Tensor | None) -> None:
        """Adds up what each rank knows a part of, in place."""
        if grad_hidden is not None and self.shard.sum_input_grad:
            self.shard.all_reduce_(grad_hidden)
        if grad_scale is not None:
            self.shard.all_reduce_(grad_scale)

    def _check_owners(self, target: Tensor, owners: Tensor) -> None:
        has_one = (owners == 1) | ((target == self.ignore_index) & (owners >= 0))
        if has_one.all():
            return
        first = int((~has_one).nonzero()[0])
        what = f"class {int(target[first])} is a column of {int(owners[first])} ranks"
        if owners[first] < 0:
            what = f"the ranks' columns are not {self.shard.vocab_size} classes"
        raise ValueError(
            f"{what}: their vocab_start and numbers of columns do not cover the vocabulary once"
        )

    def _rank(self, logits: Tensor, target: Tensor, column: Tensor, owned: Tensor) -> Tensor:
        """How many classes of all ranks come before the target, (N): see `TokenStats`.

        Raw logits are compared: softcap and scale keep their order, or reverse it with a negative
        scale.
        """
        index = torch.where(owned, column, 0).unsqueeze(-1)
        at_target = logits.gather(-1, index).squeeze(-1)
        at_target = self.shard.all_reduce_(torch.where(owned, at_target, 0)).unsqueeze(-1)
        sign = logits.new_tensor(self.scale) if self.logit_scale is None else self.logit_scale
        counts = torch.zeros_like(column)
        classes = torch.arange(self.shard.used, device=logits.device) + self.shard.start
        rows = max(_COMPARISONS // max(logits[:1].numel(), 1), 1)
        for part in range(0, len(logits), rows):
            one = slice(part, part + rows)
            x, y = logits[one, ..., : self.shard.used], at_target[one]
            above = torch.where(sign > 0, x > y, (x < y) & (sign < 0))
            equal = (x == y) | (sign == 0)
            counts[one] = (above | (equal & (classes < target[one].unsqueeze(-1)))).sum(-1)
        return self.shard.all_reduce_(counts).reshape(-1)


def process_group(given: Any) -> Any:
    """The process group of a `DeviceMesh` of one dimension; groups and None as they are.

    Raises:
        ValueError: The mesh has several dimensions.
    """
    if not isinstance(given, DeviceMesh):  # which every torch's compiler can ask
        return given
    if given.ndim != 1:
        names: tuple[str | int, ...] = given.mesh_dim_names or tuple(range(given.ndim))
        raise ValueError(f"group is a DeviceMesh of several dimensions: give mesh[{names[-1]!r}]")
    return given.get_group()


def refuse_second_order(shard: ShardedColumns | None) -> None:
    """Raises a RuntimeError if the vocabulary is spread over ranks."""
    if shard is not None:
        raise RuntimeError(
            "losses over a vocabulary that is spread over ranks have first-order gradients only; "
            "create_graph=True needs all columns on one device"
        )
