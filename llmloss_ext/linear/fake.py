# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""What the linear operators return, in shapes and dtypes: their fake kernels."""

import torch

from llmloss_ext.composite import real_of
from llmloss_ext.linear.chunked import gradient_dtype
from llmloss_ext.linear.operators import (
    linear_loss,
    linear_stats,
    linear_stats_backward,
)


@linear_loss.register_fake
def _linear_loss_fake(
    input, linear_weight, target, linear_bias, weight, token_weight, num_items, logit_scale,
    scale, softcap, ignore_index, vocab_size, label_smoothing, z_loss, reduction, chunk_tokens,
    drop_ignored, needs, weight_grad_dtype,
):  # fmt: skip
    def gradient(parameter, asked, dtype_of=lambda _, parameter: parameter.dtype):
        if not asked or parameter is None:
            return input.new_empty(0)
        return parameter.new_empty(parameter.shape, dtype=dtype_of(input, parameter))

    scalar = input.new_empty((), dtype=real_of(input))
    return (
        scalar,
        gradient(input, needs[0]),
        gradient(linear_weight, needs[1], gradient_dtype),
        gradient(linear_bias, needs[2], gradient_dtype),
        gradient(logit_scale, needs[3]),
        torch.empty_like(scalar),
    )


@linear_stats.register_fake
def _linear_stats_fake(
    input, linear_weight, target, linear_bias, weight, logit_scale, scale, softcap, ignore_index,
    vocab_size, wanted, chunk_tokens, drop_ignored,
):  # fmt: skip
    tokens, real = input.shape[0], real_of(input)

    def column(asked, dtype=real):
        return input.new_empty(tokens if asked else 0, dtype=dtype)

    return (
        column(True),
        column(True),
        column(wanted[0]),
        column(wanted[1]),
        column(wanted[2], torch.int64),
        column(wanted[2], torch.int64),
        input.new_empty((tokens, 3), dtype=real),
    )


@linear_stats_backward.register_fake
def _linear_stats_backward_fake(
    grad_log_prob, grad_lse, grad_entropy, grad_mean_log_prob, input, linear_weight, target,
    linear_bias, weight, logit_scale, scale, softcap, ignore_index, vocab_size, entropy, states,
    chunk_tokens, drop_ignored, needs, weight_grad_dtype,
):  # fmt: skip
    parameters = (input, linear_weight, linear_bias, logit_scale)
    return tuple(
        p.new_empty(p.shape) if asked and p is not None else input.new_empty(0)
        for p, asked in zip(parameters, needs, strict=True)
    )
