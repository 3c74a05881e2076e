"""The row statistics, their losses and their gradients in plain numpy float64.

Written from the definitions and not from the code under test: no chunks, no collapsed coefficients,
no online merge. Every function takes whole arrays; ``logits`` are (rows, columns).

A row without a valid target has agreed values, which are part of the definition:
ignored rows are 0 (argmax -1, rank vocab_size), rows whose target lies outside [0, vocab_size) are
nan (the same argmax and rank), and the gradient of both is zero. A row with a nan or +inf among its
logits has no statistics either: nan throughout, also in its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """What is asked of the logits, in the words of the operators.

    ``target`` holds class indices (rows) or probabilities (rows, columns). ``label_smoothing``
    belongs to the loss, but it also mixes probability targets with the uniform distribution, and so
    takes part in their weighted mean. Of a shard, the columns are a part of the classes, and a
    target of -1 is in another part.
    """

    logits: Floats
    target: NDArray[Any]
    weight: Floats | None = None
    ignore_index: int = -100
    vocab_size: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    token_weight: Floats | None = None
    of_shard: bool = False

    @property
    def rows(self) -> int:
        return self.logits.shape[0]

    @property
    def columns(self) -> int:
        return self.logits.shape[1]

    @property
    def vocab(self) -> int:
        return self.columns if self.vocab_size is None else self.vocab_size

    @property
    def has_indices(self) -> bool:
        return self.target.ndim == 1

    @property
    def ignored(self) -> Bools:
        if not self.has_indices:
            return np.zeros(self.rows, bool)
        return np.asarray(self.target == self.ignore_index)

    @property
    def out_of_range(self) -> Bools:
        if not self.has_indices:
            return np.zeros(self.rows, bool)
        outside = (self.target < 0) | (self.target >= self.vocab)
        return np.asarray(~self.ignored & ~self.elsewhere & outside)

    @property
    def elsewhere(self) -> Bools:
        if not self.has_indices or not self.of_shard:
            return np.zeros(self.rows, bool)
        return np.asarray(self.target == -1)

    @property
    def has_column(self) -> Bools:
        """Whether the target is one of the columns."""
        return self.valid & ~self.elsewhere & self.has_indices

    @property
    def valid(self) -> Bools:
        return ~self.ignored & ~self.out_of_range

    @property
    def index(self) -> Ints:
        """The target's column; 0 where there is none."""
        if not self.has_indices:
            return np.zeros(self.rows, np.int64)
        return np.where(self.has_column, self.target, 0).astype(np.int64)

    @property
    def class_weight(self) -> Floats:
        if self.weight is None:
            return np.ones(self.vocab)
        return np.asarray(self.weight, np.float64)[: self.vocab]

    @property
    def target_weight(self) -> Floats:
        """w_y, which weighs a row's loss; the weights of probabilities are in their mean."""
        if not self.has_indices:
            return np.ones(self.rows)
        return np.where(self.has_column, self.class_weight[self.index], 1.0)

    @property
    def tokens(self) -> Floats:
        if self.token_weight is None:
            return np.ones(self.rows)
        return np.asarray(self.token_weight, np.float64)

    @property
    def column_weights(self) -> Floats:
        """a (rows, vocab): mean_log_prob = sum a log p."""
        uniform = 1.0 / self.vocab
        if self.has_indices:
            return np.broadcast_to(self.class_weight * uniform, (self.rows, self.vocab))
        q = np.asarray(self.target, np.float64)[:, : self.vocab]
        smoothed = (1 - self.label_smoothing) * q + self.label_smoothing * uniform
        return self.class_weight * smoothed

    def transformed(self) -> Floats:
        """The logits x that the loss sees: x = cap tanh(scale z / cap)."""
        x = self.scale * self.logits[:, : self.vocab].astype(np.float64)
        return self.softcap * np.tanh(x / self.softcap) if self.softcap > 0 else x

    def slopes(self) -> tuple[Floats, Floats]:
        """dx/dz and dx/dscale; a capped infinity does not move."""
        z = self.logits[:, : self.vocab].astype(np.float64)
        if self.softcap <= 0:
            return np.full_like(z, self.scale), z
        slope = 1 / np.cosh(np.clip(self.scale * z / self.softcap, -300, 300)) ** 2
        return self.scale * slope, np.where(np.isinf(z), 0.0, z) * slope


@dataclass(frozen=True)
class Stats:
    """One number a row each; ``x`` and ``log_p`` (rows, vocab) are kept for the gradients."""

    log_prob: Floats
    lse: Floats
    entropy: Floats
    mean_log_prob: Floats
    argmax: Ints
    rank: Ints
    reference: Floats
    log_sum: Floats
    sum_weights: Floats
    x: Floats = field(repr=False)
    log_p: Floats = field(repr=False)


