"""Losses of large language models as hand-written kernels: one read of the logits, any loss."""

import importlib
from typing import Any

from llmloss_ext import functional, linear, losses, metrics, nn, ops, training
from llmloss_ext.functional import TokenStats, cross_entropy, token_stats
from llmloss_ext.linear import (
    Plan,
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    plan,
)

__all__ = [
    "Plan",
    "TokenStats",
    "cross_entropy",
    "functional",
    "linear",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "linear_token_stats",
    "losses",
    "metrics",
    "nn",
    "ops",
    "parallel",
    "plan",
    "token_stats",
    "training",
]


def __getattr__(name: str) -> Any:
    """Imports `llmloss_ext.parallel` when it is asked for: it needs torch's compiler, a second."""
    if name == "parallel":
        return importlib.import_module("llmloss_ext.parallel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
