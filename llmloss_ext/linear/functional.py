"""The linear losses as functions: shapes, options and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmloss_ext import composite, ops
from llmloss_ext import functional as dense
from llmloss_ext.functional import TokenStats
from llmloss_ext.linear import autograd
from llmloss_ext.linear.call import (
    LinearCall,
    as_rows,
    check_projection,
    to_dtype_of_products,
)
from llmloss_ext.linear.chunked import total_items
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
    options: Any = None,
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
        linear_weight: The projection (V, D), or for a K-dimensional loss (V, d1, ..., dK, D), of
            the input's dtype; under autocast of any, and its gradient is then not rounded to the
            lower one.
        target: Class indices of shape (), (N) or (...), int64 or int32; or probabilities (..., V),
            which are converted to the input's dtype. K-dimensional: (N, d1, ..., dK), or
            (N, V, d1, ..., dK).
        linear_bias: (V), or (V, d1, ..., dK).
        weight: Class weights (V).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Tokens with this target take no part; None: -100.
        label_smoothing: In [0, 1].
        options: A `torch.nn.LinearCrossEntropyOptions`: its ``batch_chunk_size`` is taken as
            ``chunk_tokens`` and its ``acc_dtype`` as ``weight_grad_dtype``. The rest chooses
            between ways of torch's that there are not here.
        z_loss: Factor of lse^2.
        softcap: If given, x = softcap * tanh(logit_scale * logits / softcap).
        logit_scale: Factor of the logits; a 0-d tensor gets its gradient.
        token_weight: A weight for each token, shaped like the target of indices. It belongs to the
            label, and is shifted with it.
        num_items: Replaces the denominator of the mean.
        vocab_size: Only the first ``vocab_size`` rows of the weight take part.
        shift: With 1, the hidden state at position i of the second to last dimension predicts
            ``target[..., i + 1]``; nothing of the size of the hidden states is copied. Without a
            reduction, the loss of that label stands at position i.
        chunk_tokens: Tokens of a chunk at most; by default what `llmloss_ext.plan` says.
        max_chunk_bytes: The most that the logits of a chunk may take.
        drop_ignored: Whether ignored tokens are left out of the matrix products. By default on a
            CPU; on CUDA it has to wait for the device to know their number. Where they are not
            left out, their hidden states must be finite: the weight's gradient adds 0 times them.
        weight_grad_dtype: In which the weight's gradient is accumulated over the chunks before it
            is rounded once; by default float32 (float64 for float64). float16, which could not hold
            such a sum before the mean divides it, is taken for float32 unless reduction is "none".
        weight_grad_accumulator: A (V, D) tensor of that dtype (a trainer's ``main_grad``) to which
            backward adds the weight's gradient; ``linear_weight.grad`` then stays as it is, and
            no V x D buffer is made. Costs the fourth product.

    Returns:
        The loss: 0-d, or of the target's shape for ``reduction="none"``; float32 for 16-bit inputs.

    Raises:
        ValueError: Shapes that do not fit, or an option out of range.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index`` (on CUDA, that
            token's loss is nan instead).
        TypeError: An integer option that is none, or ``options`` that are not torch's.
        RuntimeError: A wrong dtype or device.

    Example:
        >>> hidden = model.body(tokens)  # (B, S, D)
        >>> loss = linear_cross_entropy(hidden, model.head.weight, tokens, shift=1)
        >>> loss.backward()
    """
    loss = dense.loss_options(label_smoothing, z_loss, reduction)
    if options is not None:
        chunk_tokens, weight_grad_dtype = _torchs_options(options, chunk_tokens, weight_grad_dtype)
    if linear_weight.dim() > 2:
        if shift or weight_grad_accumulator is not None:
            raise ValueError(
                "shift and weight_grad_accumulator need a weight (V, D), got "
                f"{tuple(linear_weight.shape)}"
            )
        return _multi_dimensional(
            input, linear_weight, target, linear_bias, token_weight, reduction, num_items,
            weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size,
            chunk_tokens=chunk_tokens, max_chunk_bytes=max_chunk_bytes, drop_ignored=drop_ignored,
            weight_grad_dtype=weight_grad_dtype,
        )  # fmt: skip
    call = LinearCall(
        input, linear_weight, target, linear_bias, weight, ignore_index, softcap, logit_scale,
        vocab_size, shift,
    )  # fmt: skip
    if num_items is not None:
        num_items = dense.items_tensor(num_items, reduction, input)
    if token_weight is not None:
        token_weight = call.token_weights(token_weight, input)
    is_row_by_row = call.is_row_by_row(reduction, weight_grad_accumulator, token_weight)
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
        return call.located(
            autograd.loss, call.hidden, linear_weight, linear_bias, call.scale, call.targets,
            weight, token_weight, num_items, call.options, loss, chunks,
        )  # fmt: skip
    rows = call.stats((False, label_smoothing != 0, False), chunks, weight_grad_accumulator)
    losses = composite.losses_of(
        rows, call.targets, weight, token_weight, call.options.ignore_index, loss
    )
    if reduction == "none":
        return losses.reshape(call.shape)
    items = (weight, token_weight, num_items, call.options.ignore_index, loss.reduction)
    denominator = total_items(call.hidden, call.targets, *items)
    return composite.reduce(losses, denominator, loss.reduction)


