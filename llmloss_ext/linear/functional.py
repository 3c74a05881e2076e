"""The losses of hidden states as functions: shapes, options and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from .. import composite, ops
from ..checks import (
    check_all_dense,
    check_dense,
    check_range,
    check_scale,
    check_target,
    check_token_weight,
    check_weight,
    items_tensor,
)
from ..composite import real_of
from ..entry import entry_point
from ..ops import LossInputs, StatsInputs
from ..ops.derivatives import must_be_opaque
from ..options import (
    MEAN,
    NONE,
    LogitOptions,
    LossOptions,
    documented,
    tempered,
)
from ..sequences import Sequences, moved
from ..shard import Shard, ShardedColumns
from ..statistics import (
    RowStats,
    TokenStats,
    asked,
    asked_beside_a_loss,
    asked_by_user,
)
from . import objective as objectives
from . import operators
from .groups import GroupLimit, Groups
from .operators import needs_gradients
from .planning import (
    ChunkOptions,
    Sums,
    chunk_limit,
    dtype_of_logits,
    row_stride,
    tokens_of_whole_groups,
)
from .projection import as_rows, check_projection, to_dtype_of_products
from .walk import Inputs, Objective, ObjectiveCall, Targets

__all__ = ["linear_cross_entropy", "linear_log_probs", "linear_token_stats"]

T = TypeVar("T")


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: bool | Sequence[str],
    **options: Any,
) -> tuple[Tensor, TokenStats]: ...


@entry_point("input", "target", "token_weight")  # type: ignore[misc]  # in other words
@documented
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    shift: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    weight_grad_accumulator: Tensor | None = None,
    return_stats: bool | Sequence[str] = False,
    shard: Shard | None = None,
) -> Any:
    r"""``cross_entropy(input @ linear_weight.T + linear_bias, target)`` without the N x V logits.

    The tokens are walked through in chunks; the one large buffer holds the logits of one chunk.
    With ``reduction="mean"`` or ``"sum"`` the gradients are formed in the forward pass: three
    matrix products in all. With ``"none"``, backward computes each chunk's logits again: four.
    Arguments are those of torch 2.13's ``F.linear_cross_entropy`` and of
    `llmloss_ext.cross_entropy`, whose formula and options hold.

    Args:
        input: Hidden states (D), (N, D) or (..., D); float32, bfloat16, float16 or float64.
        linear_weight: The projection (V, D), or for a K-dimensional loss (V, d1, ..., dK, D), of
            the input's dtype; under autocast of any, and its gradient is then not rounded to the
            lower one.
        target: Class indices of shape (), (N) or (...), int64 or int32; or probabilities (..., V),
            which are converted to the input's dtype. K-dimensional: (N, d1, ..., dK), or
            (N, V, d1, ..., dK); linear_bias then is (V, d1, ..., dK).
        options: A `torch.nn.LinearCrossEntropyOptions`: its ``batch_chunk_size`` is taken as
            ``chunk_tokens`` and its ``acc_dtype`` as ``weight_grad_dtype``. The rest chooses
            between ways in which torch computes the loss, and is not read.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        The loss: 0-d, or of the target's shape for ``reduction="none"``; float32 for 16-bit inputs.
        With ``return_stats``, the loss and a `TokenStats`, from the same three products.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, that
            token's loss is nan instead).
        TypeError: An option that must be an integer is not, or ``options`` are not torch's.
        RuntimeError: A wrong dtype or device.

    Example:
        >>> hidden = model.body(tokens)  # (B, S, D)
        >>> loss = linear_cross_entropy(hidden, model.head.weight, tokens, shift=1)
        >>> loss.backward()
    """
    loss = LossOptions.of(
        label_smoothing=label_smoothing, z_loss=z_loss, focal_gamma=focal_gamma,
        reduction=reduction,
    )  # fmt: skip
    if options is not None:
        chunk_tokens, weight_grad_dtype = _torchs_options(options, chunk_tokens, weight_grad_dtype)
    logits = HowLogits(ignore_index, softcap, logit_scale, vocab_size, temperature, logits_dtype)
    walk = HowChunks(
        chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype, weight_grad_accumulator
    )
    wanted = asked_beside_a_loss(return_stats)
    check_dense("linear_weight", linear_weight)
    items = items_tensor(num_items, reduction, input)
    sequences = Sequences(attention_mask, position_ids, document_ids, cu_seqlens)
    if linear_weight.dim() > 2:
        is_flat = shift or sequences.given or weight_grad_accumulator is not None or wanted
        if is_flat or shard is not None:
            raise ValueError(
                "shard, shift, return_stats and weight_grad_accumulator need a weight (V, D), got "
                f"{tuple(linear_weight.shape)}"
            )
        return _multi_dimensional(
            input, linear_weight, target, linear_bias, weight, token_weight, items, logits, loss,
            walk,
        )  # fmt: skip
    call = LinearCall(
        input, linear_weight, target, linear_bias, weight, logits, shift, sequences, shard
    )
    value, stats = call.loss(call.token_weights(token_weight), items, loss, walk, wanted)
    if return_stats is False:
        return value
    return value, TokenStats.beside(stats, wanted, call.shape)


def _torchs_options(
    options: Any, chunk_tokens: int | None, weight_grad_dtype: torch.dtype | None
) -> tuple[int | None, torch.dtype | None]:
    """chunk_tokens and weight_grad_dtype, from torch's options where these have them."""
    try:
        theirs = (options.batch_chunk_size, options.acc_dtype)
    except AttributeError:
        raise TypeError(
            f"options must be a torch.nn.LinearCrossEntropyOptions, got {type(options).__name__}"
        ) from None
    for name, ours, their in zip(
        ("chunk_tokens", "weight_grad_dtype"), (chunk_tokens, weight_grad_dtype), theirs,
        strict=True,
    ):  # fmt: skip
        if ours is not None and their is not None and ours != their:
            raise ValueError(f"{name}={ours}, but options say {their}")
    return chunk_tokens or theirs[0], weight_grad_dtype or theirs[1]


