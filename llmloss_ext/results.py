"""What the public functions return: tensors, and tuples of tensors and of None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def mapped(function: Callable[[Tensor], Any], result: Any) -> Any:
    """The result, with what a function makes of each tensor in its place."""
    if isinstance(result, Tensor):
        return function(result)
    if not isinstance(result, tuple):
        return result
    parts = (mapped(function, part) for part in result)
    return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
