"""What a public function does before its own work: jagged batches, and a range for profilers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled

from .dtensors import call_with_dtensors, is_dtensor
from .jagged import call_jagged

__all__ = ["entry_point"]

F = TypeVar("F", bound=Callable[..., Any])


def entry_point(first: str, *per_token: str) -> Callable[[F], F]:
    """Decorates a public function of logits or hidden states.

    Args:
        first: The name of its first argument.
        per_token: The names of the arguments with something for each token.
    """

    def decorate(function: F) -> F:
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            # A small call pays for these lines.
            if torch.compiler.is_compiling():
                return function(*args, **options)
            if _are_plain(args) and _are_plain(options.values()) and not _profiler_enabled():
                return function(*args, **options)
            named = dict(zip(parameters, args, strict=False)) | options
            input = named.get(first)
            if isinstance(input, Tensor) and input.is_nested:
                return call_jagged(call, (first, *per_token), named)
            if any(map(is_dtensor, named.values())):
                return call_with_dtensors(call, named)
            if not _profiler_enabled():
                return function(*args, **options)
            with torch.profiler.record_function(_range_name(function.__name__, named)):
                return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate


_PLAIN = frozenset({Tensor, torch.nn.Parameter, NoneType, bool, int, float, str})


def _are_plain(arguments: Collection[Any]) -> bool:
    """Whether there is no tensor of a kind of its own, such as nested tensors and DTensors."""
    for x in arguments:  # noqa: SIM110 (a generator takes three times as long)
        if type(x) not in _PLAIN:
            return False
    return True


def _range_name(function: str, named: dict[str, Any]) -> str:
    """Such as ``llmloss.linear_cross_entropy(N=8192, D=4096, V=128256, bfloat16)``.

    `torch.profiler` shows it, and so do NVTX ranges under `torch.autograd.profiler.emit_nvtx`.
    """
    sizes = ""
    tensors = [x for x in named.values() if isinstance(x, Tensor)]
    if tensors:
        input, *others = tensors
        features = input.shape[-1] if input.dim() else 1
        tokens = input.numel() // max(features, 1)
        sizes = f"N={tokens}, V={features}"
        if "linear_weight" in named or "student_weight" in named:
            sizes = f"N={tokens}, D={features}, V={others[0].shape[0]}"
        sizes += f", {str(input.dtype).removeprefix('torch.')}"
    return f"llmloss.{function}({sizes})"