@entry_point("input", "target")
@documented
def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_rank: bool = False,
    extra: Sequence[str] = (),
    shift: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    shard: Shard | None = None,
) -> TokenStats:
    """`llmloss_ext.token_stats` of ``input @ linear_weight.T + linear_bias``, a chunk at a time.

    Differentiable with respect to input, linear_weight, linear_bias and a tensor logit_scale, in
    any combination of the statistics; backward computes each chunk's logits again.

    Args:
        input: Hidden states, as in `linear_cross_entropy`.
        linear_weight: The projection (V, D).
        target: Class indices of shape (), (N) or (...), int64 or int32.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `TokenStats`, each shaped like the target.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.
    """
    logits = HowLogits(ignore_index, softcap, logit_scale, vocab_size, temperature, logits_dtype)
    walk = HowChunks(chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype)
    sequences = Sequences(attention_mask, position_ids, document_ids, cu_seqlens)
    call = LinearCall(
        input, linear_weight, target, linear_bias, weight, logits, shift, sequences, shard
    )
    wanted = asked_by_user(with_rank, extra)
    return TokenStats.shaped(call.stats(wanted, call.chunk_options(walk)), wanted, call.shape)


@entry_point("input", "target")
@documented
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    shift: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Log p_target of every token, shaped like the target; 0 at ignored ones.

    What preference and policy losses (DPO, PPO, GRPO) are made of: `linear_token_stats`'s
    ``log_prob`` without the cost of the other statistics. Differentiable.

    Args:
        input: Hidden states, as in `linear_cross_entropy`.
        linear_weight: The projection (V, D).
        target: Class indices of shape (), (N) or (...), int64 or int32.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        (...), in nats; float32 for 16-bit inputs.

    Raises:
        ValueError, IndexError, RuntimeError: As `linear_token_stats`.
    """
    logits = HowLogits(ignore_index, softcap, logit_scale, vocab_size, temperature, logits_dtype)
    walk = HowChunks(chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype)
    sequences = Sequences(attention_mask, position_ids, document_ids, cu_seqlens)
    call = LinearCall(
        input, linear_weight, target, linear_bias, None, logits, shift, sequences, shard
    )
    log_probs: Tensor = call.stats(
        asked(("log_prob", "lse")), call.chunk_options(walk)
    ).floats.log_prob
    return log_probs.reshape(call.shape)


class HowLogits(NamedTuple):
    """The options of the logits as users give them."""

    ignore_index: int | None
    softcap: float | None
    logit_scale: float | Tensor
    vocab_size: int | None
    temperature: float
    logits_dtype: torch.dtype | None


class HowChunks(NamedTuple):
    """The options of the walk as users give them."""

    chunk_tokens: int | None
    max_chunk_bytes: int | None
    drop_ignored: bool | None
    weight_grad_dtype: torch.dtype | None
    accumulator: Tensor | None = None


class LinearCall:
    """The arguments that all functions share, checked and brought into the operators' shapes.

    Attributes:
        inputs: The hidden states (N, D) in the dtype of the products, and what else may have a
            gradient.
        targets: (N), or probabilities (N, V).
        shape: The shape of one number per token.
    """

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        weight: Tensor | None,
        logits: HowLogits,
        shift: int,
        sequences: Sequences,
        shard: Shard | None,
    ) -> None:
        check_all_dense(
            {"input": input, "linear_weight": linear_weight, "target": target},
            {"linear_bias": linear_bias, "weight": weight},
        )
        ignore_index, softcap, logit_scale, vocab_size, temperature, logits_dtype = logits
        self.is_wide = check_projection(input, linear_weight, linear_bias, logits_dtype)
        input = to_dtype_of_products(input, linear_weight)
        self.logits_dtype = dtype_of_logits(input.dtype, has_float32_logits=self.is_wide)
        columns = linear_weight.shape[0]
        self.shard: ShardedColumns | None = None
        if shard is not None:
            self.shard, vocab_size = shard.columns(columns, target, vocab_size), None
        ignore_index = -100 if ignore_index is None else ignore_index
        self.options = LogitOptions.of(
            softcap, logit_scale, vocab_size, ignore_index, columns, temperature
        )
        self.weight, self.shape = weight, input.shape[:-1]
        self.has_probabilities = target.is_floating_point()
        if self.has_probabilities:
            target = target.to(self.logits_dtype)
        expected = (*self.shape, columns) if self.has_probabilities else tuple(self.shape)
        if tuple(target.shape) != expected:
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit hidden states of shape "
                f"{tuple(input.shape)}: expected {expected}"
            )
        target = check_target(target, input, self.options.ignore_index, self.logits_dtype)
        target = sequences.targets(target, shift, self.options.ignore_index)
        self.shift = shift
        hidden = as_rows(input)
        self.targets = target.reshape(hidden.shape[0], *expected[len(self.shape) :])
        check_weight(weight, columns, input)
        scale = tempered(check_scale(logit_scale, input), temperature)
        self.inputs = Inputs(hidden, linear_weight, linear_bias, scale)

    def _check_range(self, classes: int) -> None:
        targets = self.targets.reshape(self.shape)
        check_range(targets, self.options.ignore_index, classes, self.shift)

    def token_weights(self, token_weight: Tensor | None) -> Tensor | None:
        """(N), of the labels that the tokens predict. Tokens of weight 0 are then ignored."""
        if token_weight is None:
            return None
        token_weight = check_token_weight(token_weight, self.shape, self.inputs.input)
        token_weight = moved(token_weight, self.shift, 0.0).reshape(-1)
        if not self.has_probabilities:
            self.targets = composite.without_weightless(
                self.targets, token_weight, self.options, token_weight.requires_grad
            )
        return token_weight

    @property
    def real(self) -> torch.dtype:
        """The dtype of the statistics."""
        return real_of(self.inputs.input)

    def leave_out(self, mask: Tensor | None) -> Tensor:
        """Which tokens take part, shaped like them: those of the mask that are not ignored.

        The others are ignored then.

        Raises:
            ValueError: The mask has another shape.
        """
        ignored = self.options.ignore_index
        valid = self.targets.reshape(self.shape) != ignored
        if mask is None:
            return valid
        if mask.shape != self.shape:
            raise ValueError(
                f"mask must have the shape of the tokens, {tuple(self.shape)}, got "
                f"{tuple(mask.shape)}"
            )
        valid = valid & mask.bool()
        self.targets = torch.where(valid.reshape(-1), self.targets, ignored)
        return valid

    def loss(
        self,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        loss: LossOptions,
        walk: HowChunks,
        wanted: int = 0,
    ) -> tuple[Tensor, RowStats | None]:
        """The loss, by the way that the situation allows; with statistics if any are wanted."""
        if wanted and self.has_probabilities:
            raise RuntimeError("return_stats: target must hold class indices (int64 or int32)")
        # A loss is made of the rows' statistics, and not with its gradients at once, where a
        # gradient has to wait for what backward knows.
        by_rows = (
            loss.reduction == NONE
            or walk.accumulator is not None
            or (token_weight is not None and token_weight.requires_grad)
        )
        chunks = self.chunk_options(walk)
        whole = self.has_probabilities and (self.targets.requires_grad or by_rows)
        is_transformed, stats = ops.in_transform(), None
        if wanted and is_transformed:
            by_rows = True
        if whole or (is_transformed and not wanted):
            if walk.accumulator is not None:
                raise RuntimeError(
                    "weight_grad_accumulator works neither with probability targets nor under "
                    "torch.func transforms"
                )
            value = self._from_whole_logits(token_weight, num_items, loss, chunks)
        elif by_rows:
            stats = self.stats(wanted | asked(loss.statistics()), chunks, walk.accumulator)
            value = self._loss_of(stats, token_weight, num_items, loss)
        else:
            targets = Targets(self.targets, self.weight, token_weight, num_items)
            value, stats = self._run(
                operators.loss, self.inputs, targets, self.options, loss, chunks, wanted
            )
        value = value.reshape(self.shape) if loss.reduction == NONE else value
        return value, stats if wanted else None

    def walk(
        self,
        objective: Objective,
        wanted: int,
        chunks: ChunkOptions,
        groups: GroupLimit | None = None,
        items: int | None = None,
    ) -> objectives.ObjectiveLoss:
        """A sum over tokens (or groups), in one walk; under transforms from whole logits.

        Args:
            objective: The sum.
            wanted: The statistics that it reads.
            chunks: How to walk.
            groups: Which tokens stay together; of 0 tokens, backward computes the logits again.
            items: The objective is about a mean over so many; None: over the tokens.
        """
        if ops.in_transform() or (groups is not None and not groups.tokens):
            stats, which = self.stats(wanted, chunks), None if groups is None else groups.groups
            return objectives.of_statistics(stats, len(self.targets), objective, wanted, which)
        targets = Targets(self.targets, self.weight)
        call = ObjectiveCall(
            targets, self.options, objective, wanted, chunks, groups=groups, items=items
        )
        return self._run(objectives.run, self.inputs, call)

    def group_limit(self, groups: Groups, walk: HowChunks, chunks: ChunkOptions) -> GroupLimit:
        """How many tokens of whole groups a chunk has; 0: the largest does not fit, or need not."""
        if ops.in_transform() or must_be_opaque(self.inputs.input):
            return GroupLimit(groups, 1)  # there are no chunks, or what is ignored cannot be read
        if not any(needs_gradients(self.inputs)):
            return GroupLimit(groups, 0)  # no product to spare
        largest, total, sizes = groups.tokens, len(self.targets), None
        if chunks.drop_ignored:
            sizes = groups.sizes(self.targets != self.options.ignore_index)
            largest, total = max(sizes, default=0), sum(sizes)
        weight = self.inputs.linear_weight
        columns = weight.shape[0] if self.shard is None else self.shard.usual_count
        tokens = tokens_of_whole_groups(
            total, largest, chunks.limit,
            row_stride(columns, self.logits_dtype) * self.logits_dtype.itemsize,
            columns * weight.shape[1] * weight.itemsize,
            is_own=(walk.chunk_tokens, walk.max_chunk_bytes) != (None, None),
        )  # fmt: skip
        return GroupLimit(groups, tokens, sizes)

    def stats(
        self, wanted: int, chunks: ChunkOptions, accumulator: Tensor | None = None
    ) -> RowStats:
        """The statistics of the rows; under transforms from whole logits."""
        if self.has_probabilities:
            raise RuntimeError("statistics: target must hold class indices (int64 or int32)")
        if ops.in_transform():
            logits = operators.logits_of(self.inputs, self.targets, None, self.options, chunks)
            inputs = StatsInputs(logits, self.targets, self.weight, self.inputs.logit_scale)
            return ops.token_stats(inputs, self.options, wanted)
        return self._run(
            operators.stats, self.inputs, self.targets, self.weight, self.options, wanted,
            chunks, accumulator,
        )  # fmt: skip

    def _loss_of(
        self,
        stats: RowStats,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        loss: LossOptions,
    ) -> Tensor:
        find = composite.target_weights if self.shard is None else self.shard.target_weights
        w_y = find(self.targets, self.weight, self.options.ignore_index, self.real)
        weights = composite.row_weights(
            token_weight, self.targets, self.options.ignore_index, self.real
        )
        return composite.loss_of(stats.floats, w_y, weights, num_items, loss)

    def _from_whole_logits(
        self,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        loss: LossOptions,
        chunks: ChunkOptions,
    ) -> Tensor:
        """With every derivative."""
        logits = operators.logits_of(self.inputs, self.targets, token_weight, self.options, chunks)
        scale = self.inputs.logit_scale
        return ops.cross_entropy(
            LossInputs(logits, self.targets, self.weight, token_weight, num_items, scale),
            self.options, loss,
        )  # fmt: skip

    def _run(self, run: Callable[..., T], *arguments: Any) -> T:
        """Runs; a target out of range is named by its place in what was given, not in its chunk."""
        if self.shard is not None:
            if self.shard.must_check_targets(self.targets):
                self._check_range(self.shard.vocab_size)
            return run(*arguments)
        if torch.compiler.is_compiling():
            return run(*arguments)
        try:
            return run(*arguments)
        except IndexError:
            self._check_range(self.options.vocab_size)
            raise

    def chunk_options(self, walk: HowChunks) -> ChunkOptions:
        """How to walk through the tokens, by the plan: the same chunks on every rank."""
        hidden, weight = self.inputs.input, self.inputs.linear_weight
        columns = weight.shape[0] if self.shard is None else self.shard.usual_count
        dtype, real = walk.weight_grad_dtype, real_of(hidden)
        if walk.accumulator is not None:
            dtype = dtype or walk.accumulator.dtype
            _check_accumulator(walk.accumulator, weight, dtype)
        if dtype not in (None, real, hidden.dtype, weight.dtype):
            raise ValueError(f"weight_grad_dtype must be {real} or the weight's dtype, got {dtype}")
        drops = hidden.device.type == "cpu" if walk.drop_ignored is None else walk.drop_ignored
        dtype, sums = dtype or real, None
        if walk.accumulator is not None or needs_gradients((weight,))[0]:
            sums = Sums.of(columns * weight.shape[1], hidden.dtype, weight.dtype, dtype)
        limit = chunk_limit(
            columns, self.logits_dtype, hidden.device.type, walk.chunk_tokens,
            walk.max_chunk_bytes, sums,
        )  # fmt: skip
        return ChunkOptions(limit, drops, dtype, self.shard, self.is_wide)


def _check_accumulator(accumulator: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if accumulator.shape != weight.shape or accumulator.device != weight.device:
        raise ValueError(
            f"weight_grad_accumulator must have the weight's shape {tuple(weight.shape)} "
            f"on {weight.device}, got {tuple(accumulator.shape)} on {accumulator.device}"
        )
    if accumulator.dtype != dtype:
        raise ValueError(f"weight_grad_accumulator must be of {dtype}, got {accumulator.dtype}")
    if not accumulator.is_contiguous():
        raise ValueError(
            "weight_grad_accumulator must be contiguous, got strides "
            f"{accumulator.stride()} for shape {tuple(accumulator.shape)}"
        )
    if accumulator.requires_grad:
        raise ValueError("weight_grad_accumulator must not require a gradient itself")
    if torch.compiler.is_compiling():
        raise RuntimeError("weight_grad_accumulator does not work under torch.compile")


def _multi_dimensional(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    logits: HowLogits,
    loss: LossOptions,
    walk: HowChunks,
) -> Tensor:
    """Torch's K-dimensional loss: a classification at each of d1 x ... x dK positions."""
    classes, *positions, features = linear_weight.shape
    shape = (input.shape[0], *positions) if input.dim() == 2 else None
    probabilities = target.is_floating_point()
    if shape is None or input.shape[-1] != features:
        raise ValueError(
            "a K-dimensional loss takes hidden states (N, D) and a weight (V, d1, ..., dK, D), got "
            f"{tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    for name, given, expected in (
        ("linear_bias", linear_bias, (classes, *positions)),
        ("target", target, (shape[0], classes, *positions) if probabilities else shape),
        ("token_weight", token_weight, shape),
    ):
        if given is not None and tuple(given.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(given.shape)}")

    def each(tensor: Tensor | None, dim: int = 1) -> Sequence[Any]:
        # (..., d1, ..., dK, ...), whose first such dimension is `dim`, by position.
        if tensor is None:
            return [None] * math.prod(positions)
        return tensor.flatten(dim, dim + len(positions) - 1).unbind(dim)

    calls = [
        LinearCall(input, w, y, b, weight, logits, 0, Sequences(), None)
        for w, y, b in zip(
            each(linear_weight), each(target, 2 if probabilities else 1), each(linear_bias),
            strict=True,
        )
    ]  # fmt: skip
    weights = [call.token_weights(t) for call, t in zip(calls, each(token_weight), strict=True)]
    if loss.reduction == MEAN and num_items is None:
        num_items = _counted(calls, weights, loss)
    losses = [
        call.loss(w, num_items, loss, walk)[0] for call, w in zip(calls, weights, strict=True)
    ]
    stacked = torch.stack(losses, dim=-1)
    return stacked.reshape(shape) if loss.reduction == NONE else stacked.sum()


def _counted(
    calls: Sequence[LinearCall], weights: Sequence[Tensor | None], loss: LossOptions
) -> Tensor:
    """The denominator of a mean over the tokens of all calls."""
    first = calls[0]
    targets = torch.cat([call.targets for call in calls])
    tokens = None if weights[0] is None else torch.cat([w for w in weights if w is not None])
    real = real_of(first.inputs.input)
    return composite.counted(targets, first.weight, tokens, first.options, loss, real)
