# mypy: disable-error-code="no-untyped-def"
"""What `torch.utils.flop_counter` counts of the linear operators: their projections, as they run.

Where tokens are dropped, those that are left count, unless their number cannot be known (fake
tensors). Everything else in a loss is additions beside the products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..ops import can_read, kernels
from ..options import unpack
from . import divergence, operators, row_functions  # noqa: F401  (define the operators)
from .operators import UNSHARDED, unpack_chunks
from .walk import Inputs, Targets, takes_part, with_gradient


def _product(input: Tensor, classes: int, counts: Tensor | None, drop: bool) -> int:
    """Of ``input @ weight.T`` for the tokens that are not dropped."""
    tokens = input.shape[0]
    if drop and counts is not None and can_read(counts):
        tokens = int(counts.sum())
    return 2 * tokens * input.shape[1] * classes


def _drops(chunks: Sequence[int]) -> bool:
    return unpack_chunks(chunks[:UNSHARDED], "", torch.float32).drop_ignored


@register_flop_formula(kernels.linear_loss, get_raw=True)
def _loss(
    input, linear_weight, linear_bias, logit_scale, target, weight, token_weight, num_items, floats,
    ints, chunks, group, weight_grad_dtype, needs, wanted, *, out_val=None,
) -> int:  # fmt: skip
    logits, _ = unpack(floats, ints)
    counts = takes_part(Targets(target, token_weight=token_weight), logits.ignore_index)
    asked = Inputs(*needs)
    products = 1 + bool(asked.input) + bool(asked.linear_weight)
    return products * _product(input, logits.vocab_size, counts, _drops(chunks))


@register_flop_formula(kernels.linear_stats, get_raw=True)
def _stats(
    input, linear_weight, linear_bias, logit_scale, target, weight, floats, ints, wanted,
    chunks, group, *, out_val=None,
) -> int:  # fmt: skip
    logits, _ = unpack(floats, ints)
    counts = takes_part(Targets(target), logits.ignore_index)
    return _product(input, logits.vocab_size, counts, _drops(chunks))


@register_flop_formula(kernels.linear_stats_backward, get_raw=True)
def _stats_backward(
    grads, input, linear_weight, linear_bias, logit_scale, target, weight, floats, ints, stats,
    state, chunks, group, weight_grad_dtype, needs, *, out_val=None,
) -> int:  # fmt: skip
    logits, _ = unpack(floats, ints)
    counts = with_gradient(grads, Targets(target), logits.ignore_index)
    asked = Inputs(*needs)
    products = 1 + bool(asked.input) + bool(asked.linear_weight)
    return products * _product(input, logits.vocab_size, counts, _drops(chunks))


@register_flop_formula(kernels.linear_divergence, get_raw=True)
def _divergence(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, teacher_ids,
    labels, valid, direction, share, temperature, add_tail, weight_hard_loss, weight_soft_loss,
    mean, num_items, vocab_size, limit, drop_ignored, has_float32_logits, needs, *, out_val=None,
) -> int:  # fmt: skip
    with_hidden, with_weight, _ = needs
    products = 1 + bool(with_hidden) + bool(with_weight)
    whole = products * _product(student, vocab_size, valid, drop_ignored)
    if teacher is not None and teacher_weight is not None:
        whole += _product(teacher, vocab_size, valid, drop_ignored)
    return whole


@register_flop_formula(kernels.linear_rows, get_raw=True)
def _rows(
    hidden, weight, bias, others, shared, valid, name, numbers, width, vocab_size, limit, drop,
    *, out_val=None,
) -> int:  # fmt: skip
    return _product(hidden, vocab_size, valid, drop)


@register_flop_formula(kernels.linear_rows_backward, get_raw=True)
def _rows_backward(
    grad_rows, hidden, weight, bias, others, shared, valid, name, numbers, width, vocab_size, limit,
    drop, needs, *, out_val=None,
) -> int:  # fmt: skip
    has_gradient = (grad_rows != 0).any(-1)
    counts = has_gradient if valid is None else has_gradient & valid
    products = 1 + bool(needs[0]) + bool(needs[1])
    return products * _product(hidden, vocab_size, counts, drop)
