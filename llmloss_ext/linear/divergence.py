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
    Distillation,
    DistillationLoss,
    DivergenceOptions,
    coarse_divergence,
    coarse_divergence_with_gradient,
    common_classes,
    divergence,
    divergence_with_gradient,
)
from ..entry import entry_point
from ..ops import can_read, in_transform
from ..ops.namespace import qualified
from ..ops.rows import Labels, LocalRows, Rows, put, take
from ..options import MEAN, LogitOptions, LossOptions, documented, spelled_out, with_defaults
from ..statistics import asked
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


class _Student(NamedTuple):
    """What may have a gradient, or one thing for each of them."""

    hidden: Any = None
    """(N, D), in the dtype of the products."""
    weight: Any = None
    bias: Any = None


class _Constants(NamedTuple):
    """Tensors that have none."""

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
    num_items: Any = None
    """Replaces the number of tokens of the mean, 0-d."""


class _How(NamedTuple):
    """What the loss is made of, and how the walk goes: the numbers of the operator."""

    direction: str
    """A key of `llmloss_ext.divergence.DIVERGENCES`."""
    share: float
    temperature: float
    add_tail: bool
    weight_hard_loss: float
    weight_soft_loss: float
    reduction: str
    vocab_size: int
    """The classes that are compared."""
    limit: list[int]
    """Of the chunks, packed."""
    drop_ignored: bool
    has_float32_logits: bool
    """Also those of 16-bit products."""


class Given(NamedTuple):
    """What the operator takes."""

    student: _Student
    constants: _Constants
    how: _How

    @classmethod
    def unpack(cls, arguments: Sequence[Any]) -> Given:
        """From the operator's flat arguments."""
        tensors, others = len(_Student._fields), len(_Constants._fields)
        student = _Student(*arguments[:tensors])
        constants = _Constants(*arguments[tensors : tensors + others])
        return cls(student, constants, _How(*arguments[tensors + others :]))

    def pack(self) -> tuple[Any, ...]:
        """The operator's flat arguments."""
        return (*self.student, *self.constants, *self.how)

    def counts(self, upstream: Tensor | None) -> Tensor | None:
        """(N) bool: the tokens that take part; None: all."""
        valid: Tensor | None = self.constants.valid
        if upstream is None:
            return valid
        return upstream != 0 if valid is None else valid & (upstream != 0)


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
    scale: Tensor | None,
) -> Tensor:
    """The hard and soft losses without their weights: (2) sums in float64, or (2, n) of the rows.

    The gradient of the weighted sum, times ``scale`` (0-d, or of each row), overwrites the logits;
    None: there is none. Only some rows at a time have float32 copies. Rows that are not valid count
    as 0.
    """
    by_rows, needs_grad = how.reduction == "none", scale is not None
    shape = (2, len(student)) if by_rows else (2,)
    dtype = real_of(student) if by_rows else torch.float64
    losses = torch.zeros(shape, dtype=dtype, device=student.device)
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
            rows = rows if keep is None else torch.where(keep, rows, 0.0)
            if by_rows:
                losses[1, at] = rows
            else:
                losses[1] += rows.double().sum()
            if gradient is not None:
                gradient *= how.weight_soft_loss
        if labels is not None:
            if needs_grad:
                hard, of_hard = _cross_entropy_with_gradient(x, labels[at])
                of_hard *= how.weight_hard_loss
                gradient = of_hard if gradient is None else gradient.add_(of_hard)
            else:
                hard = _cross_entropy(x, labels[at], by_rows)
            if not by_rows:
                losses[0] += hard
            elif not needs_grad:  # else they are known already
                losses[0, at] = hard
        if gradient is not None and scale is not None:
            of = scale[at] if scale.dim() else scale.expand(len(x))
            gradient *= (of if keep is None else torch.where(keep, of, 0.0)).unsqueeze(-1)
            student[at].copy_(gradient)
    return losses


def _kernels(
    logits: Tensor, labels: Tensor
) -> tuple[LocalRows, tuple[Labels, Tensor, LossOptions]]:
    kernels = LocalRows(None, None, LogitOptions(1.0, 0.0, _NOBODY, logits.shape[1]))
    one = torch.ones(2, dtype=real_of(logits), device=logits.device)
    return kernels, (Labels(labels), one, LossOptions(reduction=MEAN))


