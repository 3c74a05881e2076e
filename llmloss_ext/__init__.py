"""Losses of large language models as hand-written kernels: one read of the logits, any loss."""

from llmloss_ext import functional, nn, ops
from llmloss_ext.functional import TokenStats, cross_entropy, token_stats

__all__ = ["TokenStats", "cross_entropy", "functional", "nn", "ops", "token_stats"]
