"""Distillation from hidden states: divergences of chunked projections, and labels beside them.

One operator has them all. The teacher is a projection of its own hidden states, or stored
log-probabilities: all of them, or those of k tokens. The student's gradients are formed in the
forward pass: three products, and one more for a teacher's projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_all_dense, check_range, check_target, items_tensor
from ..composite import items_denominator, real_of
from ..divergence import (
    COPIES,
    DIVERGENCE_OPTIONS,
    DistillationLoss,
    DivergenceOptions,
    check_weights,
    coarse_divergence,
    coarse_divergence_with_gradient,
    common_classes,
    divergence,
    divergence_with_gradient,
)
from ..entry import entry_point
from ..ops import can_read, in_transform
from ..ops.namespace import qualified
from ..ops.rows import Labels, LocalRows, Rows, take
from ..options import MEAN, LogitOptions, LossOptions, documented
from .operators import needs_gradients, pack_limit, unpack_limit
from .planning import chunk_limit, dtype_of_logits
from .projection import (
    Gradients,
    Projection,
    as_rows,
    check_projection,
    to_dtype_of_products,
)
from .walk import gradient_dtype, gradient_factor, or_empty

__all__ = ["linear_distillation_loss", "linear_kl_div"]

_NOBODY = -1
"""The label of a token that takes no part."""


class _How(NamedTuple):
    """What the loss of a row is made of, as the operator takes it."""

    direction: Any = None
    """A key of `llmloss_ext.divergence.DIVERGENCES`."""
    share: Any = None
    temperature: Any = None
    add_tail: Any = None
    weight_hard_loss: Any = None
    weight_soft_loss: Any = None


class _Student(NamedTuple):
    """What may have a gradient, or one thing for each of them."""

    hidden: Any = None
    """(N, D), in the dtype of the products."""
    weight: Any = None
    bias: Any = None


class _Others(NamedTuple):
    """What has none, in the order of the operator."""

    teacher: Any = None
    """(N, E) hidden states; (N, W) or (N, k) log-probabilities; None: no soft loss."""
    teacher_weight: Any = None
    """(W, E); None: log-probabilities."""
    teacher_bias: Any = None
    teacher_ids: Any = None
    """(N, k); None: log-probabilities of all classes."""
    labels: Any = None
    """(N), `_NOBODY` where a token takes no part; None: no hard loss."""
    valid: Any = None
    """(N) bool; None: all tokens take part."""
    direction: Any = None
    share: Any = None
    temperature: Any = None
    add_tail: Any = None
    weight_hard_loss: Any = None
    weight_soft_loss: Any = None
    mean: Any = None
    num_items: Any = None
    """Replaces the number of tokens of the mean, 0-d."""
    vocab_size: Any = None
    """The classes that are compared."""
    limit: Any = None
    """Of the chunks, packed."""
    drop_ignored: Any = None
    has_float32_logits: Any = None
    """Also those of 16-bit products."""
    needs: Any = None


class _Teacher:
    """What the teacher says of the tokens of a chunk; ``given`` is None where nobody asks."""

    def __init__(
        self,
        given: Tensor | None,
        projection: Projection | None,
        ids: Tensor | None,
        how: _How,
        vocab_size: int,
    ) -> None:
        self._given, self._projection, self._ids, self._how = given, projection, ids, how
        self._vocab_size = vocab_size
        self._options = DivergenceOptions(
            how.direction, how.share, how.temperature, is_log_probs=projection is None
        )

    def of(self, rows: Rows) -> list[Tensor]:
        """Its logits or log-probabilities, or those of k tokens behind their ids."""
        if self._given is None:
            return []
        given = take(self._given, rows)
        if self._ids is not None:
            return [take(self._ids, rows), given]
        if self._projection is None:
            return [given[:, : self._vocab_size]]
        dtype = self._projection.logits_dtype
        logits = given.new_empty(given.shape[0], self._vocab_size, dtype=dtype)
        self._projection.project(given, logits)
        return [logits]

    def divergence(
        self, student: Tensor, said: Sequence[Tensor], needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of rows of logits, and its gradient if asked for."""
        options = self._options
        if len(said) == 2:
            coarse = (student, said[0], said[1], options, self._how.add_tail)
            if needs_grad:
                return coarse_divergence_with_gradient(*coarse)
            return coarse_divergence(*coarse), None
        if needs_grad:
            return divergence_with_gradient(student, said[0], options)
        return divergence(student, said[0], options), None


