"""The walks over the chunks: project, run the kernels over the chunk's rows, add up the gradients.

The kernels are `llmloss_ext.ops.rows.LocalRows`, or `llmloss_ext.shard.ShardedRows` where each rank
has the weight of some classes; the ranks then walk through the same chunks side by side. Results
that are not asked for come back without elements. Nothing here has derivatives; `operators` has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import composite
from ..composite import real_of
from ..ops.library import MEAN_DENOMINATOR, STATE
from ..ops.rows import LocalRows, Rows, put, take
from ..options import MEAN, LogitOptions, LossOptions
from ..shard import ShardedRows
from ..statistics import STATISTICS, FloatStats, RowStats, asked, is_asked
from .groups import GroupLimit, Part
from .planning import ChunkOptions
from .projection import Chunk, Gradients, Projection

_MOST_TOKENS = 2.0**40
"""A denominator of 0 items is infinite."""


class Inputs(NamedTuple):
    """What may have a gradient, or one thing for each of them, such as its gradient."""

    input: Any = None
    """(N, D), in the dtype of the products."""
    linear_weight: Any = None
    linear_bias: Any = None
    logit_scale: Any = None


class Targets(NamedTuple):
    """What has none."""

    target: Any = None
    """(N) class indices, or (N, V) probabilities."""
    weight: Any = None
    token_weight: Any = None
    """(N)."""
    num_items: Any = None


class LossResults(NamedTuple):
    """A loss, its gradients, and the factor (0-d) that is still to be multiplied into them.

    The factor is 1 except for float16, whose gradients are kept away from its subnormal numbers
    (and the weight's and bias's in float32).
    """

    loss: Any
    grad_input: Tensor
    grad_linear_weight: Tensor
    grad_linear_bias: Tensor
    grad_logit_scale: Tensor
    factor: Tensor
    stats: tuple[Tensor, ...] = ()
    """A column (N) for each of `STATISTICS` where some were asked for; of others, no elements."""

    @property
    def gradients(self) -> Inputs:
        """By the name of the input."""
        return Inputs(*(getattr(self, f"grad_{name}") for name in Inputs._fields))


def rows_of(
    inputs: Inputs, targets: Targets, logits: LogitOptions, chunks: ChunkOptions
) -> LocalRows | ShardedRows:
    """The kernels over the rows of a chunk."""
    if chunks.shard is None:
        return LocalRows(targets.weight, inputs.logit_scale, logits)
    return ShardedRows(chunks.shard, targets.weight, inputs.logit_scale, logits)


def gradient_factor(input: Tensor, denominator: Tensor) -> Tensor:
    """What gradients of logits leave out, 0-d, so that float16 holds them.

    A power of two near 1 / denominator: they are then of the size of p and not of p / N, which is
    subnormal for many tokens. 1 for the other types.
    """
    if input.dtype != torch.float16:
        return torch.ones_like(denominator)
    return torch.exp2(-torch.floor(torch.log2(denominator.clamp(1.0, _MOST_TOKENS))))


def gradient_dtype(input: Tensor, parameter: Tensor) -> torch.dtype:
    """In which `loss_by_chunks` returns the gradient of a weight or a bias: the parameter's.

    But float16 cannot hold a sum over tokens from which `gradient_factor` was left out: such sums
    stay in float32 until backward has multiplied it in.
    """
    is_half = input.dtype == torch.float16 and parameter.dtype == torch.float16
    return real_of(input) if is_half else parameter.dtype


def loss_by_chunks(
    inputs: Inputs,
    targets: Targets,
    logits: LogitOptions,
    loss: LossOptions,
    chunks: ChunkOptions,
    needs: Inputs,
    wanted: int = 0,
) -> LossResults:
    """The mean or sum over the tokens, with the gradients that ``needs`` names.

    And with statistics if any are ``wanted``: then of class indices.
    """
    input = inputs.input
    real = real_of(input)
    if wanted:
        objective = cross_entropy_objective(inputs, targets, logits, loss, chunks)
        wanted |= asked(loss.statistics())
        call = ObjectiveCall(targets, logits, objective, wanted, chunks, needs)
        return objective_by_chunks(inputs, call).results
    rows = rows_of(inputs, targets, logits, chunks)
    labels = rows.labels(input, targets.target, targets.token_weight)
    projection = _projection(inputs, logits, chunks)
    denominator = torch.ones(len(MEAN_DENOMINATOR), dtype=real, device=input.device)
    if loss.reduction == MEAN and targets.num_items is not None:
        denominator = composite.items_denominator(targets.num_items, real)
    elif loss.reduction == MEAN:
        denominator = rows.denominator(labels, loss, real)
    items, z_factor = denominator
    factor = gradient_factor(input, items)
    # Each chunk's sum is divided, in the kernels' words a mean over so many items.
    divisor, of_chunk = torch.stack([items * factor, z_factor]), loss._replace(reduction=MEAN)
    value = torch.zeros((), dtype=torch.float64, device=input.device)
    gradients = _LossGradients(inputs, projection, chunks, needs, factor)
    counts = takes_part(targets, logits.ignore_index)
    for chunk in projection.chunks(chunks.limit, counts, drop=chunks.drop_ignored):
        part = labels.take(chunk.rows)
        if any(needs):
            of_part, scale = rows.losses_and_gradient_(
                chunk.logits, part, divisor, of_chunk, bool(needs.logit_scale)
            )
            gradients.add(chunk, scale)
        else:
            of_part = rows.losses(chunk.logits, part, divisor, of_chunk)
        value += of_part
        del chunk  # its buffer, before the gradient of the weight is rounded
    if loss.reduction == MEAN:
        value += torch.zeros_like(items) / items  # nan: no token to divide by
    return gradients.results((value * factor).to(real), rows)


class _LossGradients:
    """The gradients of a loss that knows them in the forward pass, but for a factor, 0-d."""

    def __init__(
        self,
        inputs: Inputs,
        projection: Projection,
        chunks: ChunkOptions,
        needs: Inputs,
        factor: Tensor,
    ) -> None:
        input = inputs.input
        self._inputs, self._factor = inputs, factor
        # float16: see gradient_dtype
        is_half = chunks.weight_grad_dtype == torch.float16
        sums = real_of(input) if is_half else chunks.weight_grad_dtype
        self._sums = Gradients(
            projection, needs.input, needs.linear_weight, needs.linear_bias, sums,
            gradient_dtype(input, inputs.linear_weight),
        )  # fmt: skip
        self._scale: Tensor | None = None
        if needs.logit_scale:
            self._scale = torch.zeros((), dtype=torch.float64, device=input.device)

    def add(self, chunk: Chunk, of_scale: Tensor) -> None:
        """Adds those of a chunk, whose gradient lies over its logits, and of the logit_scale."""
        self._sums.add(chunk)
        if self._scale is not None:
            self._scale += of_scale

    def results(self, loss: Tensor, rows: LocalRows | ShardedRows) -> LossResults:
        """All of them. The buffer of the chunks is gone by now."""
        sums, inputs = self._sums, self._inputs
        rows.sum_over_ranks(sums.hidden, self._scale)
        grad_bias = sums.bias
        if grad_bias is not None:
            grad_bias = grad_bias.to(gradient_dtype(inputs.input, inputs.linear_bias))
        return LossResults(
            loss=loss,
            grad_input=or_empty(sums.hidden, inputs.input),
            grad_linear_weight=or_empty(sums.weight_result(), inputs.input),
            grad_linear_bias=or_empty(grad_bias, inputs.input),
            grad_logit_scale=or_empty(_like(self._scale, inputs.logit_scale), inputs.input),
            factor=self._factor,
        )


class CrossEntropy(NamedTuple):
    """A reduced cross entropy as an `Objective`."""

    loss: LossOptions
    w_y: Tensor
    """(N): the class weight of each target, 0 where ignored."""
    weights: Tensor
    """(N): of the tokens, 0 where ignored."""
    divisor: Tensor
    """`composite.denominator`."""

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The sum of some tokens' losses, divided."""
        items, z_factor = self.divisor
        losses = composite.losses_of(
            stats, take(self.w_y, rows), take(self.weights, rows), self.loss, z_factor
        )
        return composite.total(losses) / items.to(losses.dtype), ()


