"""The linear losses as operators of torch: opaque to compilers, and without derivatives.

Tensors that are not asked for come back without elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmloss_ext import composite, fake
from llmloss_ext.composite import real_of
from llmloss_ext.linear.loop import Gradients, Projection, put, take

__all__ = ["linear_loss", "linear_stats", "linear_stats_backward"]

LIBRARY = fake.LIBRARY
_ops = torch.ops.llmloss


def _valid(target: Tensor, ignore_index: int, drop_ignored: bool) -> Tensor | None:
    if not drop_ignored or not composite.is_indices(target):
        return None
    return target != ignore_index


def total_items(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """What the sum over the tokens is divided by, 0-d: 1 but for the mean (1)."""
    if reduction != 1:
        return torch.ones((), dtype=real_of(input), device=input.device)
    if num_items is None:
        num_items = composite.denominators(input, target, weight, token_weight, ignore_index).sum()
    return num_items.to(real_of(input)).reshape(())


def gradient_factor(input: Tensor, denominator: Tensor) -> Tensor:
    """What gradients of logits leave out, 0-d, so that float16 holds them.

    A power of two near 1 / denominator: they are then of the size of p and not of p / N, which is
    subnormal for many tokens. 1 for the other types.
    """
    if input.dtype != torch.float16:
        return torch.ones_like(denominator)
    return torch.exp2(-torch.floor(torch.log2(denominator.clamp_min(1.0))))


def gradient_dtype(input: Tensor, parameter: Tensor) -> torch.dtype:
    """In which `linear_loss` returns the gradient of a weight or a bias: the parameter's.

    But float16 cannot hold a sum over tokens from which `gradient_factor` was left out: such sums
    stay in float32 until backward has multiplied it in.
    """
    is_half = input.dtype == torch.float16 and parameter.dtype == torch.float16
    return real_of(input) if is_half else parameter.dtype


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def must_be_opaque(tensor: Tensor) -> bool:
    """Whether a tracer, a fake tensor or a subclass looks on: then only the operators will do.

    Elsewhere the functions themselves are called, which saves a small call 40 us.
    """
    return (
        torch.compiler.is_compiling()
        or tensor.device.type not in ("cpu", "cuda")
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def compute_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    chunk_tokens: int,
    drop_ignored: bool,
    needs: list[bool],
    weight_grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mean (1) or sum (2) over the tokens, with its gradients.

    ``needs`` says which gradients: of input, linear_weight, linear_bias, logit_scale.

    Returns:
        The loss; the gradients of input, linear_weight, linear_bias and logit_scale; and the factor
        (0-d) that is still to be multiplied into them. It is 1 except for float16, whose gradients
        are kept away from its subnormal numbers (and the weight's and bias's in float32).
    """
    real = real_of(input)
    projection = Projection(input, linear_weight, linear_bias)
    items = (weight, token_weight, num_items, ignore_index, reduction)
    denominator = total_items(input, target, *items)
    factor = gradient_factor(input, denominator)
    divisor = denominator * factor
    loss = torch.zeros((), dtype=torch.float64, device=input.device)
    grad_scale = torch.zeros_like(loss) if needs[3] else None
    if weight_grad_dtype == torch.float16:
        weight_grad_dtype = real  # see gradient_dtype
    gradients = Gradients(
        projection, (needs[0], needs[1], needs[2]), weight_grad_dtype,
        gradient_dtype(input, linear_weight),
    )  # fmt: skip
    logit_options = (scale, softcap, ignore_index, vocab_size)
    loss_options = (label_smoothing, z_loss)
    for chunk in projection.chunks(chunk_tokens, _valid(target, ignore_index, drop_ignored)):
        tokens = None if token_weight is None else take(token_weight, chunk.rows)
        arguments = (take(target, chunk.rows), weight, tokens, divisor, logit_scale)
        if any(needs):
            part, part_scale = _ops.cross_entropy_fused_(
                chunk.logits, *arguments, *logit_options, *loss_options, 1, needs[3]
            )
            gradients.add(chunk)
            if grad_scale is not None:
                grad_scale += part_scale
        else:
            part, _, _ = _ops.cross_entropy(
                chunk.logits, *arguments, *logit_options, *loss_options, 1
            )
        loss += part
        del chunk  # its buffer, before the gradient of the weight is rounded
    if reduction == 1:
        loss += torch.zeros_like(denominator) / denominator  # nan: no token to divide by
    return (
        (loss * factor).to(real),
        _or_empty(gradients.hidden, input),
        _or_empty(gradients.weight_result(), input),
        _or_empty(_summed_over_tokens(gradients.bias, linear_bias, input), input),
        _or_empty(_cast(grad_scale, logit_scale), input),
        factor,
    )