def _cross_entropy(logits: Tensor, labels: Tensor, by_rows: bool) -> Tensor:
    """Of each row, or the sum, by the kernels."""
    kernels, given = _kernels(logits, labels)
    if by_rows:
        stats = kernels.statistics(logits.contiguous(), labels, asked(("log_prob", "lse")))
        return -stats.floats.log_prob
    return kernels.losses(logits.contiguous(), *given)


def _cross_entropy_with_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over rows, and its gradient in float32."""
    kernels, given = _kernels(logits, labels)
    x = logits.to(real_of(logits), copy=True, memory_format=torch.contiguous_format)
    loss, _ = kernels.losses_and_gradient_(x, *given, False)
    return loss, x


@torch.library.custom_op(
    qualified("linear_divergence"), mutates_args=(),
    schema="(Tensor? upstream, bool[] needs, Tensor student, Tensor student_weight, "
    "Tensor? student_bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_ids, Tensor? labels, Tensor? valid, Tensor? num_items, str direction, "
    "float share, float temperature, bool add_tail, float weight_hard_loss, "
    "float weight_soft_loss, str reduction, SymInt vocab_size, SymInt[] limit, bool drop_ignored, "
    "bool has_float32_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def linear_divergence(
    upstream: Tensor | None, needs: Sequence[bool], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hard and soft loss, the gradients of student, student_weight and student_bias, their factor.

    ``needs`` says which gradients; those not asked for come back without elements. Without a
    reduction the losses are (2, N), and ``upstream`` (N) is what the gradients are of: with them,
    the losses are not looked at.
    """
    given = Given.unpack(arguments)
    (student, weight, bias), constants, how = given
    vocab_size, is_wide = how.vocab_size, how.has_float32_logits
    projection = Projection(student, weight, bias, vocab_size, has_float32_logits=is_wide)
    theirs: Projection | None = None
    if constants.teacher is not None and constants.teacher_weight is not None:
        theirs = Projection(*constants[:3], vocab_size, has_float32_logits=is_wide)
    says = _Teacher(constants.teacher, theirs, constants.teacher_ids, how, vocab_size)
    real = real_of(student)
    asked_for = _Student(*needs)
    gradients = Gradients(
        projection, asked_for.hidden, asked_for.weight, asked_for.bias, real,
        gradient_dtype(student, weight),
    )  # fmt: skip
    tokens, by_rows, counts = student.shape[0], how.reduction == "none", given.counts(upstream)
    divisor = torch.ones((), dtype=real, device=student.device)
    if constants.num_items is not None:
        divisor, _ = items_denominator(constants.num_items, real)
    elif how.reduction == "mean":
        count = tokens if counts is None else counts.sum()
        divisor = torch.as_tensor(count, device=student.device).to(real)
    factor = gradient_factor(student, divisor)
    scale = 1 / (divisor * factor) if any(needs) and not by_rows else None
    shape, dtype = ((2, tokens), real) if by_rows else ((2,), torch.float64)
    total = torch.zeros(shape, dtype=dtype, device=student.device)
    for chunk in projection.chunks(unpack_limit(how.limit), counts, drop=how.drop_ignored):
        said = says.of(chunk.rows)
        losses = _losses_of_chunk(
            chunk.logits[:, :vocab_size], said,
            None if constants.labels is None else take(constants.labels, chunk.rows),
            chunk.counts, says, how, scale if upstream is None else take(upstream, chunk.rows),
        )  # fmt: skip
        if by_rows:
            put(total.t(), chunk.rows, losses.t())
        else:
            total += losses
        if any(needs):
            gradients.add(chunk)
        del chunk, said
    return (
        (total / divisor).to(real),
        or_empty(gradients.hidden, student),
        or_empty(gradients.weight_result(), student),
        or_empty(gradients.bias, student),
        factor,
    )