def _losses_of_chunk(
    student: Tensor,
    said: list[Tensor],
    labels: Tensor | None,
    valid: Tensor | None,
    teacher: _Teacher,
    how: _How,
    scale: Tensor,
    needs_grad: bool,
) -> Tensor:
    """The sums over rows of hard and soft loss, in float64, without their weights.

    The gradient of the weighted sum, times ``scale``, overwrites the logits. Only some rows at a
    time have float32 copies. Rows that are not valid count as 0.
    """
    total = torch.zeros(2, dtype=torch.float64, device=student.device)
    step = -(-len(student) // COPIES)
    for begin in range(0, len(student), step):
        at = slice(begin, begin + step)
        keep = None if valid is None else valid[at]
        x, *parts = (
            t[at] if keep is None else torch.where(keep[:, None], t[at], 0)
            for t in (student, *said)
        )
        gradient: Tensor | None = None
        if parts:
            rows, gradient = teacher.divergence(x, parts, needs_grad)
            total[1] += (rows if keep is None else torch.where(keep, rows, 0.0)).double().sum()
            if gradient is not None:
                gradient *= how.weight_soft_loss
        if labels is not None:
            hard, of_hard = _cross_entropy(x, labels[at], needs_grad)
            total[0] += hard
            if of_hard is not None:
                of_hard *= how.weight_hard_loss
                gradient = of_hard if gradient is None else gradient.add_(of_hard)
        if gradient is not None:
            gradient *= scale if keep is None else torch.where(keep, scale, 0.0)[:, None]
            student[at].copy_(gradient)
    return total


def _cross_entropy(
    logits: Tensor, labels: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum over rows by the kernels, and its gradient in float32."""
    options = LogitOptions(1.0, 0.0, _NOBODY, logits.shape[1])
    kernels = LocalRows(None, None, options)
    one = torch.ones(2, dtype=real_of(logits), device=logits.device)
    given = (Labels(labels), one, LossOptions(reduction=MEAN))
    if not needs_grad:
        return kernels.losses(logits.contiguous(), *given), None
    x = logits.to(real_of(logits), copy=True, memory_format=torch.contiguous_format)
    loss, _ = kernels.losses_and_gradient_(x, *given, False)
    return loss, x


@torch.library.custom_op(qualified("linear_divergence"), mutates_args=())
def linear_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_ids: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    direction: str,
    share: float,
    temperature: float,
    add_tail: bool,
    weight_hard_loss: float,
    weight_soft_loss: float,
    mean: bool,
    num_items: Tensor | None,
    vocab_size: int,
    limit: Sequence[int],
    drop_ignored: bool,
    has_float32_logits: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hard and soft loss, the gradients of student, student_weight and student_bias, their factor.

    ``needs`` says which gradients; those not asked for come back without elements.
    """
    how = _How(direction, share, temperature, add_tail, weight_hard_loss, weight_soft_loss)
    projection = Projection(
        student, student_weight, student_bias, vocab_size, has_float32_logits=has_float32_logits
    )
    theirs: Projection | None = None
    if teacher is not None and teacher_weight is not None:
        theirs = Projection(
            teacher, teacher_weight, teacher_bias, vocab_size,
            has_float32_logits=has_float32_logits,
        )  # fmt: skip
    says = _Teacher(teacher, theirs, teacher_ids, how, vocab_size)
    real = real_of(student)
    asked = _Student(*needs)
    gradients = Gradients(
        projection, asked.hidden, asked.weight, asked.bias, real,
        gradient_dtype(student, student_weight),
    )  # fmt: skip
    count = student.shape[0] if valid is None else valid.sum()
    divisor = torch.as_tensor(count if mean else 1, device=student.device).to(real)
    if num_items is not None:
        divisor, _ = items_denominator(num_items, real)
    factor = gradient_factor(student, divisor)
    scale = 1 / (divisor * factor)
    total = torch.zeros(2, dtype=torch.float64, device=student.device)
    for chunk in projection.chunks(unpack_limit(limit), valid, drop=drop_ignored):
        student_logits = chunk.logits[:, :vocab_size]
        said = says.of(chunk.rows)
        total += _losses_of_chunk(
            student_logits, said, None if labels is None else take(labels, chunk.rows),
            chunk.counts, says, how, scale, any(needs),
        )  # fmt: skip
        if any(needs):
            gradients.add(chunk)
        del chunk, student_logits, said
    return (
        (total / divisor).to(real),
        or_empty(gradients.hidden, student),
        or_empty(gradients.weight_result(), student),
        or_empty(gradients.bias, student),
        factor,
    )


@linear_divergence.register_fake
def _(  # type: ignore[no-untyped-def]
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, teacher_ids,
    labels, valid, direction, share, temperature, add_tail, weight_hard_loss, weight_soft_loss,
    mean, num_items, vocab_size, limit, drop_ignored, has_float32_logits, needs,
):  # fmt: skip
    real, asked = real_of(student), _Student(*needs)
    empty = student.new_empty
    has_bias = asked.bias and student_bias is not None
    of_weight = gradient_dtype(student, student_weight)
    return (
        empty(2, dtype=real),
        empty(student.shape if asked.hidden else 0),
        empty(student_weight.shape, dtype=of_weight) if asked.weight else empty(0),
        empty(student_bias.shape, dtype=real) if has_bias else empty(0),
        empty((), dtype=real),
    )


class LinearDivergence(Function):
    """The gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss, hard and soft loss; arguments: a `_Student` and its `_Others`."""
        count = len(_Student._fields)
        student, others = _Student(*args[:count]), _Others(*args[count:])
        losses, *results = linear_divergence(*student, *others)
        hard, soft = losses.unbind()
        hard, soft = hard.clone(), soft.clone()
        ctx.needs = others.needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*results)
        ctx.dtypes = [None if t is None else t.dtype for t in student]
        ctx.mark_non_differentiable(hard, soft)
        # A term that is not computed is 0, also where its weight is.
        loss = others.weight_soft_loss * soft
        if others.labels is not None:
            hards = others.weight_hard_loss * hard
            loss = hards if others.teacher is None else loss + hards
        return loss, hard, soft

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Multiplies what the forward pass has left by the gradient of the loss."""
        if grad_loss is None:
            return (*_Student(), *_Others())
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_kl_div and linear_distillation_loss have no second-order gradient"
            )
        *gradients, factor = ctx.saved_tensors
        factor = factor * grad_loss
        results = (
            (g * factor).to(dtype) if asked else None
            for g, dtype, asked in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        )
        return (*results, *_Others())


@entry_point("student_hidden", "teacher_hidden", "target")
@partial(
    documented,
    names=(
        "direction", "beta", "skew_alpha", "temperature", "num_items", "vocab_size",
        "chunk_tokens", "max_chunk_bytes", "drop_ignored", "logits_dtype",
    ),
    table=DIVERGENCE_OPTIONS,
)  # fmt: skip
def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Distillation: the divergence of two projections' distributions, neither in memory whole.

    Times T^2, in nats. Four products: three for the student, one for the teacher.

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., E). The teacher is taken as a constant.
        teacher_weight: (W, E).
        student_bias: (V).
        teacher_bias: (W).
        target: Labels (...), where given, tell which tokens are ignored; nothing else.
        ignore_index: Tokens with this label take no part, whatever stands there.
        reduction: ``"mean"`` over the tokens that take part, or ``"sum"``.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        The loss, 0-d, in nats; the mean of no token is nan.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        RuntimeError: A wrong dtype.
    """
    call = _Call(
        "linear_kl_div", _Student(student_hidden, student_weight, student_bias),
        _Said(teacher_hidden, teacher_weight, teacher_bias), target, ignore_index, vocab_size,
        logits_dtype,
    )  # fmt: skip
    options = DivergenceOptions.of(direction, beta, skew_alpha, temperature)
    how = _How(*options[:3], True, 0.0, 1.0)
    return call.run(how, reduction, num_items, chunk_tokens, max_chunk_bytes, drop_ignored).loss


@entry_point("student_hidden", "teacher_hidden", "target", "teacher_log_probs", "teacher_ids")
@partial(
    documented,
    names=(
        "weight_hard_loss", "weight_soft_loss", "add_tail", "direction", "beta", "skew_alpha",
        "temperature", "num_items", "vocab_size", "chunk_tokens", "max_chunk_bytes", "drop_ignored",
        "logits_dtype",
    ),
    table=DIVERGENCE_OPTIONS,
)  # fmt: skip
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    add_tail: bool = True,
    direction: str = "forward",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    logits_dtype: torch.dtype | None = None,
) -> DistillationLoss:
    """Cross entropy with labels and divergence from a teacher, from one walk over hidden states.

    weight_hard_loss times the cross entropy plus weight_soft_loss times T^2 times the divergence,
    both of the same logits of the student, which exist for a chunk of tokens at a time: three
    products for the student, and one for a teacher's hidden states. Names and order are those of
    Liger's `LigerFusedLinearDistillationBase`; but tokens without a label are left out of both
    terms, and of what the mean divides by.

    A teacher is one of: ``teacher_hidden`` and ``teacher_weight``; ``teacher_log_probs`` of all
    classes; ``teacher_log_probs`` of the k tokens ``teacher_ids``, as in
    `llmloss_ext.losses.top_k_distillation_loss`. It is taken as a constant.

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., E).
        teacher_weight: (W, E).
        target: Labels (...), int64 or int32; None: no token is ignored, and there is no hard loss,
            whose weight must be 0.
        student_bias: (V).
        teacher_bias: (W).
        teacher_log_probs: (..., W) or (..., k): log_softmax(teacher_logits / T), or of it what was
            stored.
        teacher_ids: (..., k) int64, different tokens.
        ignore_index: Tokens with this label take no part, whatever stands there.
        reduction: ``"mean"`` over the tokens that take part, or ``"sum"``.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `DistillationLoss`, 0-d, in nats; the mean of no token is nan.

    Raises:
        ValueError: Shapes that do not fit, an option out of range, or no teacher.
        IndexError: A label outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, the loss
            is nan instead).
        RuntimeError: A wrong dtype.
    """
    check_weights(weight_hard_loss=weight_hard_loss, weight_soft_loss=weight_soft_loss)
    if target is None and weight_hard_loss:
        raise ValueError("a hard loss needs a target; without one, weight_hard_loss must be 0")
    call = _Call(
        "linear_distillation_loss", _Student(student_hidden, student_weight, student_bias),
        _Said(teacher_hidden, teacher_weight, teacher_bias, teacher_log_probs, teacher_ids), target,
        ignore_index, vocab_size, logits_dtype,
    )  # fmt: skip
    options = DivergenceOptions.of(direction, beta, skew_alpha, temperature)
    how = _How(*options[:3], add_tail, float(weight_hard_loss), float(weight_soft_loss))
    return call.run(how, reduction, num_items, chunk_tokens, max_chunk_bytes, drop_ignored)


