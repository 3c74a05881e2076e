"""The losses as functions: shapes, options and errors. The work is in `llmloss_ext.ops`."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmloss_ext import composite, ops
from llmloss_ext.composite import LogitOptions, LossOptions

__all__ = ["TokenStats", "cross_entropy", "token_stats"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class TokenStats(NamedTuple):
    """Statistics of the predicted distributions p = softmax(x), one number per token.

    All are shaped like the target. The floats are float32 (float64 for float64 logits).
    At ignored tokens they are 0, ``argmax`` is -1 and ``rank`` is the vocabulary size.
    """

    log_prob: Tensor
    """log p_target, in nats. Cross entropy is its negative."""
    lse: Tensor
    """log sum_j exp(x_j)."""
    entropy: Tensor
    """-sum_j p_j log p_j, in nats."""
    mean_log_prob: Tensor
    """(1 / V) sum_j w_j log p_j, where w is the class weight (1 without)."""
    argmax: Tensor | None
    """int64: the predicted token, the first of equals; -1 in a row spoilt by nan or +inf."""
    rank: Tensor | None
    """int64: logits strictly greater than the target's. ``rank == 0`` is a correct prediction,
    ``rank < k`` a top-k hit. The vocabulary size in a row spoilt by nan or +inf."""


def token_stats(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    with_rank: bool = False,
) -> TokenStats:
    """Everything that losses and metrics need to know of each token, in one read of the logits.

    ``log_prob``, ``lse``, ``entropy`` and ``mean_log_prob`` are differentiable with respect to
    ``input`` and to a tensor ``logit_scale``, in any combination; backward computes what was used.

    Args:
        input: Logits (V), (N, V) or (..., V); float32, bfloat16, float16 or float64. Rows with a
            stride, such as ``logits[:, :-1]``, are read in place. Torch's (N, C, d1, ...) form is
            understood as in `cross_entropy`.
        target: Class indices of shape (), (N) or (...); int64 or int32.
        weight: Class weights (V) for ``mean_log_prob``.
        ignore_index: Tokens with this target are not read.
        softcap: If given, x = softcap * tanh(logit_scale * input / softcap).
        logit_scale: Factor of the logits; a 0-d tensor gets its gradient.
        vocab_size: Only the first ``vocab_size`` columns take part (padded heads).
        with_rank: Whether to fill ``argmax`` and ``rank``.

    Returns:
        A `TokenStats`.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.
    """
    call = _Call(input, target, weight, softcap, logit_scale, vocab_size, ignore_index)
    if call.has_probabilities:
        raise RuntimeError("token_stats: target must hold class indices (int64 or int32)")
    stats = ops.token_stats(
        call.rows, call.targets, weight, call.scale, call.options, (True, True, with_rank)
    )
    return as_token_stats(stats, call.shape, with_rank)


def as_token_stats(stats: Sequence[Tensor], shape: torch.Size, with_rank: bool) -> TokenStats:
    """What an operator returns of the rows' statistics, in the shape of the target."""
    log_prob, lse, entropy, mean = (s.reshape(shape) for s in stats[:4])
    argmax, rank = (s.reshape(shape) if with_rank else None for s in stats[4:6])
    return TokenStats(log_prob, lse, entropy, mean, argmax, rank)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Cross entropy between logits and targets: `torch.nn.functional.cross_entropy` and more.

    Per token, in nats, with eps = ``label_smoothing`` and x the transformed logits:
    ``-(1 - eps) w_y log p_y - (eps / V) sum_j w_j log p_j + z_loss * lse(x)^2``, times
    ``token_weight``.

    Which dimension holds the classes: where ``target.shape`` is ``input.shape`` without dimension
    1, dimension 1, as in torch; else the last, as language models have it. (They coincide up to
    two dimensions. Probability targets follow torch: dimension 1 from two dimensions on.)

    Args:
        input: Logits: (V), (N, V), (N, V, d1, ...) or (..., V); float32, bfloat16, float16 or
            float64. Rows with a stride are read in place where the classes are adjacent.
        target: Class indices (int64 or int32), or probabilities of the input's shape and dtype,
            which get their gradient too (`llmloss_ext.losses.check_probabilities` checks them).
        weight: Class weights (V). As in torch, the mean divides by the targets' weights.
        ignore_index: Tokens with this target have no loss, a gradient of exactly zero, and do not
            count in the mean. Any integer, also one that is a class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2, >= 0 (PaLM, Chowdhery et al. 2022; ST-MoE, Zoph et al. 2022).
        softcap: If given (> 0), x = softcap * tanh(logit_scale * input / softcap) (Gemma 2).
        logit_scale: Factor of the logits; a 0-d tensor gets its gradient.
        token_weight: A weight for each token, shaped like the target of indices; the mean divides
            by the sum over valid tokens.
        num_items: Replaces the denominator of the mean, e.g. by the number of valid tokens of all
            micro-batches; an int > 0 or a 0-d tensor on the input's device, taken as a constant.
        vocab_size: Only the first ``vocab_size`` columns take part; the others' gradient is zero.
        inplace: Writes the gradient over ``input`` (which then no longer holds logits): no memory
            of the size of the logits is needed. Serves one backward, of first order.

    Returns:
        The loss: 0-d, or of the target's shape for ``reduction="none"``. float32 also for bfloat16
        and float16 logits (torch rounds it to their dtype). With all tokens ignored, the mean is
        nan as in torch, and 0 if ``num_items`` is given.

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
    reduced = loss_options(label_smoothing, z_loss, reduction)
    call = _Call(input, target, weight, softcap, logit_scale, vocab_size, ignore_index)
    if num_items is not None:
        num_items = items_tensor(num_items, reduction, input)
    row_weights = None
    if token_weight is not None:
        token_weight = check_token_weight(token_weight, call.shape, input)
        if token_weight.requires_grad:
            return _differentiable_token_weight(
                call, weight, token_weight, num_items, reduction, label_smoothing, z_loss, inplace
            )
        row_weights = token_weight.reshape(call.targets.shape[: call.rows.dim() - 1])
    run = ops.cross_entropy
    if inplace:
        call.check_inplace(input)
        if torch.is_grad_enabled() and (input.requires_grad or call.scale_requires_grad):
            run = ops.cross_entropy_inplace
    loss = run(
        call.rows,
        call.targets,
        weight,
        row_weights,
        num_items,
        call.scale,
        call.options,
        reduced,
    )
    return loss.reshape(call.shape) if reduction == "none" else loss