def cross_entropy_objective(
    inputs: Inputs, targets: Targets, logits: LogitOptions, loss: LossOptions, chunks: ChunkOptions
) -> CrossEntropy:
    """Of all tokens."""
    ignored, real = logits.ignore_index, real_of(inputs.input)
    find = composite.target_weights if chunks.shard is None else chunks.shard.target_weights
    w_y: Tensor = find(targets.target, targets.weight, ignored, real)
    weights = composite.row_weights(targets.token_weight, targets.target, ignored, real)
    divisor = torch.ones(2, dtype=real, device=weights.device)
    if loss.reduction == MEAN:
        divisor = composite.mean_denominator(w_y, weights, targets.num_items, loss)
    return CrossEntropy(loss, w_y, weights, divisor)


def stats_by_chunks(
    inputs: Inputs, targets: Targets, logits: LogitOptions, wanted: int, chunks: ChunkOptions
) -> RowStats:
    """The statistics of the tokens, and the state that backward needs."""
    input = inputs.input
    rows = rows_of(inputs, targets, logits, chunks)
    # The state lies token by token, so that a chunk's is one piece.
    state = input.new_zeros((input.shape[0], len(STATE)), dtype=real_of(input))
    wholes = _columns(input, wanted, logits, chunks)
    projection = _projection(inputs, logits, chunks)
    counts = takes_part(targets, logits.ignore_index)
    for chunk in projection.chunks(chunks.limit, counts, drop=chunks.drop_ignored):
        stats = rows.statistics(chunk.logits, take(targets.target, chunk.rows), wanted)
        put(state, chunk.rows, stats.state.t())
        _put_all(wholes, chunk.rows, stats)
    return RowStats.of((state, *wholes))


