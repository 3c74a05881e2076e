"""The linear losses as functions: shapes, options and errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext import composite, ops
from llmloss_ext import functional as dense
from llmloss_ext.composite import LogitOptions, real_of
from llmloss_ext.functional import TokenStats
from llmloss_ext.linear import autograd, operators
from llmloss_ext.linear.autograd import ChunkOptions
from llmloss_ext.linear.distillation import check_divergence, kl_div
from llmloss_ext.linear.planning import plan

__all__ = ["linear_cross_entropy", "linear_kl_div", "linear_log_probs", "linear_token_stats"]


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
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> Tensor:
    r"""``cross_entropy(input @ linear_weight.T + linear_bias, target)`` without the N x V logits.

    The tokens are walked through in chunks; the one large buffer holds the logits of one chunk.
    With ``reduction="mean"`` or ``"sum"`` the gradients are formed in the forward pass: three
    matrix products in all. With ``"none"``, backward computes each chunk's logits again: four.
    Arguments are those of torch 2.13's ``F.linear_cross_entropy`` and of
    `llmloss_ext.cross_entropy`, whose formula and options hold.

    Args:
        input: Hidden states (D), (N, D) or (..., D); float32, bfloat16, float16 or float64.
        linear_weight: The projection (V, D), of the input's dtype; under autocast of any, and its
            gradient is then not rounded to the lower one.
        target: Class indices of shape (), (N) or (...), int64 or int32; or probabilities (..., V)
            of the input's dtype.
        linear_bias: (V).
        weight: Class weights (V).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Tokens with this target take no part; None: -100.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        softcap: If given, x = softcap * tanh(logit_scale * logits / softcap).
        logit_scale: Factor of the logits; a 0-d tensor gets its gradient.
        token_weight: A weight for each token, shaped like the target of indices.
        num_items: Replaces the denominator of the mean.
        vocab_size: Only the first ``vocab_size`` rows of the weight take part.
        shift: With 1, the hidden state at position i of the second to last dimension predicts
            ``target[..., i + 1]``; nothing of the size of the hidden states is copied.
        chunk_tokens: Tokens of a chunk; by default what `llmloss_ext.plan` says.
        max_chunk_bytes: The most that the logits of a chunk may take.
        drop_ignored: Whether ignored tokens are left out of the matrix products. By default on a
            CPU; on CUDA it has to wait for the device to know their number.
        weight_grad_dtype: In which the weight's gradient is accumulated over the chunks before it
            is rounded once; by default float32 (float64 for float64).
        weight_grad_accumulator: A (V, D) tensor of that dtype (a trainer's ``main_grad``) to which
            backward adds the weight's gradient; ``linear_weight.grad`` then stays as it is, and
            no V x D buffer is made. Costs the fourth product.

    Returns:
        The loss: 0-d, or of the target's shape for ``reduction="none"``; float32 for 16-bit inputs.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, that
            token's loss is nan instead).
        RuntimeError: A wrong dtype or device.

    Example:
        >>> hidden = model.body(tokens)  # (B, S, D)
        >>> loss = linear_cross_entropy(hidden, model.head.weight, tokens, shift=1)
        >>> loss.backward()
    """
    loss = dense._loss_options(label_smoothing, z_loss, reduction)
    ignored = -100 if ignore_index is None else ignore_index
    call = _LinearCall(
        input, linear_weight, target, linear_bias, weight, ignored, softcap, logit_scale,
        vocab_size, shift,
    )  # fmt: skip
    if num_items is not None:
        num_items = dense._items(num_items, reduction, input)
    if token_weight is not None:
        token_weight = dense._token_weight(token_weight, call.shape, input).reshape(-1)
    is_row_by_row = (
        reduction == "none"
        or weight_grad_accumulator is not None
        or (token_weight is not None and token_weight.requires_grad)
    )
    chunks = call.chunk_options(
        chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype, weight_grad_accumulator
    )
    others_differ = call.has_probabilities and (target.requires_grad or is_row_by_row)
    if ops.in_transform() or others_differ:
        if weight_grad_accumulator is not None:
            raise RuntimeError(
                "weight_grad_accumulator works neither with probability targets nor under "
                "torch.func transforms"
            )
        return call.unfused(token_weight, num_items, reduction, label_smoothing, z_loss)
    if not is_row_by_row:
        return autograd.loss(
            call.hidden, linear_weight, linear_bias, call.scale, call.targets, weight,
            token_weight, num_items, call.options, loss, chunks,
        )  # fmt: skip
    rows = call.stats((False, label_smoothing != 0, False), chunks, weight_grad_accumulator)
    losses = composite.losses_of(
        rows, call.targets, weight, token_weight, call.options.ignore_index, loss
    )
    if reduction == "none":
        return losses.reshape(call.shape)
    items = (weight, token_weight, num_items, ignored, loss.reduction)
    denominator = operators.total_items(call.hidden, call.targets, *items)
    return composite.reduce(losses, denominator, loss.reduction)


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    with_rank: bool = False,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> TokenStats:
    """`llmloss_ext.token_stats` of ``input @ linear_weight.T + linear_bias``, a chunk at a time.

    Differentiable with respect to input, linear_weight, linear_bias and a tensor logit_scale, in
    any combination of the statistics; backward computes each chunk's logits again.

    Args: as in `linear_cross_entropy` and `llmloss_ext.token_stats`.

    Returns:
        A `TokenStats`, each shaped like the target.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.
    """
    call = _LinearCall(
        input, linear_weight, target, linear_bias, weight, ignore_index, softcap, logit_scale,
        vocab_size, shift,
    )  # fmt: skip
    chunks = call.chunk_options(chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype)
    stats = call.stats((True, True, with_rank), chunks)
    log_prob, lse, entropy, mean = (s.reshape(call.shape) for s in stats[:4])
    argmax, rank = (s.reshape(call.shape) if with_rank else None for s in stats[4:6])
    return TokenStats(log_prob, lse, entropy, mean, argmax, rank)


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    shift: int = 0,
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """Log p_target of every token, shaped like the target; 0 at ignored ones.

    What preference and policy losses (DPO, PPO, GRPO) are made of: `linear_token_stats`'s
    ``log_prob`` without the cost of the other statistics. Differentiable.

    Args, errors: as in `linear_token_stats`.
    """
    call = _LinearCall(
        input, linear_weight, target, linear_bias, None, ignore_index, softcap, logit_scale,
        vocab_size, shift,
    )  # fmt: skip
    chunks = call.chunk_options(chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype)
    return call.stats((False, False, False), chunks)[0].reshape(call.shape)


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
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    max_chunk_bytes: int | None = None,
    drop_ignored: bool | None = None,
) -> Tensor:
    r"""Distillation: the divergence of two projections' distributions, neither in memory whole.

    With P the teacher's and Q the student's distribution at ``temperature`` T, per token:
    ``"forward"``: KL(P || Q) = sum P (log P - log Q); ``"reverse"``: KL(Q || P);
    ``"jsd"``: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.
    Each times T^2, which keeps the gradient's size (Hinton et al. 2015).

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., E), without a gradient.
        teacher_weight: (V, E), without a gradient.
        student_bias: (V).
        teacher_bias: (V).
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: Share of the teacher in M, in (0, 1).
        temperature: > 0.
        target: Labels (...), where given, tell which tokens are ignored; nothing else.
        ignore_index: Tokens with this label take no part.
        reduction: ``"mean"`` over the tokens that take part, or ``"sum"``.
        chunk_tokens: Tokens of a chunk.
        max_chunk_bytes: The most that the student's logits of a chunk may take.
        drop_ignored: Whether ignored tokens are left out of the matrix products. By default on a
            CPU; on CUDA it has to wait for the device to know their number.

    Returns:
        The loss, 0-d, in nats; the mean of no token is nan.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        RuntimeError: A wrong dtype.
    """
    check_divergence(direction, beta, temperature)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'linear_kl_div: reduction must be "mean" or "sum", got {reduction!r}')
    _check_projection(student_hidden, student_weight, student_bias)
    _check_projection(teacher_hidden, teacher_weight, teacher_bias)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same tokens, got {tuple(student_hidden.shape)} "
            f"and {tuple(teacher_hidden.shape)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "student and teacher must have the same vocabulary, got "
            f"{student_weight.shape[0]} and {teacher_weight.shape[0]}"
        )
    if target is not None and target.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"target must have one label per token, shape {tuple(student_hidden.shape[:-1])}, got "
            f"{tuple(target.shape)}"
        )
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    if any(t is not None and t.requires_grad for t in teacher):
        raise RuntimeError("linear_kl_div: the teacher gets no gradient; pass it detached")
    if ops.in_transform():
        raise RuntimeError("linear_kl_div does not work under torch.func transforms")
    hidden = _rows(_autocast(student_hidden))
    tokens, features = hidden.shape
    planned = plan(
        tokens, features, student_weight.shape[0], hidden.dtype, hidden.device,
        chunk_tokens=chunk_tokens, max_chunk_bytes=max_chunk_bytes,
    )  # fmt: skip
    valid = None if target is None else (target != ignore_index).reshape(-1)
    if drop_ignored is None:
        drop_ignored = hidden.device.type == "cpu"
    return kl_div(
        hidden, student_weight, student_bias, _rows(_autocast(teacher_hidden)), teacher_weight,
        teacher_bias, valid, direction, beta, temperature, reduction == "mean",
        planned.chunk_tokens, drop_ignored and valid is not None,
    )  # fmt: skip


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dtype not in dense._FLOATS:
        raise RuntimeError(
            f"expected hidden states of float32, bfloat16, float16 or float64, got {hidden.dtype}"
        )
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "expected hidden states (..., D) and a weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"the weight is empty: {tuple(weight.shape)}")
    if weight.device != hidden.device:
        raise RuntimeError(
            f"expected input and weight on the same device, got {hidden.device} and {weight.device}"
        )
    if weight.dtype != hidden.dtype and not _is_autocast(hidden):
        raise RuntimeError(
            f"expected input and weight of the same dtype, got {hidden.dtype} and {weight.dtype}; "
            "convert one, or use torch.autocast"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"the bias must have shape ({weight.shape[0]},) on {weight.device}, got "
            f"{tuple(bias.shape)} on {bias.device}"
        )


def _is_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _autocast(hidden: Tensor) -> Tensor:
    """In the dtype of the products."""
    if not _is_autocast(hidden) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(hidden.device.type))


class _LinearCall:
    """The arguments that all functions share, checked and brought into the operators' shapes.

    Attributes:
        hidden: (N, D), in the dtype of the products.
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
        ignore_index: int,
        softcap: float | None,
        logit_scale: float | Tensor,
        vocab_size: int | None,
        shift: int,
    ) -> None:
        _check_projection(input, linear_weight, linear_bias)
        input = _autocast(input)
        if _is_autocast(input) and target.is_floating_point():
            target = target.to(input.dtype)
        self.linear_weight, self.linear_bias, self.weight = linear_weight, linear_bias, weight
        self.shape = input.shape[:-1]
        self.has_probabilities = target.is_floating_point()
        vocabulary = linear_weight.shape[0]
        expected = (*self.shape, vocabulary) if self.has_probabilities else tuple(self.shape)
        if tuple(target.shape) != expected:
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit hidden states of shape "
                f"{tuple(input.shape)}: expected {expected}"
            )
        if shift:
            target = self._shifted(target, shift, ignore_index)
        self.hidden = _rows(input)
        self.targets = target.reshape(self.hidden.shape[0], *expected[len(self.shape) :])
        # The rest is the dense function's to check, on logits that nobody computes.
        logits = torch.empty_strided(
            (1, vocabulary), (vocabulary, 1), dtype=input.dtype, device="meta"
        )
        checked = dense._Call(
            logits,
            torch.empty((1, vocabulary) if self.has_probabilities else 1, dtype=target.dtype,
                        device="meta"),
            None, softcap, 1.0, vocab_size, ignore_index,
        )  # fmt: skip
        if target.device != input.device:
            raise RuntimeError(
                f"expected input and target on the same device, got {input.device} and "
                f"{target.device}"
            )
        dense._Call._check_weight(checked, weight, vocabulary, input)
        self.scale: Tensor | None = None
        self.options: LogitOptions = checked.options
        if isinstance(logit_scale, Tensor):
            dense._Call._check_scale(logit_scale, input)
            self.scale = logit_scale
        else:
            self.options = self.options._replace(scale=float(logit_scale))

    def _shifted(self, target: Tensor, shift: int, ignore_index: int) -> Tensor:
        if shift < 0 or self.has_probabilities or target.dim() == 0:
            raise ValueError(
                "shift must be an integer >= 0, with class indices (..., S) as targets; got "
                f"shift={shift} and targets of shape {tuple(target.shape)}, {target.dtype}"
            )
        return F.pad(target[..., shift:], (0, min(shift, target.shape[-1])), value=ignore_index)

    def chunk_options(
        self,
        chunk_tokens: int | None,
        max_chunk_bytes: int | None,
        drop_ignored: bool | None,
        weight_grad_dtype: torch.dtype | None,
        accumulator: Tensor | None = None,
    ) -> ChunkOptions:
        """How to walk through the tokens, by the plan."""
        hidden, weight = self.hidden, self.linear_weight
        tokens, features = hidden.shape
        planned = plan(
            tokens, features, weight.shape[0], hidden.dtype, hidden.device,
            chunk_tokens=chunk_tokens, max_chunk_bytes=max_chunk_bytes,
        )  # fmt: skip
        if accumulator is not None:
            weight_grad_dtype = weight_grad_dtype or accumulator.dtype
            if accumulator.shape != weight.shape or accumulator.device != weight.device:
                raise ValueError(
                    f"weight_grad_accumulator must have the weight's shape {tuple(weight.shape)} "
                    f"on {weight.device}, got {tuple(accumulator.shape)} on {accumulator.device}"
                )
            if accumulator.dtype != weight_grad_dtype or not accumulator.is_contiguous():
                raise ValueError(
                    f"weight_grad_accumulator must be contiguous and of {weight_grad_dtype}, got "
                    f"{accumulator.dtype}"
                )
            if accumulator.requires_grad:
                raise ValueError("weight_grad_accumulator must not require a gradient itself")
            if torch.compiler.is_compiling():
                raise RuntimeError("weight_grad_accumulator does not work under torch.compile")
        real = real_of(hidden)
        if weight_grad_dtype not in (None, real, hidden.dtype, weight.dtype):
            raise ValueError(
                f"weight_grad_dtype must be {real} or the weight's dtype, got {weight_grad_dtype}"
            )
        if drop_ignored is None:
            drop_ignored = hidden.device.type == "cpu"
        return ChunkOptions(planned.chunk_tokens, drop_ignored, weight_grad_dtype or real)

    def stats(
        self,
        wanted: tuple[bool, bool, bool],
        chunks: ChunkOptions,
        accumulator: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The statistics of the rows; under transforms from whole logits."""
        if self.has_probabilities:
            raise RuntimeError("statistics: target must hold class indices (int64 or int32)")
        if ops.in_transform():
            where = (self._logits(), self.targets, self.weight, self.scale, self.options)
            return ops.token_stats(*where, wanted)
        return autograd.stats(
            self.hidden, self.linear_weight, self.linear_bias, self.scale, self.targets,
            self.weight, accumulator, self.options, wanted, chunks,
        )  # fmt: skip

    def _logits(self) -> Tensor:
        return autograd._logits(self.hidden, self.linear_weight, self.linear_bias)

    def unfused(
        self,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
    ) -> Tensor:
        """The loss from whole logits, with every derivative."""
        scale = self.options.scale if self.scale is None else self.scale
        loss = dense.cross_entropy(
            self._logits(),
            self.targets,
            weight=self.weight,
            ignore_index=self.options.ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=self.options.softcap or None,
            logit_scale=scale,
            token_weight=token_weight,
            num_items=num_items,
            vocab_size=self.options.vocab_size,
        )
        return loss.reshape(self.shape) if reduction == "none" else loss
