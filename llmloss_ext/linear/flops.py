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
from . import divergence, operators  # noqa: F401  (define the operators)
from .operators import UNSHARDED, unpack_chunks
from .row_functions import Given
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
def _divergence(upstream, needs, *arguments, out_val=None) -> int:
    given = divergence.Given.unpack(arguments)
    (student, *_), constants, how = given
    counts = given.counts(upstream)
    with_hidden, with_weight, _ = needs
    products = 1 + bool(with_hidden) + bool(with_weight)
    whole = products * _product(student, how.vocab_size, counts, how.drop_ignored)
    if constants.teacher is not None and constants.teacher_weight is not None:
        whole += _product(constants.teacher, how.vocab_size, counts, how.drop_ignored)
    return whole


@register_flop_formula(kernels.linear_rows, get_raw=True)
def _rows(*arguments, out_val=None) -> int:
    given = Given(*arguments)
    return _product(given.hidden, given.vocab_size, given.valid, given.drop)


@register_flop_formula(kernels.linear_rows_backward, get_raw=True)
def _rows_backward(grad_rows, needs, *arguments, out_val=None) -> int:
    given = Given(*arguments)
    has_gradient = (grad_rows != 0).any(-1)
    counts = has_gradient if given.valid is None else has_gradient & given.valid
    products = 1 + bool(needs[0]) + bool(needs[1])
    return products * _product(given.hidden, given.vocab_size, counts, given.drop)
