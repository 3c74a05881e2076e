"""Losses of large language models as hand-written kernels: one read of the logits, any loss."""

from llmloss_ext import functional, linear, losses, metrics, nn, ops, parallel, training
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
