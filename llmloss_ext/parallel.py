"""Vocabulary-parallel losses: the functions of `llmloss_ext` with the ``shard`` spelled out.

``parallel.cross_entropy(logits, labels, group=group)`` is ``llmloss_ext.cross_entropy(logits,
labels, shard=Shard(group))``. `llmloss_ext.Shard` says what each rank holds, and which calls work.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from . import functional, linear
from .shard import Shard

__all__ = [
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_token_stats",
    "token_stats",
]

T = TypeVar("T")

_SHARD = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    for name, kind, default in (
        ("group", "Any", None),
        ("vocab_start", "int | None", None),
        ("sum_input_grad", "bool", True),
    )
}


def _over_ranks(function: Callable[..., T]) -> Callable[..., T]:
    """The function with the parts of its ``shard`` as options."""

    @functools.wraps(function)
    def run(
        *args: Any,
        group: Any = None,
        vocab_start: int | None = None,
        sum_input_grad: bool = True,
        **options: Any,
    ) -> T:
        return function(*args, shard=Shard(group, vocab_start, sum_input_grad), **options)

    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name != "shard"]
    run.__signature__ = signature.replace(parameters=[*parameters, *_SHARD.values()])  # type: ignore[attr-defined]
    run.__doc__ = (
        f"`llmloss_ext.{function.__name__}` over the ranks of a process group.\n\n"
        "    Args:\n"
        "        group, vocab_start, sum_input_grad: See `llmloss_ext.Shard`.\n"
        f"        The other arguments are those of `llmloss_ext.{function.__name__}`.\n"
    )
    return run


cross_entropy = _over_ranks(functional.cross_entropy)
token_stats = _over_ranks(functional.token_stats)
linear_cross_entropy = _over_ranks(linear.linear_cross_entropy)
linear_token_stats = _over_ranks(linear.linear_token_stats)
linear_log_probs = _over_ranks(linear.linear_log_probs)
