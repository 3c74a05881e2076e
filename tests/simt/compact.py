"""A few seconds of emulated kernels that notice any one thing gone wrong in them.

`find_fault` is what the mutants of the kernels are held against; `tests/test_simt_kernels.py` is
the thorough one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from oracle import Problem, cross_entropy, cross_entropy_gradient

from simt.expected import row_stats, stats_gradient
from simt.harness import SCHEDULES, STATISTICS, Case

# Of statistics, and of gradients.
TOLERANCES = {"bfloat16": (3e-6, 4e-3), "float32": (3e-6, 3e-6), "float64": (1e-11, 1e-11)}


def _problem(columns: int, rows: int = 3, **options: Any) -> Problem:
    rng = np.random.default_rng(columns)
    logits = rng.normal(0, 4, (rows, columns))
    # Far from 0, and rising: a state that is not moved to a new maximum overflows.
    logits += np.linspace(0, 200, columns)
    target = rng.integers(0, options.get("vocab_size") or columns, rows)
    target[0] = (options.get("vocab_size") or columns) - 1
    if rows > 1:
        target[1] = -100
    return Problem(logits, target, **options)


def _stats(case: Case, wanted: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    out, expected = case.row_stats(wanted), row_stats(case.problem)
    for name in wanted:
        yield out[name], getattr(expected, name)


def _checks(kernels: Any, dtype: str, tile: int) -> Iterator[tuple[int, Any, Any]]:
    """Which tolerance, what came, and what should have come."""
    yield from _each_task(kernels, dtype, tile)  # a moment, in which most mutants are caught
    split = (4, 227 << 10, 1)
    clusters = (1, 16 << 10, 8)
    for columns, device in ((61, split), (2 * tile - 1, split), (9 * tile + 5, (1, 1, 1)),
                            (9 * tile + 5, split), (300 * tile + 1, (1, 1, 1))):  # fmt: skip
        rows = 3 if columns < 100 * tile else 1
        for skew in (None, 0, 1):
            for wanted in (("log_prob", "lse"), STATISTICS):
                case = Case(kernels, dtype, _problem(columns, rows), skew, device=device)
                yield from ((0, *pair) for pair in _stats(case, wanted))
    # Logits at the lower cap, where a column too many counts as much as any other.
    capped = _problem(2 * tile - 1, softcap=5.0)
    capped.logits[...] -= 400
    yield from ((0, *pair) for pair in _stats(Case(kernels, dtype, capped), ("log_prob", "lse")))
    # So far from 0 that the reference in powers of two would overflow.
    far = _problem(2 * tile - 1)
    far.logits[...] = np.where(far.logits > 150, 3e38, -3e38)
    far.target[[0, 2]] = 2 * tile - 2  # another's log-probability is beyond float32
    yield from ((0, *pair) for pair in _stats(Case(kernels, dtype, far), ("log_prob", "lse")))
    # Far enough that it is rounded, and near enough that the logits still differ.
    near = _problem(2 * tile - 1)
    near.logits[...] = 30000 + 256 * np.round(near.logits / 100)
    near.logits[:, :64] = near.logits.max()
    yield from ((0, *pair) for pair in _stats(Case(kernels, dtype, near), ("mean_log_prob",)))
    yield (
        1,
        Case(kernels, dtype, near).row_grad(grad_loss=np.ones(3))[0],
        cross_entropy_gradient(Case(kernels, dtype, near).problem).logits,
    )
    # Columns that do not take part, in the last tile.
    for wanted in (("log_prob", "lse"), STATISTICS):
        case = Case(kernels, dtype, _problem(4 * tile, vocab_size=4 * tile - 3))
        yield from ((0, *pair) for pair in _stats(case, wanted))
    for columns, device in ((61, split), (9 * tile + 5, split)):
        for skew, out in ((None, None), (1, None), (0, 1)):
            p = _problem(columns, vocab_size=columns - 3)
            case = Case(kernels, dtype, p, skew, gap=1, device=device)
            grad, _ = case.row_grad(grad_loss=np.ones(3), skew=out)
            yield 1, grad, cross_entropy_gradient(case.problem).logits
            yield 1, case.logits.gaps(), np.full(2, 7.0)
        upstream = {"entropy": np.array([1.0, 1.0, -2.0]), "log_prob": np.ones(3)}
        upstream["log_sum_sq_probs"] = np.array([0.5, 1.0, 1.0])
        case = Case(kernels, dtype, _problem(columns, softcap=50.0), 1, device=device)
        grad, scale = case.row_grad(upstream, with_scale=True)
        expected = stats_gradient(case.problem, **upstream)
        size = np.abs(expected.scale).max() + 1
        yield 1, grad, expected.logits
        yield 1, scale / size, expected.scale / size
    # In the last two a part of the row, or all of it, does not fit in shared memory.
    devices = ((1, 227 << 10, 1), clusters, (1, 24 << 10, 1), (1, 1 << 10, 1))
    for columns, skew in ((61, 0), (61, 1), (17 * tile + 5, 0), (17 * tile + 5, 1)):
        for device in devices:
            p = _problem(columns, vocab_size=columns - 3)
            case = Case(kernels, dtype, p, skew, gap=1, device=device)
            out, grad = case.fused()
            yield 0, out["log_prob"], row_stats(case.problem).log_prob
            yield 1, grad, cross_entropy_gradient(case.problem).logits
            yield 1, case.logits.gaps(), np.full(2, 7.0)
    # The last in registers, in one block and in two; with zeros behind the vocabulary.
    for device in ((1, 48 << 10, 1), (1, 24 << 10, 2)):
        for columns in (17 * tile, 17 * tile - 3, 16 * tile + 8):
            p = _problem(17 * tile + 8, vocab_size=columns)
            p.target[0] = columns // 16 * 16 + 5 if columns > 17 * tile else columns - 1
            case = Case(kernels, dtype, p, 0, device=device)
            out, grad = case.fused()
            assert case.told["holds"] == (dtype != "float64"), "which chunks are held in registers"
            yield 0, out["log_prob"], row_stats(case.problem).log_prob
            yield 1, grad, cross_entropy_gradient(case.problem).logits
    # The same with nothing behind a row but the next one.
    case = Case(kernels, dtype, _problem(16 * tile + 8), 0, device=(1, 48 << 10, 1))
    out, grad = case.fused()
    assert case.told["holds"] == (dtype != "float64"), "which chunks are held in registers"
    yield 0, out["log_prob"], row_stats(case.problem).log_prob
    yield 1, grad, cross_entropy_gradient(case.problem).logits
    # Chunks of two tiles, some of which a block keeps.
    case = Case(kernels, dtype, _problem(260 * tile, 1), 0, device=(1, 64 << 10, 4))
    out, grad = case.fused()
    yield 0, out["log_prob"], row_stats(case.problem).log_prob
    yield 1, grad, cross_entropy_gradient(case.problem).logits
    case = Case(kernels, dtype, _problem(9, 1200))
    for reduction in ("none", "mean", "sum"):
        loss, _ = case.loss(reduction)
        yield 0, loss, cross_entropy(case.problem).reduced(reduction)
    # Two sums in one kernel: of the class weights, and of the tokens for the z-loss.
    weight = np.linspace(0.5, 3, 9)
    case = Case(kernels, dtype, _problem(9, 1200, weight=weight, z_loss=0.01))
    losses = cross_entropy(case.problem)
    for loss, (_, z_factor) in (case.loss("mean"), case.mean_loss()):
        yield 0, loss, losses.reduced("mean")
        yield 0, z_factor, losses.denominator / losses.tokens
    for skew in (None, 1):
        case = Case(kernels, dtype, _problem(tile + 3), skew, gap=1)
        expected = case.logits.values() * 0.5
        yield 1, case.scaled(0.5), expected
        yield 1, case.logits.gaps(), np.full(2, 7.0)


def _each_task(kernels: Any, dtype: str, tile: int) -> Iterator[tuple[int, Any, Any]]:
    """Kernels that are compiled for a few tasks: each is asked for what is just enough for it."""
    columns = 2 * tile + 5
    weight = np.linspace(0.5, 3, columns)
    for options in ({}, {"softcap": 50.0}, {"label_smoothing": 0.1, "weight": weight}):
        for wanted in (("log_prob", "lse"), ("mean_log_prob",), ("entropy",), ("argmax", "rank"),
                       ("log_sum_sq_probs",)):  # fmt: skip
            if "weight" not in options or wanted == ("mean_log_prob",):
                case = Case(kernels, dtype, _problem(columns, 2, **options), 1)
                yield from ((0, *pair) for pair in _stats(case, wanted))
    few = (1, 16 << 10, 1)
    for options in ({"softcap": 50.0}, {"label_smoothing": 0.1}, {"z_loss": 0.01},
                    {"label_smoothing": 0.1, "weight": weight}):  # fmt: skip
        p = _problem(columns, 2, **options)
        case = Case(kernels, dtype, p, 1)
        expected = cross_entropy_gradient(case.problem).logits
        size = np.abs(expected).max() + 1
        yield 1, case.row_grad(grad_loss=np.ones(2), skew=2)[0] / size, expected / size
        # In clusters, and where a part of the row is read twice.
        for device in ((1, 6 << 10, 4), few):
            case = Case(kernels, dtype, p, 1, device=device)
            yield 1, case.in_place()[1] / size, expected / size
    case = Case(kernels, dtype, _problem(columns, 2), 1)
    grad, _ = case.row_grad({"entropy": np.array([1.0, -2.0])})
    yield 1, grad, stats_gradient(case.problem, entropy=np.array([1.0, -2.0])).logits
    # Targets within a vector, with a probability that the gradient shows; the first has an equal.
    smoothed: dict[str, Any] = {"label_smoothing": 0.9, "weight": np.linspace(0.5, 3, 64)}
    for options in ({}, smoothed):
        flat = Problem(np.zeros((2, 64)), np.array([22, 43]), **options)
        flat.logits[[0, 0, 1], [21, 22, 43]] = 4
        case = Case(kernels, dtype, flat, 0)
        yield from ((0, *pair) for pair in _stats(case, ("argmax", "rank")))
        expected = cross_entropy_gradient(case.problem).logits
        yield 1, case.row_grad(grad_loss=np.ones(2), skew=0)[0], expected
        yield 1, case.in_place()[1], expected
    # Equals of the target in the batches before and after its own.
    equal = Problem(np.zeros((2, 2 * tile)), np.array([tile + 3, 7]))
    yield from ((0, *pair) for pair in _stats(Case(kernels, dtype, equal, 0), ("argmax", "rank")))
    # The scale's gradient, of a loss that needs nothing else.
    case = Case(kernels, dtype, _problem(61, 2, scale=0.1), 0)
    by_scale = cross_entropy_gradient(case.problem).scale
    _, scale = case.row_grad(grad_loss=np.ones(2), skew=0, with_scale=True)
    size = np.abs(by_scale).max() + 1
    yield 1, scale / size, by_scale / size
    # A loss whose gradient needs the row's values: they come from memory, or from the same kernel.
    focal = [Case(kernels, dtype, _problem(columns, 2), 1, focal_gamma=2.0) for _ in range(2)]
    yield 1, focal[0].fused()[1], focal[1].row_grad(grad_loss=np.ones(2))[0]


def find_fault(kernels: Any, dtype: str, schedules: Iterable[str] = SCHEDULES) -> str | None:
    """What is wrong under one schedule or another, or None."""
    for name in schedules:
        schedule = SCHEDULES[name]
        kernels.set_schedule(*schedule)
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                for which, actual, expected in _checks(kernels, dtype, kernels.tile_columns):
                    tolerance = TOLERANCES[dtype][which]
                    if not np.allclose(actual, expected, tolerance, tolerance, equal_nan=True):
                        return f"wrong values, {name}"
        except RuntimeError as error:  # a fault, a deadlock, shared memory out of bounds
            return f"{error}, {name}"
    return None