def _columns(
    input: Tensor, wanted: int, logits: LogitOptions, chunks: ChunkOptions
) -> list[Tensor]:
    """A column (N) for each statistic that is asked for, as tokens have it that are left out."""
    classes = logits.vocab_size if chunks.shard is None else chunks.shard.vocab_size
    absent = {"argmax": -1, "rank": classes}

    def column(name: str) -> Tensor:
        dtype = real_of(input) if name in FloatStats._fields else torch.int64
        shape = (input.shape[0] if is_asked(wanted, name) else 0,)
        return torch.full(shape, absent.get(name, 0), dtype=dtype, device=input.device)

    return [column(name) for name in STATISTICS]


def _put_all(wholes: list[Tensor], rows: Rows, stats: RowStats) -> None:
    """Writes a chunk's statistics into the columns."""
    _, *parts = stats.results()
    for whole, part in zip(wholes, parts, strict=True):
        if whole.numel():
            put(whole, rows, part)


class Objective(Protocol):
    """A loss that is a sum over tokens, each known from the token's own statistics.

    Or over groups of tokens, each known from those of the group: ``stats`` are (members, n, length)
    each then, and ``rows`` says which groups they are.
    """

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What some tokens add: to the loss, 0-d, differentiable, and to each metric, detached.

        Args:
            stats: Theirs, (n) each.
            rows: Which of the N tokens they are.
        """
        ...


class ObjectiveCall(NamedTuple):
    """What a walk with an objective takes besides tensors that may have a gradient."""

    targets: Targets
    """Class indices; token weights are the objective's."""
    logits: LogitOptions
    objective: Objective
    wanted: int
    """The statistics that it reads, or whoever calls: see `llmloss_ext.statistics.asked`."""
    chunks: ChunkOptions
    needs: Inputs = Inputs()
    """Which gradients."""
    groups: GroupLimit | None = None
    """Of an objective that is over groups: they stay together."""
    items: int | None = None
    """The objective is about a mean over so many, for float16; None: over the tokens."""


