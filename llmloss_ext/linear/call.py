"""What the linear losses share before any work: checks, shapes, and the operators' arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext import functional as dense
from llmloss_ext import ops
from llmloss_ext.composite import real_of
from llmloss_ext.linear import autograd
from llmloss_ext.linear.chunked import ChunkOptions
from llmloss_ext.linear.planning import tokens_of_a_chunk
from llmloss_ext.shard import Shard

__all__ = ["LinearCall", "as_rows", "check_projection", "to_dtype_of_products"]

T = TypeVar("T")


def as_rows(hidden: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return hidden.reshape(-1, hidden.shape[-1])


def check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises a ValueError or RuntimeError if ``hidden @ weight.T + bias`` cannot be computed."""
    if hidden.dtype not in dense.FLOATS:
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
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.dtype not in dense.FLOATS:
            raise RuntimeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
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
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def to_dtype_of_products(hidden: Tensor) -> Tensor:
    """Autocast's, if it is on; float64 stays."""
    if not _is_autocast(hidden) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(hidden.device.type))


def _shift(labels: Tensor, shift: int, fill: int) -> Tensor:
    return F.pad(labels[..., shift:], (0, min(shift, labels.shape[-1])), value=fill)


class LinearCall:
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
        ignore_index: int | None,
        softcap: float | None,
        logit_scale: float | Tensor,
        vocab_size: int | None,
        shift: int,
    ) -> None:
        check_projection(input, linear_weight, linear_bias)
        input = to_dtype_of_products(input)
        ignore_index = -100 if ignore_index is None else ignore_index
        ignore_index = dense.as_integer("ignore_index", ignore_index)
        if target.device != input.device:
            raise RuntimeError(
                f"expected input and target on the same device, got {input.device} and "
                f"{target.device}"
            )
        self.linear_weight, self.linear_bias, self.weight = linear_weight, linear_bias, weight
        self.shape = input.shape[:-1]
        self.has_probabilities = target.is_floating_point()
        if self.has_probabilities:
            target = target.to(input.dtype)
        vocabulary = linear_weight.shape[0]
        expected = (*self.shape, vocabulary) if self.has_probabilities else tuple(self.shape)
        if tuple(target.shape) != expected:
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit hidden states of shape "
                f"{tuple(input.shape)}: expected {expected}"
            )
        target = dense.check_target(target, input, ignore_index)
        self.given, self.shift = target, dense.as_integer("shift", shift)
        if self.shift:
            target = self._shifted(target, self.shift, ignore_index)
        self.hidden = as_rows(input)
        self.targets = target.reshape(self.hidden.shape[0], *expected[len(self.shape) :])
        dense.check_weight(weight, vocabulary, input)
        self.options, self.scale = dense.logit_options(
            logit_scale, softcap, vocab_size, ignore_index, vocabulary, input
        )

    def _shifted(self, target: Tensor, shift: int, ignore_index: int) -> Tensor:
        if shift < 0 or self.has_probabilities or target.dim() == 0:
            raise ValueError(
                "shift must be an integer >= 0, with class indices (..., S) as targets; got "
                f"shift={shift} and targets of shape {tuple(target.shape)}, {target.dtype}"
            )
        return _shift(target, shift, ignore_index)

    def token_weights(self, token_weight: Tensor, input: Tensor) -> Tensor:
        """(N), of the labels that the tokens predict."""
        token_weight = dense.check_token_weight(token_weight, self.shape, input)
        if self.shift:
            token_weight = _shift(token_weight, self.shift, 0)
        return token_weight.reshape(-1)

    @staticmethod
    def is_row_by_row(
        reduction: str, accumulator: Tensor | None, token_weight: Tensor | None
    ) -> bool:
        """Whether a loss is made of the rows' statistics, and not with its gradients at once."""
        return (
            reduction == "none"
            or accumulator is not None
            or (token_weight is not None and token_weight.requires_grad)
        )

    def chunk_options(
        self,
        chunk_tokens: int | None,
        max_chunk_bytes: int | None,
        drop_ignored: bool | None,
        weight_grad_dtype: torch.dtype | None,
        accumulator: Tensor | None = None,
        shard: Shard | None = None,
    ) -> ChunkOptions:
        """How to walk through the tokens, by the plan: the same chunks on every rank."""
        hidden, weight = self.hidden, self.linear_weight
        columns = weight.shape[0] if shard is None else shard.usual_columns
        tokens = tokens_of_a_chunk(
            hidden.shape[0], columns, hidden.dtype, hidden.device.type, chunk_tokens,
            max_chunk_bytes,
        )  # fmt: skip
        if accumulator is not None:
            weight_grad_dtype = weight_grad_dtype or accumulator.dtype
            if accumulator.shape != weight.shape or accumulator.device != weight.device:
                raise ValueError(
                    f"weight_grad_accumulator must have the weight's shape {tuple(weight.shape)} "
                    f"on {weight.device}, got {tuple(accumulator.shape)} on {accumulator.device}"
                )
            if accumulator.dtype != weight_grad_dtype:
                raise ValueError(
                    f"weight_grad_accumulator must be of {weight_grad_dtype}, got "
                    f"{accumulator.dtype}"
                )
            if not accumulator.is_contiguous():
                raise ValueError(
                    "weight_grad_accumulator must be contiguous, got strides "
                    f"{accumulator.stride()} for shape {tuple(accumulator.shape)}"
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
        return ChunkOptions(tokens, drop_ignored, weight_grad_dtype or real, shard)

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
        return self.located(
            autograd.stats, self.hidden, self.linear_weight, self.linear_bias, self.scale,
            self.targets, self.weight, accumulator, self.options, wanted, chunks,
        )  # fmt: skip

    def located(self, run: Callable[..., T], *arguments: Any) -> T:
        """Runs; a target out of range is named by its place in what was given, not in its chunk."""
        if torch.compiler.is_compiling():
            return run(*arguments)
        try:
            return run(*arguments)
        except IndexError:
            options = self.options
            dense.check_range(self.given, options.ignore_index, options.vocab_size, self.shift)
            raise

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
