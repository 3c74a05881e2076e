"""The losses of logits as functions: shapes, options and errors. The work is in `ops`."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import composite, ops
from .checks import (
    FLOATS,
    check_dense,
    check_range,
    check_scale,
    check_target,
    check_token_weight,
    check_weight,
    items_tensor,
)
from .entry import entry_point
from .ops import LossInputs, StatsInputs
from .options import MEAN, NONE, LogitOptions, LossOptions, documented, tempered
from .shard import Shard, ShardedColumns
from .statistics import (
    FloatStats,
    RowStats,
    TokenStats,
    asked,
    asked_beside_a_loss,
    asked_by_user,
)

__all__ = ["TokenStats", "cross_entropy", "token_stats"]


@entry_point("input", "target")
@documented
def token_stats(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    class_dim: int | None = None,
    with_rank: bool = False,
    extra: Sequence[str] = (),
    shard: Shard | None = None,
) -> TokenStats:
    """Everything that losses and metrics need to know of each token, in one read of the logits.

    ``log_prob``, ``lse``, ``entropy`` and ``mean_log_prob`` are differentiable with respect to
    ``input`` and to a tensor ``logit_scale``, in any combination; backward computes what was used.

    Args:
        input: Logits (V), (N, V) or (..., V), or with ``class_dim=1`` (N, V, d1, ...); float32,
            bfloat16, float16 or float64. Rows with a stride, such as ``logits[:, :-1]``, are read
            in place.
        target: Class indices of shape (), (N) or (...); int64, int32 or uint8.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `TokenStats`. ``weight`` is read for its ``mean_log_prob``. Over a ``shard``,
        ``with_rank`` reads the logits a second time, and compares them without a softcap.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.
    """
    call = DenseCall(
        input, target, weight, ignore_index, softcap, logit_scale, vocab_size, shard,
        -1 if class_dim is None else class_dim, temperature,
    )  # fmt: skip
    if call.has_probabilities:
        raise RuntimeError("token_stats: target must hold class indices (int64 or int32)")
    wanted = asked_by_user(with_rank, extra)
    call.check_targets()
    inputs = StatsInputs(call.rows, call.targets, call.weight, call.scale)
    if call.shard is None:
        rows = ops.token_stats(inputs, call.options, wanted)
    else:
        rows = _sharded_stats(inputs, call, wanted, inplace=False)
    return TokenStats.shaped(rows, wanted, call.shape)


@overload
def cross_entropy(
    input: Tensor, target: Tensor, *args: Any, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor, target: Tensor, *args: Any, return_stats: bool | Sequence[str], **options: Any
) -> tuple[Tensor, TokenStats]: ...


@entry_point("input", "target", "token_weight")  # type: ignore[misc]  # in other words
@documented
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    class_dim: int | None = None,
    inplace: bool = False,
    return_stats: bool | Sequence[str] = False,
    shard: Shard | None = None,
) -> Any:
    r"""Cross entropy between logits and targets: `torch.nn.functional.cross_entropy` and more.

    Per token, in nats, with eps = ``label_smoothing`` and x the transformed logits:
    ``-(1 - eps) w_y log p_y - (eps / V) sum_j w_j log p_j + z_loss * lse(x)^2``, times
    ``token_weight``.

    Which dimension holds the classes: where ``target.shape`` is ``input.shape`` without dimension
    1, dimension 1, as in torch; else the last, as language models have it. (They coincide up to
    two dimensions. Where both fit, as for probability targets, torch's is taken with a warning
    unless ``class_dim`` decides. Over a ``shard``, classes are last.)

    Args:
        input: Logits: (V), (N, V), (N, V, d1, ...) or (..., V); float32, bfloat16, float16 or
            float64. Rows with a stride are read in place where the classes are adjacent.
        target: Class indices (int64, int32 or uint8), or probabilities of the input's shape and
            dtype, which get their gradient too (`llmloss_ext.losses.check_probabilities` checks
            them).
        Options: each is described in `llmloss_ext.options`.

    Returns:
        The loss: 0-d, or of the target's shape for ``reduction="none"``. float32 also for bfloat16
        and float16 logits (torch rounds it to their dtype). With all tokens ignored, the mean is
        nan as in torch, and 0 if ``num_items`` is given. With ``return_stats``, the loss and a
        `TokenStats`.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, that
            token's loss is nan instead).
        RuntimeError: A wrong dtype or device; ``inplace`` where it cannot be.

    Example:
        >>> logits = model(tokens)  # (B, S, V)
        >>> loss = cross_entropy(logits, labels, label_smoothing=0.1, inplace=True)
        >>> loss.backward()
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    loss = LossOptions.of(
        label_smoothing=label_smoothing, z_loss=z_loss, focal_gamma=focal_gamma,
        reduction=reduction,
    )  # fmt: skip
    wanted = asked_beside_a_loss(return_stats)
    call = DenseCall(
        input, target, weight, ignore_index, softcap, logit_scale, vocab_size, shard, class_dim,
        temperature,
    )  # fmt: skip
    if num_items is not None:
        num_items = items_tensor(num_items, reduction, input)
    if token_weight is not None:
        token_weight = check_token_weight(token_weight, call.shape, input)
        token_weight = token_weight.reshape(call.rows.shape[:-1])
        call.leave_out(token_weight)
    call.check_targets()
    if inplace:
        call.check_inplace(input)
    if wanted and (inplace or call.has_probabilities):
        raise RuntimeError("return_stats needs class indices, and logits that stay: inplace=False")
    inputs = LossInputs(call.rows, call.targets, call.weight, token_weight, num_items, call.scale)
    stats: RowStats | None = None
    if call.shard is None and not wanted:
        value = ops.cross_entropy(inputs, call.options, loss, inplace=inplace)
    else:
        value, stats = _loss_of_stats(inputs, call, loss, wanted, inplace)
    if call.has_probabilities and not input.numel() and loss.reduction == MEAN:
        value = value + math.nan  # 0 / 0, as torch
    value = value.reshape(call.shape) if loss.reduction == NONE else value
    if return_stats is False:
        return value
    return value, TokenStats.beside(stats, wanted, call.shape)