class ObjectiveResults(NamedTuple):
    """What a walk with an objective returns."""

    results: LossResults
    metrics: tuple[Tensor | None, ...]


def objective_by_chunks(inputs: Inputs, call: ObjectiveCall) -> ObjectiveResults:
    """The sum that an objective is of, with the gradients that are needed.

    The gradient of a token's loss is known with its statistics: it overwrites the logits of the
    chunk at once, so that three products are all.
    """
    targets, logits, objective, wanted, chunks, needs, groups, items = call
    input = inputs.input
    real = real_of(input)
    rows = rows_of(inputs, targets, logits, chunks)
    projection = _projection(inputs, logits, chunks)
    wholes = _columns(input, wanted, logits, chunks)
    items = max(input.shape[0] if items is None else items, 1)
    factor = gradient_factor(input, torch.full((), items, dtype=real, device=input.device))
    gradients = _LossGradients(inputs, projection, chunks, needs, factor)
    # Of no token: nan, where a mean has none to divide by.
    nothing = FloatStats(*(x[:0] for x in wholes[: len(FloatStats._fields)])).only(wanted)
    if groups is not None:
        nothing = groups.groups._replace(number=0).of_all(nothing)
    value, metrics = objective(nothing, slice(0, 0))
    value = value.detach().double()
    counts, drop = targets.target != logits.ignore_index, chunks.drop_ignored
    parts = None if groups is None else groups.parts(counts)
    every = None if parts is None else [part.rows for part in parts]
    walked = projection.chunks(chunks.limit, counts, drop=drop, every=every)
    for at, chunk in enumerate(walked):
        labels = take(targets.target, chunk.rows)
        stats = rows.statistics(chunk.logits, labels, wanted)
        _put_all(wholes, chunk.rows, stats)
        of_part, of_metrics, grads = _part_of(
            objective,
            stats.floats.only(wanted),
            chunk.rows,
            None if parts is None else parts[at],
            any(needs),
        )
        value = value + of_part  # not in place: a metric may be the same number
        metrics = tuple(
            x if x is None or y is None else x + y for x, y in zip(metrics, of_metrics, strict=True)
        )
        if not any(needs):
            continue
        _, scale = rows.gradient(
            FloatStats(*(None if grad is None else grad / factor for grad in grads)),
            chunk.logits, labels, stats.floats.for_backward(), stats.state,
            bool(needs.logit_scale), inplace=True,
        )  # fmt: skip
        used = has_gradient(grads)
        chunk.counts = used if chunk.counts is None else used & chunk.counts
        gradients.add(chunk, scale)
        del chunk  # its buffer, before the gradient of the weight is rounded
    if groups is not None:  # whose parts are finite where they can be; their sum is, too
        value = value.clamp(-torch.finfo(real).max, torch.finfo(real).max)
    results = gradients.results(value.to(real), rows)
    return ObjectiveResults(results._replace(stats=tuple(wholes)), metrics)


def _part_of(
    objective: Objective, stats: FloatStats, rows: Rows, part: Part | None, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor | None, ...], FloatStats]:
    """What some tokens add to the loss and the metrics, and the gradients of their statistics.

    ``part``: the groups whose tokens the rows are, of an objective over groups.
    """
    names = stats.used
    # Inside an operator, which a compiled graph calls, autograd is switched off.
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.set_grad_enabled(with_gradient), torch._C._SetExcludeDispatchKeyGuard(key, False):
        leaves = {name: getattr(stats, name).detach().requires_grad_() for name in names}
        of_rows = FloatStats(**leaves)
        if part is None:
            value, metrics = objective(of_rows, rows)
        else:
            value, metrics = objective(part.spread(of_rows), part.groups)
        grads: Iterable[Tensor | None] = [None] * len(names)
        if value.requires_grad:
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    by_name = FloatStats(**dict(zip(names, grads, strict=True)))
    if not by_name.used:
        by_name = by_name._replace(log_prob=torch.zeros_like(stats.log_prob))
    return value.detach().double(), metrics, by_name


