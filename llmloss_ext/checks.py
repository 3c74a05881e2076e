"""Checks of the tensors that come with logits or hidden states: targets, weights, numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.derivatives import can_read

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dense(name: str, tensor: Tensor | None, *, optional: bool = False) -> None:
    """Raises a TypeError if an argument is not a dense tensor; None may be ``optional``."""
    if isinstance(tensor, Tensor):
        if tensor.layout is torch.strided and not tensor.is_nested:
            return
        kind = f"a nested tensor of {tensor.layout}" if tensor.is_nested else tensor.layout
        raise TypeError(
            f"{name} must be a dense tensor, or jagged like the other arguments; got {kind}"
        )
    if tensor is None and optional:
        return
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}".removeprefix("builtins.")
    raise TypeError(f"{name} must be a torch.Tensor, got {kind}; torch.as_tensor makes one")


def check_all_dense(required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """`check_dense` of several arguments by name."""
    for name, tensor in required.items():
        check_dense(name, tensor)
    for name, other in optional.items():
        check_dense(name, other, optional=True)


def check_target(
    target: Tensor, input: Tensor, ignore_index: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Targets as the operators read them; the shape is not looked at.

    Probabilities are to have ``dtype``, by default the input's.

    Raises:
        RuntimeError: On another device; neither int64 nor int32 nor probabilities of the input's
            dtype; or probabilities with an ``ignore_index`` that could be meant.
    """
    if target.device != input.device:
        raise RuntimeError(
            f"expected input and target on the same device, got {input.device} and {target.device}"
        )
    if target.dtype == torch.int64:
        return target
    if target.dtype == torch.int32:
        # So that the two can be compared.
        return target if -(2**31) <= ignore_index < 2**31 else target.long()
    if target.dtype == torch.uint8:  # as torch
        return target.long()
    if not target.is_floating_point():
        raise RuntimeError(f"expected class indices of int64, int32 or uint8, got {target.dtype}")
    dtype = input.dtype if dtype is None else dtype
    if target.dtype != dtype and is_autocast(input):
        target = target.to(dtype)
    if target.dtype != dtype:
        raise RuntimeError(
            f"expected probability targets of the input's dtype {dtype}, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    return target.contiguous() if target.stride(-1) != 1 else target


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is."""
    kind = tensor.device.type
    # torch refuses to answer for "meta", and the compiler of 2.11 cannot ask for which else.
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def check_range(targets: Tensor, ignore_index: int, classes: int, shift: int = 0) -> None:
    """Raises an IndexError that names the first target that is neither a class nor ignored.

    ``targets`` are what the positions predict: they were given ``shift`` positions later. Waits for
    their device.
    """
    if targets.dtype == torch.int32:
        targets = targets.long()  # ignore_index may be beyond int32
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if not bad.any():
        return
    *leading, last = bad.nonzero()[0].tolist() or [0]
    place = (*leading, last + shift)
    raise IndexError(
        f"Target {int(targets[bad][0])} at position {place if leading else place[0]} is out of "
        f"bounds: expected a class in [0, {classes}) or ignore_index = {ignore_index}."
    )


def check_weight(weight: Tensor | None, columns: int, input: Tensor) -> None:
    """Raises a RuntimeError if the class weights do not fit logits of so many columns."""
    if weight is None:
        return
    if weight.shape != (columns,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {columns} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    if weight.device != input.device or not weight.is_floating_point():
        raise RuntimeError(
            f"expected weight to be floating point on {input.device}, got {weight.dtype} on "
            f"{weight.device}"
        )
    if weight.requires_grad:
        raise RuntimeError("weight has no gradient: pass weight.detach()")


def check_scale(logit_scale: float | Tensor, input: Tensor) -> Tensor | None:
    """``logit_scale`` if it is a tensor.

    Raises:
        ValueError: It is a tensor that does not hold one number.
        RuntimeError: It is on another device.
    """
    if not isinstance(logit_scale, Tensor):
        return None
    is_number = logit_scale.numel() == 1 and logit_scale.dim() <= 1
    if not is_number or not logit_scale.is_floating_point():
        raise ValueError(
            "logit_scale must be a number or a floating-point tensor with one element, got "
            f"shape {tuple(logit_scale.shape)} of {logit_scale.dtype}"
        )
    if logit_scale.device != input.device:
        raise RuntimeError(f"expected logit_scale on {input.device}, got {logit_scale.device}")
    return logit_scale


def items_tensor(num_items: int | Tensor | None, reduction: str, input: Tensor) -> Tensor | None:
    """``num_items`` as a constant on the input's device; a ValueError if it cannot be one."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f'num_items replaces the denominator of reduction="mean"; got reduction={reduction!r}'
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.device != input.device:
            raise ValueError(
                f"num_items must be a number or hold one number on {input.device}, got shape "
                f"{tuple(num_items.shape)} on {num_items.device}"
            )
        if can_read(num_items) and not num_items >= 0:
            raise ValueError(f"num_items must be >= 0, got {num_items.item()}")
        return num_items.detach()
    if not isinstance(num_items, torch.SymInt) and not num_items >= 0:
        raise ValueError(f"num_items must be >= 0, got {num_items}")
    return torch.full((), num_items, dtype=torch.float64, device=input.device)


def check_token_weight(token_weight: Tensor, shape: torch.Size, input: Tensor) -> Tensor:
    """The weight of each token.

    Raises:
        ValueError: It is not one number for each token.
        RuntimeError: It is on another device.
    """
    if token_weight.shape != shape:
        raise ValueError(
            f"token_weight must have one number per token, shape {tuple(shape)}, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.device != input.device:
        raise RuntimeError(f"expected token_weight on {input.device}, got {token_weight.device}")
    return token_weight
