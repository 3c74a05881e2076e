# mypy: disable-error-code="no-untyped-def"
"""What the C++ operators return, in shapes and dtypes: their fake kernels.

torch.compile, torch.export and FakeTensor run these in place of the kernels.
"""

import torch
from torch import Tensor

from llmloss_ext._library import LIBRARY
from llmloss_ext.composite import real_of

__all__ = ["LIBRARY"]


def _row_shape(input: Tensor) -> tuple[int, ...]:
    return tuple(input.shape[:-1])


def _state(input: Tensor, size: int) -> Tensor:
    rows = 1
    for length in _row_shape(input):
        rows = rows * length
    return input.new_empty((size, rows), dtype=real_of(input))


def _scalar(input: Tensor, asked: bool = True) -> Tensor:
    return input.new_empty(() if asked else (0,), dtype=real_of(input))


def _gradient(input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


@torch.library.register_fake("llmloss::token_stats")
def _token_stats_fake(
    input, target, weight, logit_scale, scale, softcap, ignore_index, vocab_size,
    with_entropy, with_mean_log_prob, with_rank, classes=0,
):  # fmt: skip
    def one(asked: bool, dtype: torch.dtype) -> Tensor:
        return input.new_empty(_row_shape(input) if asked else (0,), dtype=dtype)

    real = real_of(input)
    return (
        one(True, real),
        one(True, real),
        one(with_entropy, real),
        one(with_mean_log_prob, real),
        one(with_rank, torch.int64),
        one(with_rank, torch.int64),
        _state(input, 3),
    )


@torch.library.register_fake("llmloss::token_stats_backward")
def _token_stats_backward_fake(
    grad_log_prob, grad_lse, grad_entropy, grad_mean_log_prob, input, target, weight, logit_scale,
    scale, softcap, ignore_index, vocab_size, entropy, state, with_grad_scale, classes=0,
):  # fmt: skip
    return _gradient(input), _scalar(input, with_grad_scale)


@torch.library.register_fake("llmloss::token_stats_backward_")
def _token_stats_backward_inplace_fake(
    grad_log_prob, grad_lse, grad_entropy, grad_mean_log_prob, input, target, weight, logit_scale,
    scale, softcap, ignore_index, vocab_size, entropy, state, with_grad_scale, classes=0,
):  # fmt: skip
    return _scalar(input, with_grad_scale)


@torch.library.register_fake("llmloss::cross_entropy")
def _cross_entropy_fake(
    input, target, weight, token_weight, num_items, logit_scale, scale, softcap, ignore_index,
    vocab_size, label_smoothing, z_loss, reduction,
):  # fmt: skip
    loss = _scalar(input)
    if reduction == 0:
        loss = input.new_empty(_row_shape(input), dtype=real_of(input))
    needs_mean = label_smoothing != 0 or target.is_floating_point()
    return loss, _state(input, 5 + needs_mean), _scalar(input, reduction == 1)


@torch.library.register_fake("llmloss::cross_entropy_backward")
def _cross_entropy_backward_fake(
    grad_loss, input, target, weight, token_weight, logit_scale, scale, softcap, ignore_index,
    vocab_size, label_smoothing, z_loss, state, denominator, with_grad_scale,
):  # fmt: skip
    return _gradient(input), _scalar(input, with_grad_scale)


@torch.library.register_fake("llmloss::cross_entropy_backward_")
def _cross_entropy_backward_inplace_fake(
    grad_loss, input, target, weight, token_weight, logit_scale, scale, softcap, ignore_index,
    vocab_size, label_smoothing, z_loss, state, denominator, with_grad_scale,
):  # fmt: skip
    return _scalar(input, with_grad_scale)


@torch.library.register_fake("llmloss::cross_entropy_fused_")
def _cross_entropy_fused_fake(
    input, target, weight, token_weight, num_items, logit_scale, scale, softcap, ignore_index,
    vocab_size, label_smoothing, z_loss, reduction, with_grad_scale,
):  # fmt: skip
    return _scalar(input), _scalar(input, with_grad_scale)


@torch.library.register_fake("llmloss::merge_shards")
def _merge_shards_fake(said, target, ignore_index, vocab_size):
    rows = said.shape[2]
    column = [said.new_empty(rows) for _ in range(5)]
    argmax = said.new_empty(rows, dtype=torch.int64)
    return (*column[:4], argmax, said.new_empty(3, rows), column[4])


@torch.library.register_fake("llmloss::scale_")
def _scale_fake(x, factor):
    return None