def _product(a: Floats, b: Floats) -> Floats:
    """A b with 0 times anything 0: what has no weight or no probability does not count."""
    with np.errstate(invalid="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, a * b)


def row_stats(problem: Problem) -> Stats:
    """The statistics of every row."""
    x = problem.transformed()
    broken = np.isnan(x).any(1) | np.isposinf(x).any(1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = np.where(broken, np.nan, x.max(1))
        reference = np.where(np.isneginf(largest), 0.0, largest)
        log_sum = np.log(np.exp(x - reference[:, None]).sum(1))
        log_p = (x - reference[:, None]) - log_sum[:, None]
        p = np.exp(log_p)
        a = problem.column_weights
        # Without a target column the target's logit counts as -inf.
        rows = np.arange(problem.rows)
        target_logit = np.where(problem.has_column, x[rows, problem.index], -np.inf)
        stats = {
            "log_prob": (target_logit - reference) - log_sum,
            "lse": reference + log_sum,
            "entropy": -_product(p, log_p).sum(1),
            "mean_log_prob": _product(a, log_p).sum(1),
            "reference": reference,
            "log_sum": log_sum,
            "sum_weights": a.sum(1),
        }
        argmax = np.where(broken, -1, np.where(np.isnan(x), -np.inf, x).argmax(1))
        # Equal logits are ordered by column. Without a target column there is none before it.
        column = np.where(problem.has_column, problem.index, 0)[:, None]
        equal = (x == target_logit[:, None]) & (np.arange(x.shape[1]) < column)
        rank = np.where(broken, problem.vocab, ((x > target_logit[:, None]) | equal).sum(1))
    for name, absent in (("ignored", 0.0), ("out_of_range", np.nan)):
        stats = {key: np.where(getattr(problem, name), absent, v) for key, v in stats.items()}
    argmax = np.where(problem.valid, argmax, -1)
    rank = np.where(problem.valid, rank, problem.vocab)
    return Stats(**stats, argmax=argmax, rank=rank, x=x, log_p=log_p)


@dataclass(frozen=True)
class Gradient:
    """dL/dlogits (rows, columns) and each row's share of dL/dscale (rows)."""

    logits: Floats
    scale: Floats


def stats_gradient(
    problem: Problem,
    *,
    log_prob: Floats | float = 0.0,
    lse: Floats | float = 0.0,
    entropy: Floats | float = 0.0,
    mean_log_prob: Floats | float = 0.0,
) -> Gradient:
    """The gradient of sum over rows of upstream times statistic; an upstream is given per row."""
    stats = row_stats(problem)

    def column(upstream: Floats | float) -> Floats:
        return np.broadcast_to(np.asarray(upstream, np.float64), (problem.rows,))[:, None]

    with np.errstate(invalid="ignore", over="ignore"):
        log_p = stats.log_p
        p = np.exp(log_p)
        onehot = np.zeros_like(p)
        onehot[np.arange(problem.rows), problem.index] = problem.has_column
        a = problem.column_weights
        h = -_product(p, log_p).sum(1, keepdims=True)
        g = column(log_prob) * (onehot - p) + column(lse) * p
        g = g + column(mean_log_prob) * (a - p * a.sum(1, keepdims=True))
        if np.any(column(entropy)):
            g = g - column(entropy) * (_product(p, log_p) + p * h)
        # The target's column without cancellation as its p approaches 1.
        only = -np.expm1(log_p)
        g = np.where(onehot == 1, g - column(log_prob) * (1 - p) + column(log_prob) * only, g)
        dx_dz, dx_dscale = problem.slopes()
        dz = np.zeros((problem.rows, problem.columns))
        dz[:, : problem.vocab] = g * dx_dz
        scale = _product(g, dx_dscale).sum(1)
    dz[~problem.valid] = 0
    return Gradient(dz, np.where(problem.valid, scale, 0.0))


@dataclass(frozen=True)
class Loss:
    """Per-row losses without and of the z-loss, and what the mean divides the sum of each by."""

    rows: Floats
    z_rows: Floats
    denominator: float
    tokens: float

    def reduced(self, reduction: str, num_items: float | None = None) -> Floats:
        if reduction == "none":
            return self.rows + self.z_rows
        total, z_total = self.rows.sum(), self.z_rows.sum()
        if reduction == "sum":
            return total + z_total
        with np.errstate(invalid="ignore", divide="ignore"):
            if num_items is not None:
                return (total + z_total) / np.float64(num_items)
            return total / np.float64(self.denominator) + z_total / np.float64(self.tokens)


def _shares(problem: Problem) -> tuple[float, float]:
    """How much of the loss is the target's log-probability, and how much the weighted mean."""
    if not problem.has_indices:
        return 0.0, 1.0
    return 1.0 - problem.label_smoothing, problem.label_smoothing


def cross_entropy(problem: Problem) -> Loss:
    """-(1 - eps) w_y log p_y - eps mean_log_prob + lambda lse^2, times the token's weight."""
    stats = row_stats(problem)
    at_target, at_mean = _shares(problem)
    rows, z_rows = np.zeros(problem.rows), np.zeros(problem.rows)
    with np.errstate(invalid="ignore"):
        if at_target:
            rows = rows - at_target * problem.target_weight * stats.log_prob
        if at_mean:
            rows = rows - at_mean * stats.mean_log_prob
        if problem.z_loss:
            z_rows = problem.tokens * problem.z_loss * stats.lse**2
        rows = problem.tokens * rows
    tokens = np.where(problem.ignored, 0.0, problem.tokens)
    rows, z_rows = (np.where(tokens == 0, 0.0, each) for each in (rows, z_rows))
    return Loss(rows, z_rows, float((problem.target_weight * tokens).sum()), float(tokens.sum()))


def cross_entropy_gradient(problem: Problem, upstream: Floats | float = 1.0) -> Gradient:
    """The gradient of sum of upstream times the per-row losses; a mean has it in ``upstream``."""
    stats = row_stats(problem)
    at_target, at_mean = _shares(problem)
    with np.errstate(invalid="ignore"):
        each = np.asarray(upstream, np.float64) * problem.tokens
        lse = 2 * problem.z_loss * stats.lse * each if problem.z_loss else 0.0
        return stats_gradient(
            problem,
            log_prob=-each * at_target * problem.target_weight,
            mean_log_prob=-each * at_mean,
            lse=lse,
        )
