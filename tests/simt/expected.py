"""The float64 oracle, with what it does not know of the kernels' statistics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
from oracle import Gradient, Problem

__all__ = ["row_stats", "stats_gradient"]


def row_stats(problem: Problem) -> SimpleNamespace:
    """The statistics of every row, with log_sum_sq_probs."""
    stats = oracle.row_stats(problem)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_sum_sq = np.log(np.exp(2 * stats.log_p).sum(1))
    log_sum_sq = np.where(problem.ignored, 0.0, log_sum_sq)
    log_sum_sq = np.where(problem.out_of_range, np.nan, log_sum_sq)
    return SimpleNamespace(**{**vars(stats), "log_sum_sq_probs": log_sum_sq})


def stats_gradient(problem: Problem, log_sum_sq_probs: Any = 0.0, **upstream: Any) -> Gradient:
    """The gradient of sum over rows of upstream times statistic; an upstream is given per row."""
    known = oracle.stats_gradient(problem, **upstream)
    if not np.any(log_sum_sq_probs):
        return known
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.exp(oracle.row_stats(problem).log_p)
        each = 2 * np.broadcast_to(log_sum_sq_probs, problem.rows)[:, None]
        g = each * p * (p / (p**2).sum(1, keepdims=True) - 1)
        dx_dz, dx_dscale = problem.slopes()
        logits = known.logits.copy()
        logits[problem.valid, : problem.vocab] += (g * dx_dz)[problem.valid]
        scale = np.where(g == 0, 0, g * dx_dscale).sum(1)
    return Gradient(logits, known.scale + np.where(problem.valid, scale, 0.0))
