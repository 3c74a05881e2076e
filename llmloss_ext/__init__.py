"""Losses of large language models as hand-written kernels: one read of the logits, any loss."""

import importlib
from typing import Any

from . import functional, linear, losses, metrics, nn, ops, training
from .functional import cross_entropy, token_stats
from .linear import (
    Plan,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    plan,
)
from .shard import Shard
from .statistics import TokenStats
from .version import __version__

__all__ = [
    "Plan",
    "Shard",
    "TokenStats",
    "__version__",
    "cross_entropy",
    "functional",
    "linear",
    "linear_cross_entropy",
    "linear_distillation_loss",
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
    """Imports `parallel` when it is asked for: it needs torch's compiler, a second."""
    if name == "parallel":
        return importlib.import_module(".parallel", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