class _Said(NamedTuple):
    """The teacher, as it was given."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    log_probs: Tensor | None = None
    ids: Tensor | None = None

    def check(self, tokens: torch.Size, columns: int) -> int:
        """Returns the number of its classes, of a student that has so many.

        Raises:
            ValueError: It is given twice, in part, or for other tokens.
        """
        if (self.hidden is None) != (self.weight is None):
            raise ValueError("a teacher's hidden states need its weight, and the other way round")
        if (self.hidden is None) == (self.log_probs is None):
            raise ValueError(
                "a teacher is given as hidden states and weight, or as teacher_log_probs"
            )
        given = self.log_probs if self.hidden is None else self.hidden
        assert given is not None
        if not given.dim() or given.shape[:-1] != tokens:
            raise ValueError(
                f"student and teacher must have the same tokens, got {tuple(tokens)} and "
                f"{tuple(given.shape[:-1])}"
            )
        if self.hidden is not None:
            if self.ids is not None:
                raise ValueError("teacher_ids belong to teacher_log_probs")
            assert self.weight is not None
            return self.weight.shape[0]
        if self.bias is not None:
            raise ValueError("teacher_bias belongs to teacher_hidden")
        if self.ids is None:
            return given.shape[-1]
        if self.ids.shape != given.shape:
            raise ValueError(
                f"teacher_ids must have the shape of teacher_log_probs, {tuple(given.shape)}, got "
                f"{tuple(self.ids.shape)}"
            )
        return columns


class _Call:
    """The arguments that both functions share, checked."""

    def __init__(
        self,
        name: str,
        student: _Student,
        teacher: _Said,
        target: Tensor | None,
        ignore_index: int,
        vocab_size: int | None,
        logits_dtype: torch.dtype | None,
    ) -> None:
        optional = {f"teacher_{key}": t for key, t in teacher._asdict().items()}
        check_all_dense(
            {"student_hidden": student.hidden, "student_weight": student.weight},
            {"student_bias": student.bias, "target": target, **optional},
        )
        is_wide = check_projection(*student, logits_dtype)
        if teacher.hidden is not None and teacher.weight is not None:
            is_wide |= check_projection(teacher.hidden, teacher.weight, teacher.bias, logits_dtype)
        tokens, columns = student.hidden.shape[:-1], student.weight.shape[0]
        classes = teacher.check(tokens, columns)
        if target is not None and target.shape != tokens:
            raise ValueError(
                f"target must have one label per token, shape {tuple(tokens)}, got "
                f"{tuple(target.shape)}"
            )
        if in_transform():
            raise RuntimeError(f"{name} does not work under torch.func transforms")
        self._name, self._student, self._teacher = name, student, teacher
        self._target, self._ignore_index, self._is_wide = target, ignore_index, is_wide
        self._vocab_size = common_classes(columns, classes, vocab_size)

    def run(
        self,
        how: _How,
        reduction: str,
        num_items: int | Tensor | None,
        chunk_tokens: int | None,
        max_chunk_bytes: int | None,
        drop_ignored: bool | None,
    ) -> DistillationLoss:
        """One walk."""
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{self._name}: reduction must be "mean" or "sum", got {reduction!r}')
        given = self._student
        hidden = as_rows(to_dtype_of_products(given.hidden, given.weight))
        dtype = dtype_of_logits(hidden.dtype, has_float32_logits=self._is_wide)
        limit = chunk_limit(
            given.weight.shape[0], dtype, hidden.device.type, chunk_tokens, max_chunk_bytes
        )
        target, valid, labels = self._target, None, None
        if target is not None:
            valid = (target != self._ignore_index).reshape(-1)
            if how.weight_hard_loss:
                labels = self._labels(target, valid)
        if drop_ignored is None:
            drop_ignored = hidden.device.type == "cpu"
        student = _Student(hidden, given.weight, given.bias)
        teacher = self._teacher if how.weight_soft_loss else _Said(None, None, None)
        given_teacher, its_weight, its_bias, its_ids = self._rows_of(teacher)
        others = _Others(
            teacher=given_teacher,
            teacher_weight=its_weight,
            teacher_bias=its_bias,
            teacher_ids=its_ids,
            labels=labels,
            valid=valid,
            direction=how.direction,
            share=how.share,
            temperature=how.temperature,
            add_tail=how.add_tail,
            weight_hard_loss=how.weight_hard_loss,
            weight_soft_loss=how.weight_soft_loss,
            mean=reduction == "mean",
            num_items=items_tensor(num_items, reduction, given.hidden),
            vocab_size=self._vocab_size,
            limit=pack_limit(limit),
            drop_ignored=drop_ignored and valid is not None,
            has_float32_logits=self._is_wide,
            needs=needs_gradients(student),
        )
        results = LinearDivergence.apply(*student, *others)  # type: ignore[no-untyped-call]
        return DistillationLoss(*results)

    def _labels(self, target: Tensor, valid: Tensor) -> Tensor:
        """Of the tokens, `_NOBODY` where they take no part."""
        if target.is_floating_point():
            raise RuntimeError(f"expected labels of int64 or int32, got {target.dtype}")
        target = check_target(target, self._student.hidden, self._ignore_index)
        if can_read(target):
            check_range(target, self._ignore_index, self._vocab_size)
        flat = target.reshape(-1).long()
        # What is no class stays so, whichever number stands for nobody.
        out = torch.where(flat < 0, self._vocab_size, flat)
        return torch.where(valid, out, _NOBODY)

    def _rows_of(self, teacher: _Said) -> tuple[Tensor | None, ...]:
        """Hidden states or log-probabilities (N, ...), weight, bias and ids."""
        ids = None if teacher.ids is None else as_rows(teacher.ids)
        if teacher.hidden is None or teacher.weight is None:
            log_probs = None if teacher.log_probs is None else as_rows(teacher.log_probs.detach())
            return log_probs, None, None, ids
        hidden = to_dtype_of_products(teacher.hidden.detach(), teacher.weight)
        bias = None if teacher.bias is None else teacher.bias.detach()
        return as_rows(hidden), teacher.weight.detach(), bias, ids