def _torchs_options(
    options: Any, chunk_tokens: int | None, weight_grad_dtype: torch.dtype | None
) -> tuple[int | None, torch.dtype | None]:
    """chunk_tokens and weight_grad_dtype, from torch's options where they say so."""
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


def _multi_dimensional(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
    **options: Any,
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

    targets, tokens = each(target, 2 if probabilities else 1), each(token_weight)
    losses = torch.stack([
        linear_cross_entropy(
            input, w, y, linear_bias=b, token_weight=t,
            reduction="none" if reduction == "none" else "sum", **options,
        )
        for w, y, b, t in zip(each(linear_weight), targets, each(linear_bias), tokens, strict=True)
    ], dim=-1)  # fmt: skip
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return losses.sum()
    if num_items is not None:
        return losses.sum() / dense.items_tensor(num_items, reduction, input)
    ignored = -100 if options["ignore_index"] is None else options["ignore_index"]
    rows = [
        composite.denominators(input, y, options["weight"], t, ignored)
        for y, t in zip(targets, tokens, strict=True)
    ]
    return losses.sum() / torch.stack(rows).sum()


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
    call = LinearCall(
        input, linear_weight, target, linear_bias, weight, ignore_index, softcap, logit_scale,
        vocab_size, shift,
    )  # fmt: skip
    chunks = call.chunk_options(chunk_tokens, max_chunk_bytes, drop_ignored, weight_grad_dtype)
    stats = call.stats((True, True, with_rank), chunks)
    return dense.as_token_stats(stats, call.shape, with_rank)


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
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
    call = LinearCall(
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
    check_projection(student_hidden, student_weight, student_bias)
    check_projection(teacher_hidden, teacher_weight, teacher_bias)
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in teacher):
        raise RuntimeError("linear_kl_div: the teacher gets no gradient; pass it detached")
    if ops.in_transform():
        raise RuntimeError("linear_kl_div does not work under torch.func transforms")
    hidden = as_rows(to_dtype_of_products(student_hidden))
    tokens, features = hidden.shape
    planned = plan(
        tokens, features, student_weight.shape[0], hidden.dtype, hidden.device,
        chunk_tokens=chunk_tokens, max_chunk_bytes=max_chunk_bytes,
    )  # fmt: skip
    valid = None if target is None else (target != ignore_index).reshape(-1)
    if drop_ignored is None:
        drop_ignored = hidden.device.type == "cpu"
    teacher_hidden = as_rows(to_dtype_of_products(teacher_hidden))
    return kl_div(
        hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
        teacher_bias, valid, direction, beta, temperature, reduction == "mean",
        planned.chunk_tokens, drop_ignored and valid is not None,
    )  # fmt: skip
