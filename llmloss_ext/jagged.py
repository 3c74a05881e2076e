"""Jagged nested tensors: batches of sequences without padding, (B, j, ...)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import can_read
from .results import mapped

__all__ = ["call_jagged"]


def call_jagged(
    function: Callable[..., Any], per_token: Sequence[str], arguments: dict[str, Any]
) -> Any:
    """Calls a function of tokens with the tokens of jagged arguments one after the other.

    Args:
        function: Takes (tokens, ...) for each of ``per_token``; a result (tokens) becomes jagged.
        per_token: The names of its arguments with something for each token.
        arguments: By name; the first of ``per_token`` is nested.

    Raises:
        TypeError: An argument is not a jagged tensor like the first, without holes.
        RuntimeError: The logits are to be overwritten.
    """
    first = arguments[per_token[0]]
    if first.layout is not torch.jagged:
        raise TypeError(
            f"{per_token[0]} is a nested tensor of {first.layout}: make it with layout=torch.jagged"
        )
    if arguments.get("inplace"):
        raise RuntimeError("inplace=True cannot overwrite jagged logits: their gradient is a view")
    offsets = first.offsets()
    flat = {
        name: _values(name, arguments[name], first)
        for name in per_token
        if arguments.get(name) is not None
    }
    if arguments.get("shift"):
        flat["cu_seqlens"] = offsets
    tokens = flat[per_token[0]].shape[:1]
    result = function(**arguments | flat)

    def jagged(tensor: Tensor) -> Tensor:
        if tensor.shape != tokens:
            return tensor
        nested: Tensor = torch.nested.nested_tensor_from_jagged(tensor, offsets)
        return nested

    return mapped(jagged, result)


def _values(name: str, tensor: Any, first: Tensor) -> Tensor:
    """(tokens, ...) of a tensor whose sequences have the lengths of the first's.

    Where that would wait for a device, only their number and their sum are compared.
    """
    is_jagged = isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout is torch.jagged
    if not is_jagged:
        raise TypeError(f"{name} must be jagged like the other arguments, got {type(tensor)}")
    if tensor.lengths() is not None or tensor._ragged_idx != 1:
        raise TypeError(f"{name} must be jagged in dimension 1, without holes: (B, j, ...)")
    values: Tensor = tensor.values()
    offsets, theirs = tensor.offsets(), first.offsets()  # type: ignore[attr-defined]
    fits = values.shape[0] == first.values().shape[0] and offsets.shape == theirs.shape
    if fits and offsets is not theirs and can_read(theirs):
        fits = torch.equal(offsets, theirs)
    if not fits:
        raise TypeError(f"{name} must have sequences as long as those of the other arguments")
    return values