def gradients_by_chunks(
    grads: FloatStats,
    inputs: Inputs,
    targets: Targets,
    logits: LogitOptions,
    stats: list[Tensor],
    state: Tensor,
    chunks: ChunkOptions,
    needs: Inputs,
    accumulator: Tensor | None = None,
) -> Inputs:
    """The gradients from those of the statistics, (N) each or None.

    ``stats`` and ``state`` are what `stats_by_chunks` returned. The weight's gradient is added to
    ``accumulator`` if there is one.
    """
    input = inputs.input
    rows = rows_of(inputs, targets, logits, chunks)
    projection = _projection(inputs, logits, chunks)
    gradients = Gradients(
        projection, needs.input, needs.linear_weight, needs.linear_bias, chunks.weight_grad_dtype,
        inputs.linear_weight.dtype, accumulator,
    )  # fmt: skip
    grad_scale = None
    if needs.logit_scale:
        grad_scale = torch.zeros((), dtype=torch.float64, device=input.device)
    counts = with_gradient(grads, targets, logits.ignore_index)
    for chunk in projection.chunks(chunks.limit, counts, drop=chunks.drop_ignored):
        at = chunk.rows
        _, scale = rows.gradient(
            FloatStats(*(None if grad is None else take(grad, at) for grad in grads)),
            chunk.logits, take(targets.target, at),
            [take(x, at) if x.numel() else x for x in stats],
            take(state, at).t().contiguous(), bool(needs.logit_scale), inplace=True,
        )  # fmt: skip
        gradients.add(chunk)
        if grad_scale is not None:
            grad_scale += scale
        del chunk
    rows.sum_over_ranks(gradients.hidden, grad_scale)
    return Inputs(
        input=or_empty(gradients.hidden, input),
        linear_weight=or_empty(gradients.weight_result() if accumulator is None else None, input),
        linear_bias=or_empty(_like(gradients.bias, inputs.linear_bias), input),
        logit_scale=or_empty(_like(grad_scale, inputs.logit_scale), input),
    )


def takes_part(targets: Targets, ignore_index: int) -> Tensor | None:
    """(N) bool: which tokens take part; None: all."""
    if composite.is_indices(targets.target):
        return targets.target != ignore_index
    weight = targets.token_weight
    return None if weight is None or weight.requires_grad else weight != 0


def has_gradient(grads: Sequence[Tensor | None]) -> Tensor:
    """(n) bool: which tokens have a gradient of a statistic that is not 0."""
    return torch.stack([grad != 0 for grad in grads if grad is not None]).any(0)


def with_gradient(grads: Sequence[Tensor | None], targets: Targets, ignore_index: int) -> Tensor:
    """(N) bool: which tokens take part, and have such a gradient."""
    counts, used = takes_part(targets, ignore_index), has_gradient(grads)
    return used if counts is None else used & counts


def _projection(inputs: Inputs, logits: LogitOptions, chunks: ChunkOptions) -> Projection:
    used = logits.vocab_size if chunks.shard is None else chunks.shard.used
    return Projection(
        inputs.input, inputs.linear_weight, inputs.linear_bias, used,
        has_float32_logits=chunks.has_float32_logits,
    )  # fmt: skip


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor; one without elements for None."""
    return like.new_empty(0) if tensor is None else tensor


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.reshape(parameter.shape).to(parameter.dtype)