class DenseCall:
    """The arguments that all functions share, checked and brought into the operators' shapes.

    Attributes:
        rows: The logits, (N, V) or (B, S, V), with adjacent columns.
        targets: Class indices (N) or (B, S), or probabilities like rows.
        shape: The shape of one number per token.
        weight: Class weights.
        scale: The tensor logit_scale, if it is one.
        options: How the operators read the logits.
        shard: Which classes the columns are; None: all.
    """

    __slots__ = (
        "has_probabilities", "is_copy", "options", "rows", "scale", "shape", "shard", "targets",
        "weight",
    )  # fmt: skip

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        softcap: float | None,
        logit_scale: float | Tensor,
        vocab_size: int | None,
        shard: Shard | None,
        class_dim: int | None,
        temperature: float,
    ) -> None:
        check_dense("input", input)
        check_dense("target", target)
        if weight is not None:
            check_dense("weight", weight)
        if input.dtype not in FLOATS:
            raise RuntimeError(
                f"expected logits of float32, bfloat16, float16 or float64, got {input.dtype}"
            )
        if class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim must be 1 or -1, got {class_dim!r}")
        self.is_copy = False  # whether the rows lie in other memory than the input
        self.shard: ShardedColumns | None = None
        if shard is not None:
            columns = input.shape[-1] if input.dim() else 0
            self.shard, vocab_size = shard.columns(columns, target, vocab_size), None
        is_plain = target.dtype == torch.int64 and input.dim() == 2 and target.dim() == 1
        self.has_probabilities = not is_plain and target.is_floating_point()
        if is_plain:
            # The common case, spared the general one's cost.
            self.rows, self.targets, self.shape = input, target, target.shape
            tokens, columns = input.shape
            if self.shape[0] != tokens:
                raise ValueError(
                    f"Expected input batch_size ({tokens}) to match target batch_size "
                    f"({self.shape[0]})."
                )
        else:
            if shard is not None:
                class_dim = _only_last(class_dim)
            self._bring_into_shape(input, target, class_dim)
            columns = self.rows.shape[-1]
        if columns == 0:
            self._add_a_column(ignore_index)
            columns, weight = 1, None
        if self.rows.stride(-1) != 1 and columns != 1:
            self.is_copy |= not self.rows.is_contiguous()
            self.rows = self.rows.contiguous()
        self.options = LogitOptions.of(
            softcap, logit_scale, vocab_size, ignore_index, columns, temperature
        )
        self.targets = check_target(self.targets, input, self.options.ignore_index)
        if weight is not None:
            check_weight(weight, columns, input)
        self.weight = weight
        self.scale = tempered(check_scale(logit_scale, input), temperature)

    def _bring_into_shape(self, input: Tensor, target: Tensor, class_dim: int | None) -> None:
        if input.dim() == 0:
            raise ValueError("input must have at least one dimension: the classes")
        if self.has_probabilities and target.shape != input.shape:
            raise ValueError(
                f"target of {target.dtype} holds probabilities and must have the input's shape "
                f"{tuple(input.shape)}, got {tuple(target.shape)}; class indices must be int64, "
                "int32 or uint8"
            )
        if input.dim() == 1:
            if not self.has_probabilities and target.dim() != 0:
                raise ValueError(
                    "Expected a target without dimensions for logits of shape "
                    f"{tuple(input.shape)}, got {tuple(target.shape)}"
                )
            input, self.shape = input.unsqueeze(0), torch.Size(())
            target = target.unsqueeze(0)
        else:
            if _class_dim(input, target, class_dim, self.has_probabilities) == 1:
                input = input.movedim(1, -1)
                target = target.movedim(1, -1) if self.has_probabilities else target
            self.shape = input.shape[:-1]
        if input.dim() > 3:
            columns = input.shape[-1]
            target = target.reshape(-1, columns) if self.has_probabilities else target.reshape(-1)
            self.is_copy = not _merge(input)
            input = input.reshape(-1, columns)
        self.rows, self.targets = input, target

    def _add_a_column(self, ignore_index: int) -> None:
        """Logits of no classes, of which only ignored tokens have a loss."""
        self.rows, self.is_copy = F.pad(self.rows, (0, 1)), True
        if self.has_probabilities:
            self.targets = F.pad(self.targets, (0, 1))
        else:
            is_ignored = self.targets == ignore_index
            self.targets = torch.where(is_ignored, self.targets, 1)  # out of range

    def check_targets(self) -> None:
        """Raises an IndexError for a target that no rank has; without a shard, the kernels do."""
        if self.shard is not None and self.shard.must_check_targets(self.targets):
            targets = self.targets.reshape(self.shape)
            check_range(targets, self.options.ignore_index, self.shard.vocab_size)

    def leave_out(self, token_weight: Tensor) -> None:
        """Tokens of weight 0 are ignored."""
        if not self.has_probabilities:
            self.targets = composite.without_weightless(
                self.targets, token_weight, self.options, token_weight.requires_grad
            )

    def check_inplace(self, input: Tensor) -> None:
        """Whether the gradient may be written over the logits."""
        if ops.in_transform():
            raise RuntimeError(
                "cross_entropy(inplace=True) cannot run under torch.func transforms; use "
                "inplace=False"
            )
        if not torch.is_grad_enabled():
            return
        if input.is_leaf and input.requires_grad:
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation: "
                "cross_entropy(inplace=True) overwrites its input"
            )
        if self.targets.requires_grad:
            raise RuntimeError(
                "cross_entropy(inplace=True) has no gradient for probability targets; detach them "
                "or use inplace=False"
            )
        if self.is_copy:
            raise RuntimeError(
                "cross_entropy(inplace=True) needs logits whose classes are adjacent in memory and "
                "whose leading dimensions merge into rows; use inplace=False, or pass them so"
            )


