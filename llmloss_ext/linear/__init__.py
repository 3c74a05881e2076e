"""Losses straight from hidden states: the projection and the loss, a chunk of tokens at a time."""

from . import flops  # noqa: F401  (registers itself)
from .cost import predict
from .cpu_products import is_upcast
from .divergence import linear_distillation_loss, linear_kl_div
from .functional import linear_cross_entropy, linear_log_probs, linear_token_stats
from .planning import Plan, plan

__all__ = [
    "Plan",
    "is_upcast",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_kl_div",
    "linear_log_probs",
    "linear_token_stats",
    "plan",
    "predict",
]