linear_loss = torch.library.custom_op("llmloss::linear_loss", compute_loss, mutates_args=())


def _summed_over_tokens(
    gradient: Tensor | None, parameter: Tensor | None, input: Tensor
) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.to(gradient_dtype(input, parameter))


def _cast(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.reshape(parameter.shape).to(parameter.dtype)


def compute_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    wanted: list[bool],
    chunk_tokens: int,
    drop_ignored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of `token_stats`, and the state that backward needs, (N, 3).

    ``wanted`` says whether entropy, mean_log_prob, and argmax and rank are asked for.
    """
    real, tokens = real_of(input), input.shape[0]

    def column(asked: bool, dtype: torch.dtype = real, fill: int = 0) -> Tensor:
        return torch.full((tokens if asked else 0,), fill, dtype=dtype, device=input.device)

    stats = [column(True), column(True), column(wanted[0]), column(wanted[1]),
             column(wanted[2], torch.int64, -1),
             column(wanted[2], torch.int64, vocab_size)]  # fmt: skip
    states = torch.zeros(tokens, 3, dtype=real, device=input.device)
    projection = Projection(input, linear_weight, linear_bias)
    for chunk in projection.chunks(chunk_tokens, _valid(target, ignore_index, drop_ignored)):
        *parts, state = _ops.token_stats(
            chunk.logits, take(target, chunk.rows), weight, logit_scale,
            scale, softcap, ignore_index, vocab_size, *wanted,
        )  # fmt: skip
        put(states, chunk.rows, state.t())
        for whole, part in zip(stats, parts, strict=True):
            if whole.numel():
                put(whole, chunk.rows, part)
    return (*stats, states)  # type: ignore[return-value]


linear_stats = torch.library.custom_op("llmloss::linear_stats", compute_stats, mutates_args=())


def stats_backward(
    grads: tuple[Tensor | None, ...],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    logit_options: tuple[float, float, int, int],
    entropy: Tensor,
    states: Tensor,
    chunk_tokens: int,
    drop_ignored: bool,
    needs: list[bool],
    weight_grad_dtype: torch.dtype,
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients from those of log_prob, lse, entropy and mean_log_prob, each (N) or None.

    The weight's is added to ``accumulator`` if there is one.
    """
    projection = Projection(input, linear_weight, linear_bias)
    which = (needs[0], needs[1], needs[2])
    gradients = Gradients(projection, which, weight_grad_dtype, linear_weight.dtype, accumulator)
    ignore_index = logit_options[2]
    grad_scale = torch.zeros((), dtype=torch.float64, device=input.device) if needs[3] else None
    for chunk in projection.chunks(chunk_tokens, _valid(target, ignore_index, drop_ignored)):
        rows = chunk.rows
        part_scale = _ops.token_stats_backward_(
            *(None if grad is None else take(grad, rows) for grad in grads),
            chunk.logits, take(target, rows), weight, logit_scale, *logit_options,
            take(entropy, rows) if entropy.numel() else entropy,
            take(states, rows).t().contiguous(), needs[3],
        )  # fmt: skip
        gradients.add(chunk)
        if grad_scale is not None:
            grad_scale += part_scale
        del chunk
    grad_weight = None
    if accumulator is None:
        grad_weight = gradients.weight_result()
    return (
        _or_empty(gradients.hidden, input),
        _or_empty(grad_weight, input),
        _or_empty(None if linear_bias is None else _cast(gradients.bias, linear_bias), input),
        _or_empty(_cast(grad_scale, logit_scale), input),
    )


@torch.library.custom_op("llmloss::linear_stats_backward", mutates_args=())
def linear_stats_backward(
    grad_log_prob: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mean_log_prob: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    entropy: Tensor,
    states: Tensor,
    chunk_tokens: int,
    drop_ignored: bool,
    needs: list[bool],
    weight_grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`stats_backward` without an accumulator."""
    return stats_backward(
        (grad_log_prob, grad_lse, grad_entropy, grad_mean_log_prob),
        input, linear_weight, target, linear_bias, weight, logit_scale,
        (scale, softcap, ignore_index, vocab_size), entropy, states, chunk_tokens, drop_ignored,
        needs, weight_grad_dtype,
    )  # fmt: skip
