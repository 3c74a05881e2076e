"""The linear losses as operators of torch: opaque to compilers, and without derivatives.

Tensors that are not asked for come back without elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmloss_ext import fake
from llmloss_ext.composite import LogitOptions, real_of
from llmloss_ext.linear.chunked import (
    ChunkOptions,
    Inputs,
    gradients_by_chunks,
    loss_by_chunks,
    stats_by_chunks,
)
from llmloss_ext.linear.loop import Chunk

__all__ = ["linear_loss", "linear_stats", "linear_stats_backward"]

LIBRARY = fake.LIBRARY
_ops = torch.ops.llmloss


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
    options = (scale, softcap, ignore_index, vocab_size, label_smoothing, z_loss)

    def loss_of(
        chunk: Chunk, targets: Tensor, tokens: Tensor | None, divisor: Tensor
    ) -> tuple[Tensor, Tensor]:
        arguments = (chunk.logits, targets, weight, tokens, divisor, logit_scale, *options, 1)
        if any(needs):
            part, part_scale = _ops.cross_entropy_fused_(*arguments, needs[3])
            return part, part_scale
        return _ops.cross_entropy(*arguments)[0], divisor.new_empty(0)

    return loss_by_chunks(
        loss_of, Inputs(input, linear_weight, linear_bias, logit_scale), target, weight,
        token_weight, num_items, ignore_index, reduction,
        ChunkOptions(chunk_tokens, drop_ignored, weight_grad_dtype), needs,
    )  # fmt: skip


linear_loss = torch.library.custom_op("llmloss::linear_loss", compute_loss, mutates_args=())


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
    options = (scale, softcap, ignore_index, vocab_size)

    def stats_of(logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
        stats: Sequence[Tensor] = _ops.token_stats(
            logits, targets, weight, logit_scale, *options, *wanted
        )
        return stats

    return stats_by_chunks(
        stats_of, Inputs(input, linear_weight, linear_bias, logit_scale), target, ignore_index,
        vocab_size, wanted, ChunkOptions(chunk_tokens, drop_ignored, real_of(input)),
    )  # fmt: skip


linear_stats = torch.library.custom_op("llmloss::linear_stats", compute_stats, mutates_args=())


def stats_backward(
    grads: tuple[Tensor | None, ...],
    inputs: Inputs,
    target: Tensor,
    weight: Tensor | None,
    options: LogitOptions,
    entropy: Tensor,
    states: Tensor,
    chunks: ChunkOptions,
    needs: list[bool],
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients from those of log_prob, lse, entropy and mean_log_prob, each (N) or None.

    The weight's is added to ``accumulator`` if there is one.
    """

    def gradient_of(
        grads: tuple[Tensor | None, ...], logits: Tensor, targets: Tensor, entropy: Tensor,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        where = (logits, targets, weight, inputs.logit_scale, *options)
        grad_scale: Tensor = _ops.token_stats_backward_(*grads, *where, entropy, state, needs[3])
        return grad_scale

    return gradients_by_chunks(
        gradient_of, grads, inputs, target, options.ignore_index, entropy, states, chunks, needs,
        accumulator,
    )  # fmt: skip


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
        Inputs(input, linear_weight, linear_bias, logit_scale), target, weight,
        LogitOptions(scale, softcap, ignore_index, vocab_size), entropy, states,
        ChunkOptions(chunk_tokens, drop_ignored, weight_grad_dtype), needs,
    )  # fmt: skip