@linear_divergence.register_fake
def _(
    upstream: Tensor | None, needs: Sequence[bool], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (student, weight, bias), _, how = Given.unpack(arguments)
    real, asked_for = real_of(student), _Student(*needs)
    empty = student.new_empty
    has_bias = asked_for.bias and bias is not None
    of_weight = gradient_dtype(student, weight)
    return (
        empty((2, student.shape[0]) if how.reduction == "none" else 2, dtype=real),
        empty(student.shape if asked_for.hidden else 0),
        empty(weight.shape, dtype=of_weight) if asked_for.weight else empty(0),
        empty(bias.shape, dtype=real) if has_bias else empty(0),
        empty((), dtype=real),
    )


class LinearDivergence(Function):
    """With a reduction the gradients are formed in the forward pass, chunk by chunk.

    Without, backward computes each chunk's logits again, the teacher's too.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss, hard and soft loss.

        Arguments: a `_Student`, its `_Constants`, a `_How`, and which gradients are needed.
        """
        *tensors, how, needs = args
        given = Given.unpack((*tensors, *how))
        ctx.how, ctx.needs, by_rows = how, needs, how.reduction == "none"
        asked_now = [False] * len(needs) if by_rows else needs
        losses, *results = linear_divergence(None, asked_now, *given.pack())
        hard, soft = losses.unbind()
        hard, soft = hard.clone(), soft.clone()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(tensors if by_rows else results))
        ctx.dtypes = [None if t is None else t.dtype for t in given.student]
        ctx.mark_non_differentiable(hard, soft)
        # A term that is not computed is 0, also where its weight is.
        loss = how.weight_soft_loss * soft
        if given.constants.labels is not None:
            hards = how.weight_hard_loss * hard
            loss = hards if given.constants.teacher is None else loss + hards
        return loss, hard, soft

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients, of what the forward pass has left or of another walk."""
        others = (*_Constants(), None, None)
        if grad_loss is None:
            return (*_Student(), *others)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_kl_div and linear_distillation_loss have no second-order gradient"
            )
        if ctx.how.reduction == "none":
            saved = (*ctx.saved_tensors, *ctx.how)
            _, *gradients, factor = linear_divergence(grad_loss.contiguous(), ctx.needs, *saved)
        else:
            *gradients, factor = ctx.saved_tensors
            factor = factor * grad_loss
        results = (
            (g * factor).to(dtype) if asked_for else None
            for g, dtype, asked_for in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        )
        return (*results, *others)


_OF_WALK = ("chunk_tokens", "max_chunk_bytes", "drop_ignored", "logits_dtype")
_OF_DISTILLATION = (*Distillation._fields, *_OF_WALK)
_ALONE = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "add_tail": True}
"""Those of a divergence without labels."""
_OF_KL = tuple(name for name in _OF_DISTILLATION if name not in _ALONE)


@entry_point("student_hidden", "teacher_hidden", "target")
@partial(documented, names=_OF_KL, table=DIVERGENCE_OPTIONS)
@partial(spelled_out, names=_OF_KL, table=DIVERGENCE_OPTIONS)
def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""Distillation: the divergence of two projections' distributions, neither in memory whole.

    Times T^2, in nats. Four products: three for the student, one for the teacher. Without a
    reduction six: backward computes the logits of both again.

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., E). The teacher is taken as a constant.
        teacher_weight: (W, E).
        student_bias: (V).
        teacher_bias: (W).
        target: Labels (...), where given, tell which tokens are ignored; nothing else.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        The loss, 0-d, or (...) for ``"none"``, in nats; the mean of no token is nan.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        RuntimeError: A wrong dtype.
    """
    given = with_defaults(options, _OF_KL, DIVERGENCE_OPTIONS)
    teacher = _Said(teacher_hidden, teacher_weight, teacher_bias)
    student = _Student(student_hidden, student_weight, student_bias)
    return _run("linear_kl_div", student, teacher, target, **_ALONE, **given).loss


@entry_point("student_hidden", "teacher_hidden", "target", "teacher_log_probs", "teacher_ids")
@partial(documented, names=_OF_DISTILLATION, table=DIVERGENCE_OPTIONS)
@partial(spelled_out, names=_OF_DISTILLATION, table=DIVERGENCE_OPTIONS)
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
    **options: Any,
) -> DistillationLoss:
    """Cross entropy with labels and divergence from a teacher, from one walk over hidden states.

    weight_hard_loss times the cross entropy plus weight_soft_loss times T^2 times the divergence,
    both of the same logits of the student, which exist for a chunk of tokens at a time: three
    products for the student, and one for a teacher's hidden states. Without a reduction, backward
    computes all logits again. Names and order are those of Liger's
    `LigerFusedLinearDistillationBase`; but tokens without a label are left out of both terms, and
    of what the mean divides by.

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
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `DistillationLoss`, 0-d, or (...) for ``"none"``, in nats; the mean of no token is nan.

    Raises:
        ValueError: Shapes that do not fit, an option out of range, or no teacher.
        IndexError: A label outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, the loss
            is nan instead).
        RuntimeError: A wrong dtype.
    """
    teacher = _Said(teacher_hidden, teacher_weight, teacher_bias, teacher_log_probs, teacher_ids)
    student = _Student(student_hidden, student_weight, student_bias)
    return _run("linear_distillation_loss", student, teacher, target, **options)


