# mypy: disable-error-code="no-untyped-def"
"""What the C++ operators return, in shapes and dtypes: their fake kernels.

torch.compile, torch.export and FakeTensor run these in place of the kernels.
"""

import torch
from torch import Tensor

from ..composite import real_of
from ..options import MEAN, NONE, unpack
from ..statistics import STATISTICS, FloatStats, is_asked
from .library import MEAN_DENOMINATOR, STATE
from .namespace import qualified


def _state(input: Tensor, rows_of_state: int) -> Tensor:
    rows = 1
    for length in input.shape[:-1]:
        rows = rows * length
    return input.new_empty((rows_of_state, rows), dtype=real_of(input))


def _scalar(input: Tensor, asked: bool = True) -> Tensor:
    return input.new_empty(() if asked else (0,), dtype=real_of(input))


def statistics_like(input: Tensor, shape, wanted: int) -> list[Tensor]:
    """Of rows of that shape; those not asked for without elements."""

    def one(name: str) -> Tensor:
        dtype = real_of(input) if name in FloatStats._fields else torch.int64
        return input.new_empty(shape if is_asked(wanted, name) else (0,), dtype=dtype)

    return [one(name) for name in STATISTICS]


@torch.library.register_fake(qualified("token_stats"))
def _token_stats(input, target, weight, logit_scale, floats, ints, wanted):
    return [_state(input, len(STATE)), *statistics_like(input, input.shape[:-1], wanted)]


@torch.library.register_fake(qualified("token_stats_backward"))
def _token_stats_backward(
    grads, input, target, weight, logit_scale, floats, ints, stats, state, with_grad_scale
):
    return input.new_empty(input.shape), _scalar(input, with_grad_scale)


@torch.library.register_fake(qualified("token_stats_backward_"))
def _token_stats_backward_inplace(
    grads, input, target, weight, logit_scale, floats, ints, stats, state, with_grad_scale
):
    return _scalar(input, with_grad_scale)


@torch.library.register_fake(qualified("cross_entropy"))
def _cross_entropy(input, target, weight, token_weight, num_items, logit_scale, floats, ints):
    _, loss = unpack(floats, ints)
    value = _scalar(input)
    if loss.reduction == NONE:
        value = input.new_empty(input.shape[:-1], dtype=real_of(input))
    statistics = loss.statistics(target.is_floating_point())
    state = _state(input, len(STATE) + len(statistics))
    numbers = len(MEAN_DENOMINATOR) if loss.reduction == MEAN else 0
    return value, state, input.new_empty((numbers,), dtype=real_of(input))


@torch.library.register_fake(qualified("cross_entropy_backward"))
def _cross_entropy_backward(
    grad_loss, input, target, weight, token_weight, logit_scale, floats, ints, state, denominator,
    with_grad_scale,
):  # fmt: skip
    return input.new_empty(input.shape), _scalar(input, with_grad_scale)


@torch.library.register_fake(qualified("cross_entropy_backward_"))
def _cross_entropy_backward_inplace(
    grad_loss, input, target, weight, token_weight, logit_scale, floats, ints, state, denominator,
    with_grad_scale,
):  # fmt: skip
    return _scalar(input, with_grad_scale)


@torch.library.register_fake(qualified("cross_entropy_fused_"))
def _cross_entropy_fused(
    input, target, weight, token_weight, num_items, logit_scale, floats, ints, with_grad_scale
):
    return _scalar(input), _scalar(input, with_grad_scale)


@torch.library.register_fake(qualified("merge_shards"))
def _merge_shards(shard_stats, target, ignore_index, vocab_size):
    rows = shard_stats.shape[2]
    column = [shard_stats.new_empty(rows) for _ in range(len(FloatStats._fields) + 1)]
    *floats, owners = column
    argmax, rank = (shard_stats.new_empty(n, dtype=torch.int64) for n in (rows, 0))
    return [shard_stats.new_empty(len(STATE), rows), *floats, argmax, rank, owners]


@torch.library.register_fake(qualified("scale_"))
def _scale(x, factor):
    return None