def loss_options(label_smoothing: float, z_loss: float, reduction: str) -> LossOptions:
    """Raises a ValueError if an option of the loss is out of range."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f'{reduction!r} is not a valid value for reduction: "none", "mean", "sum"')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    return LossOptions(label_smoothing, z_loss, _REDUCTIONS[reduction])


def as_integer(name: str, value: int) -> int:
    """The option, if it is an integer (numpy's, too); else a TypeError that names it."""
    if isinstance(value, int | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_target(target: Tensor, input: Tensor, ignore_index: int) -> Tensor:
    """Targets as the operators read them; the shape is not looked at.

    Raises:
        RuntimeError: Neither int64 nor int32 nor probabilities of the input's dtype; or
            probabilities with an ``ignore_index`` that could be meant.
    """
    if target.dtype == torch.int32:
        # So that the two can be compared.
        return target if -(2**31) <= ignore_index < 2**31 else target.long()
    if target.dtype == torch.int64:
        return target
    if not target.is_floating_point():
        raise RuntimeError(f"expected class indices of int64 or int32, got {target.dtype}")
    if target.dtype != input.dtype:
        raise RuntimeError(
            f"expected probability targets of the input's dtype {input.dtype}, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    return target.contiguous() if target.stride(-1) != 1 else target


def check_range(target: Tensor, ignore_index: int, classes: int, shift: int = 0) -> None:
    """Raises an IndexError that names the first target that is neither a class nor ignored.

    The first ``shift`` targets of each sequence are nobody's. Waits for the target's device.
    """
    used = target[..., shift:] if shift else target
    bad = (used != ignore_index) & ((used < 0) | (used >= classes))
    if not bad.any():
        return
    *leading, last = bad.nonzero()[0].tolist() or [0]
    place = (*leading, last + shift)
    raise IndexError(
        f"Target {int(used[bad][0])} at position {place if leading else place[0]} is out of "
        f"bounds: expected a class in [0, {classes}) or ignore_index = {ignore_index}."
    )


def check_weight(weight: Tensor | None, columns: int, input: Tensor) -> None:
    """Raises a RuntimeError if the class weights do not fit logits of so many columns."""
    if weight is None:
        return
    if weight.shape != (columns,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {columns} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    if weight.device != input.device or not weight.is_floating_point():
        raise RuntimeError(
            f"expected weight to be floating point on {input.device}, got {weight.dtype} on "
            f"{weight.device}"
        )
    if weight.requires_grad:
        raise RuntimeError("weight has no gradient: pass weight.detach()")


def logit_options(
    logit_scale: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    ignore_index: int,
    columns: int,
    input: Tensor,
) -> tuple[LogitOptions, Tensor | None]:
    """The options of logits with so many columns, and ``logit_scale`` if it is a tensor.

    Raises:
        ValueError: An option out of range.
        RuntimeError: ``logit_scale`` is on another device.
    """
    scale = None
    if isinstance(logit_scale, Tensor):
        _check_scale(logit_scale, input)
        scale, logit_scale = logit_scale, 1.0
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number > 0, got {softcap}")
    vocab_size = columns if vocab_size is None else as_integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size must be in [1, {columns}], the number of classes of the input, got "
            f"{vocab_size}"
        )
    return LogitOptions(float(logit_scale), softcap or 0.0, ignore_index, vocab_size), scale


def _check_scale(scale: Tensor, input: Tensor) -> None:
    if scale.numel() != 1 or scale.dim() > 1 or not scale.is_floating_point():
        raise ValueError(
            f"logit_scale must be a number or a floating-point tensor with one element, got "
            f"shape {tuple(scale.shape)} of {scale.dtype}"
        )
    if scale.device != input.device:
        raise RuntimeError(f"expected logit_scale on {input.device}, got {scale.device}")


class _Call:
    """The arguments that all functions share, checked and brought into the operators' shapes.

    Attributes:
        rows: The logits, (N, V) or (B, S, V), with adjacent columns.
        targets: Class indices (N) or (B, S), or probabilities like rows.
        shape: The shape of one number per token.
        scale: The tensor logit_scale, if it is one.
        options: How the operators read the logits.
    """

    __slots__ = ("has_probabilities", "options", "rows", "scale", "shape", "targets")

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        softcap: float | None,
        logit_scale: float | Tensor,
        vocab_size: int | None,
        ignore_index: int,
        classes_last: bool = False,
    ) -> None:
        if input.dtype not in FLOATS:
            raise RuntimeError(
                f"expected logits of float32, bfloat16, float16 or float64, got {input.dtype}"
            )
        if target.device != input.device:
            raise RuntimeError(
                f"expected input and target on the same device, got {input.device} and "
                f"{target.device}"
            )
        self.has_probabilities = target.is_floating_point()
        if input.dim() == 2 and target.dim() == 1 and not self.has_probabilities:
            # The common case, spared the general one's cost.
            if target.shape[0] != input.shape[0]:
                raise ValueError(
                    f"Expected input batch_size ({input.shape[0]}) to match target batch_size "
                    f"({target.shape[0]})."
                )
            self.rows, self.targets, self.shape = input, target, target.shape
        else:
            self._bring_into_shape(input, target, classes_last)
        columns = self.rows.shape[-1]
        if self.rows.stride(-1) != 1 and columns != 1:
            self.rows = self.rows.contiguous()
        ignore_index = as_integer("ignore_index", ignore_index)
        if target.dtype != torch.int64:
            self.targets = check_target(self.targets, input, ignore_index)
        check_weight(weight, columns, input)
        self.options, self.scale = logit_options(
            logit_scale, softcap, vocab_size, ignore_index, columns, input
        )

    def _bring_into_shape(self, input: Tensor, target: Tensor, classes_last: bool) -> None:
        if input.dim() == 0:
            raise ValueError("input must have at least one dimension: the classes")
        expected = target.shape[:1] + target.shape[2:] if self.has_probabilities else target.shape
        if self.has_probabilities and target.shape != input.shape:
            raise ValueError(
                f"target of {target.dtype} holds probabilities and must have the input's shape "
                f"{tuple(input.shape)}, got {tuple(target.shape)}; class indices must be int64 or "
                "int32"
            )
        if input.dim() == 1:
            if not self.has_probabilities and target.dim() != 0:
                raise ValueError(
                    "Expected a target without dimensions for logits of shape "
                    f"{tuple(input.shape)}, got {tuple(target.shape)}"
                )
            input, self.shape = input.unsqueeze(0), torch.Size(())
            target = target.unsqueeze(0)
        elif not classes_last and expected == input.shape[:1] + input.shape[2:]:  # as torch
            self.shape = expected
            if input.dim() > 2:
                input = input.movedim(1, -1)
                target = target.movedim(1, -1) if self.has_probabilities else target
        elif target.shape == input.shape[:-1]:  # language models' form: classes last
            self.shape = target.shape
        else:
            torchs = f"{tuple(input.shape[:1] + input.shape[2:])} (classes in dimension 1) or "
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit logits of shape "
                f"{tuple(input.shape)}: expected {'' if classes_last else torchs}"
                f"{tuple(input.shape[:-1])} (classes last)"
            )
        if input.dim() > 3:
            columns = input.shape[-1]
            target = target.reshape(-1, columns) if self.has_probabilities else target.reshape(-1)
            input = input.reshape(-1, columns)
        self.rows, self.targets = input, target

    @property
    def scale_requires_grad(self) -> bool:
        return self.scale is not None and self.scale.requires_grad

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
        if self.rows.data_ptr() != input.data_ptr():
            raise RuntimeError(
                "cross_entropy(inplace=True) needs logits whose classes are adjacent in memory and "
                "whose leading dimensions merge into rows; use inplace=False, or pass them so"
            )


def items_tensor(num_items: int | Tensor, reduction: str, input: Tensor) -> Tensor:
    """``num_items`` as a constant on the input's device; a ValueError if it cannot be one."""
    if reduction != "mean":
        raise ValueError(
            f'num_items replaces the denominator of reduction="mean"; got reduction={reduction!r}'
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.device != input.device:
            raise ValueError(
                f"num_items must be a number or hold one number on {input.device}, got shape "
                f"{tuple(num_items.shape)} on {num_items.device}"
            )
        on_host = num_items.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not ops.in_transform() and not num_items > 0:
            raise ValueError(f"num_items must be > 0, got {num_items.item()}")
        return num_items.detach()
    if not num_items > 0:
        raise ValueError(f"num_items must be > 0, got {num_items}")
    return torch.full((), float(num_items), dtype=torch.float64, device=input.device)


def check_token_weight(token_weight: Tensor, shape: torch.Size, input: Tensor) -> Tensor:
    """Raises if it is not one number for each token on the input's device."""
    if token_weight.shape != shape:
        raise ValueError(
            f"token_weight must have one number per token, shape {tuple(shape)}, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.device != input.device:
        raise RuntimeError(f"expected token_weight on {input.device}, got {token_weight.device}")
    return token_weight


def _differentiable_token_weight(
    call: _Call,
    weight: Tensor | None,
    token_weight: Tensor,
    num_items: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    inplace: bool,
) -> Tensor:
    """A learned token weight: torch multiplies the rows' losses, and so differentiates it."""
    if composite.is_indices(call.targets):
        targets = call.targets.reshape(call.shape)
        token_weight = composite.weight_tokens(
            token_weight, targets, call.options.ignore_index, token_weight.dtype
        )
    run = ops.cross_entropy_inplace if inplace else ops.cross_entropy
    loss = LossOptions(label_smoothing, z_loss, 0)
    rows = run(call.rows, call.targets, weight, None, None, call.scale, call.options, loss)
    rows = rows.reshape(call.shape) * token_weight
    if reduction != "mean":
        return composite.reduce(rows, rows, _REDUCTIONS[reduction])
    if num_items is None:
        num_items = composite.denominators(
            call.rows,
            call.targets,
            weight,
            token_weight.reshape(call.rows.shape[:-1]),
            call.options.ignore_index,
        ).sum()
    return rows.sum() / num_items