def _run(
    name: str, student: _Student, teacher: _Said, target: Tensor | None, **options: Any
) -> DistillationLoss:
    walk = {option: options.pop(option, None) for option in _OF_WALK}
    given = Distillation.of(options)
    if target is None and given.weight_hard_loss:
        raise ValueError("a hard loss needs a target; without one, weight_hard_loss must be 0")
    return _Call(name, student, teacher, target, walk.pop("logits_dtype")).run(given, **walk)


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
        self._student, self._teacher, self._classes = student, teacher, (columns, classes)
        self._target, self._is_wide = target, is_wide

    def run(
        self,
        given: Distillation,
        chunk_tokens: int | None,
        max_chunk_bytes: int | None,
        drop_ignored: bool | None,
    ) -> DistillationLoss:
        """One walk; without a reduction, another one in backward."""
        if given.reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {given.reduction!r}')
        used = common_classes(*self._classes, given.vocab_size)
        divergence_options = given.divergence()
        hidden, weight, bias = self._student
        tokens, items = hidden.shape[:-1], items_tensor(given.num_items, given.reduction, hidden)
        hidden = as_rows(to_dtype_of_products(hidden, weight))
        dtype = dtype_of_logits(hidden.dtype, has_float32_logits=self._is_wide)
        kind = hidden.device.type
        limit = chunk_limit(weight.shape[0], dtype, kind, chunk_tokens, max_chunk_bytes)
        target, valid, labels = self._target, None, None
        if target is not None:
            valid = (target != given.ignore_index).reshape(-1)
            if given.weight_hard_loss:
                labels = self._labels(target, valid, given.ignore_index, used)
        drops = kind == "cpu" if drop_ignored is None else drop_ignored
        by_rows = given.reduction == "none"
        how = _How(
            *divergence_options[:3], given.add_tail, float(given.weight_hard_loss),
            float(given.weight_soft_loss), given.reduction, used, pack_limit(limit),
            drops and (by_rows or valid is not None), self._is_wide,
        )  # fmt: skip
        student = _Student(hidden, weight, bias)
        teacher = self._teacher if given.weight_soft_loss else _Said(None, None, None)
        constants = _Constants(*self._rows_of(teacher), labels, valid, items)
        results = LinearDivergence.apply(  # type: ignore[no-untyped-call]
            *student, *constants, how, needs_gradients(student)
        )
        if by_rows:
            results = (x.reshape(tokens) for x in results)
        return DistillationLoss(*results)

    def _labels(self, target: Tensor, valid: Tensor, ignored: int, classes: int) -> Tensor:
        """Of the tokens, `_NOBODY` where they take no part."""
        if target.is_floating_point():
            raise RuntimeError(f"expected labels of int64 or int32, got {target.dtype}")
        target = check_target(target, self._student.hidden, ignored)
        if can_read(target):
            check_range(target, ignored, classes)
        flat = target.reshape(-1).long()
        # What is no class stays so, whichever number stands for nobody.
        out = torch.where(flat < 0, classes, flat)
        return torch.where(valid, out, _NOBODY)

    def _rows_of(
        self, teacher: _Said
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states or log-probabilities (N, ...), weight, bias and ids."""
        ids = None if teacher.ids is None else as_rows(teacher.ids)
        if teacher.hidden is None or teacher.weight is None:
            log_probs = None if teacher.log_probs is None else as_rows(teacher.log_probs.detach())
            return log_probs, None, None, ids
        hidden = to_dtype_of_products(teacher.hidden.detach(), teacher.weight)
        bias = None if teacher.bias is None else teacher.bias.detach()
        return as_rows(hidden), teacher.weight.detach(), bias, ids