def _merge(input: Tensor) -> bool:
    """Whether the leading dimensions become one without a copy.

    Asked of the strides, since every torch's compiler can: not whether memory is shared.
    """
    if not input.numel():
        return True
    leading = [(n, s) for n, s in zip(input.shape[:-1], input.stride(), strict=False) if n != 1]
    return all(s == n * t for (_, s), (n, t) in itertools.pairwise(leading))


def _class_dim(
    input: Tensor, target: Tensor, class_dim: int | None, has_probabilities: bool
) -> int:
    """Which dimension of the input (of two at least) holds the classes: 1, or -1 for the last."""
    first, last = input.shape[:1] + input.shape[2:], input.shape[:-1]
    shapes = {1: first, -1: last}
    fits = {dim: has_probabilities or target.shape == shape for dim, shape in shapes.items()}
    names = {1: f"{tuple(first)} (classes in dimension 1)", -1: f"{tuple(last)} (classes last)"}
    if class_dim is not None:
        names = {class_dim: names[class_dim]}
    elif fits[1] and fits[-1] and input.dim() > 2:
        warnings.warn(
            f"target of shape {tuple(target.shape)} fits logits of shape {tuple(input.shape)} with "
            "the classes in dimension 1 and in the last; dimension 1 is taken, as in torch. Say "
            "class_dim=1 or class_dim=-1.",
            stacklevel=6,
        )
    chosen = [dim for dim in names if fits[dim]]
    if not chosen:
        raise ValueError(
            f"target of shape {tuple(target.shape)} does not fit logits of shape "
            f"{tuple(input.shape)}: expected {' or '.join(names.values())}"
        )
    return chosen[0] if input.dim() > 2 else -1


def _only_last(class_dim: int | None) -> int:
    if class_dim == 1:
        raise ValueError("over a shard, the classes are the last dimension: class_dim must be -1")
    return -1 if class_dim is None else class_dim


def _sharded_stats(inputs: StatsInputs, call: DenseCall, wanted: int, inplace: bool) -> RowStats:
    from .ops import sharded  # needs torch's compiler, which takes a second to import

    assert call.shard is not None
    if not inplace:
        return sharded.token_stats(inputs, call.options, wanted, call.shard)
    return sharded.eagerly(sharded.token_stats, inputs, call.options, wanted, call.shard, True)


def _loss_of_stats(
    inputs: LossInputs, call: DenseCall, loss: LossOptions, wanted: int, inplace: bool
) -> tuple[Tensor, RowStats]:
    """The loss as a function of the rows' statistics, and these."""
    of_stats = StatsInputs(inputs.input, inputs.target, inputs.weight, inputs.logit_scale)
    wanted |= asked(loss.statistics())
    target, ignore_index = inputs.target.reshape(-1), call.options.ignore_index
    if call.shard is None:
        rows, find = ops.token_stats(of_stats, call.options, wanted), composite.target_weights
    else:
        rows, find = _sharded_stats(of_stats, call, wanted, inplace), call.shard.target_weights
    stats = FloatStats(*(x.reshape(-1) for x in rows.floats))
    w_y = find(target, inputs.weight, ignore_index, stats.lse.dtype)
    token_weight = inputs.token_weight
    if token_weight is not None:
        token_weight = token_weight.reshape(-1)
    weights = composite.row_weights(token_weight, target, ignore_index, w_y.dtype)
    return composite.loss_of(stats, w_y, weights, inputs.num_items, loss), rows
