"""The CUDA kernels, run by the emulator, against numpy float64.

The sources are those that nvcc compiles. Sizes are chosen by what a kernel does at them: a vector
holds 2 to 8 columns, a lane's batch and a warp's tile end at multiples of these, one to two tiles
have a warp each, more have a block, and a small device makes few rows split and rows need clusters.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("pybind11")
from oracle import Problem, cross_entropy, cross_entropy_gradient  # noqa: E402
from simt import build  # noqa: E402
from simt.expected import row_stats, stats_gradient  # noqa: E402
from simt.harness import ONE, SCHEDULES, STATISTICS, Case, library  # noqa: E402

pytestmark = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")

DTYPES = ["float32", "bfloat16", "float16", "float64"]
TILE = {"float32": 1024, "bfloat16": 2048, "float16": 2048, "float64": 512}
VALUE = {"float64": 1e-12}  # else 3e-6: statistics are float32
GRADIENT = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}
MANY = (4, 227 << 10, 1)  # multiprocessors for which few rows are split
PLAIN = ("log_prob", "lse")
FLOAT_STATISTICS = tuple(name for name in STATISTICS if name not in ("argmax", "rank"))


@pytest.fixture(scope="session")
def modules() -> dict[str, Any]:
    libraries = [library(dtype) for dtype in DTYPES]
    build.build_all(libraries)
    build.forget_old()
    return {dtype: build.load(lib) for dtype, lib in zip(DTYPES, libraries, strict=True)}


@pytest.fixture(params=SCHEDULES)
def schedule(request: Any) -> tuple[int, int]:
    return SCHEDULES[request.param]


@pytest.fixture
def kernels(modules: dict[str, Any], dtype: str, request: Any) -> Any:
    """Under one schedule or another, by the test's name: each family of tests sees all three.

    Where the order matters most, a test asks for ``schedule`` and runs under every one.
    """
    module = modules[dtype]
    name = list(SCHEDULES)[zlib.crc32(request.node.name.encode()) % len(SCHEDULES)]
    module.set_schedule(*SCHEDULES[name])
    return module


def problem(columns: int, rows: int = 3, seed: int = 0, **options: Any) -> Problem:
    """Random logits, an ignored row, and any option of the operators."""
    rng = np.random.default_rng(seed + columns)
    logits = rng.normal(0, 4, (rows, columns))
    vocab = options.get("vocab_size") or columns
    target: Any = rng.integers(0, vocab, rows)
    if rows > 1:
        target[1] = options.get("ignore_index", -100)
    if options.get("of_shard"):
        target[0] = -1
    if options.pop("probabilities", False):
        target = rng.dirichlet(np.ones(columns), rows)
    if options.pop("weighted", False):
        options["weight"] = rng.uniform(0.5, 2, columns)
        options["weight"][: columns // 3] = 0
        if options["weight"].sum() == 0:
            options["weight"][:] = 1
    if options.pop("token_weighted", False):
        options["token_weight"] = rng.uniform(0, 2, rows)
    if options.pop("masked", False):
        logits[:, rng.integers(0, columns, max(columns // 4, 1))] = -np.inf
        logits[np.arange(rows), np.maximum(target, 0)] = 1.0
    logits += options.pop("offset", 0.0)
    return Problem(logits, target, **options)


def check_stats(case: Case, out: dict[str, Any]) -> None:
    expected = row_stats(case.problem)
    tolerance = VALUE.get(case.dtype, 3e-6)
    for name, values in out.items():
        if name == "excess":
            want = np.where(case.problem.valid, np.expm1(expected.log_sum), 0.0)
        else:
            want = getattr(expected, name)
        want = (
            np.where(case.problem.valid, want, 0) if name in ("reference", "sum_weights") else want
        )
        if name == "sum_weights" and np.all(values[case.problem.valid] == 0):
            continue  # the mean was not asked for
        if name == "reference":  # of a row without statistics it may be anything
            values, want = (np.where(np.isnan(expected.lse), 0, v) for v in (values, want))
        np.testing.assert_allclose(
            values, want, rtol=tolerance, atol=tolerance, err_msg=name, equal_nan=True
        )


def check_gradient(case: Case, actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(
        actual, expected, rtol=GRADIENT[case.dtype], atol=GRADIENT[case.dtype], equal_nan=True
    )


def sizes(dtype: str) -> list[int]:
    tile = TILE[dtype]
    vector = tile // 256
    near_vector = [1, 2, vector - 1, vector, vector + 1, 32 * vector, 32 * vector + 1]
    near_tile = [tile // 2 + 3, tile - 1, tile, tile + vector + 1, 2 * tile, 2 * tile + 1]
    return sorted({*near_vector, 257, *near_tile, 5 * tile + 7, 19 * tile - 1})


SIZES = [(dtype, columns) for dtype in DTYPES for columns in sizes(dtype)]
OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 5.0},
    "scale and softcap": {"scale": 1.3, "softcap": 5.0},
    "weight": {"weighted": True, "label_smoothing": 0.1},
    "probabilities": {"probabilities": True, "label_smoothing": 0.1},
    "weighted probabilities": {"probabilities": True, "weighted": True},
    "columns masked by -inf": {"masked": True},
    "large offset": {"offset": 1e4},
    "z-loss and smoothing": {"z_loss": 1e-2, "label_smoothing": 0.2, "token_weighted": True},
    "weight and z-loss": {"weighted": True, "token_weighted": True, "z_loss": 1e-2},
    "a shard": {"of_shard": True},
    "a shard with a softcap": {"of_shard": True, "softcap": 5.0},
    "another ignore_index": {"ignore_index": 2, "token_weighted": True},
}


@pytest.mark.parametrize(("dtype", "columns"), SIZES)
def test_statistics_at_every_kind_of_size(kernels: Any, dtype: str, columns: int) -> None:
    for wanted in (PLAIN, STATISTICS):
        for skew in (None, 0, 1, 3):
            case = Case(kernels, dtype, problem(columns), skew)
            check_stats(case, case.row_stats(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("columns", [61, 6200])
def test_statistics_with_options(kernels: Any, dtype: str, option: str, columns: int) -> None:
    if option == "large offset" and dtype == "float16":
        pytest.skip("10,000 leaves float16 a step of 8")
    for extra in ({}, {"vocab_size": columns - 5}):
        case = Case(kernels, dtype, problem(columns, **OPTIONS[option], **extra), gap=3)
        check_stats(case, case.row_stats())


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_behind_the_vocabulary_do_not_count(kernels: Any, dtype: str) -> None:
    for tiles in (1, 4):
        for behind in (1, 9, TILE[dtype] // 2, TILE[dtype]):
            columns = tiles * TILE[dtype] + behind
            p = problem(columns, vocab_size=columns - behind + 1)
            p.logits[:, columns - behind + 1 :] = np.inf
            case = Case(kernels, dtype, p)
            check_stats(case, case.row_stats())


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_split_to_the_same_bits(kernels: Any, dtype: str, schedule: Any) -> None:
    kernels.set_schedule(*schedule)
    p = problem(17 * TILE[dtype] + 5)
    whole, split = (Case(kernels, dtype, p, device=device) for device in ((1, 1, 1), MANY))
    expected, actual = whole.row_stats(), split.row_stats()
    assert whole.told["blocks_per_row"] == 1
    assert split.told["blocks_per_row"] == 3
    check_stats(split, actual)
    for name, values in expected.items():
        np.testing.assert_array_equal(values, actual[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [1, 2, 5, 19])
def test_a_rows_bits_do_not_depend_on_its_place(kernels: Any, dtype: str, tiles: int) -> None:
    """Nor on the schedule: on other rows, on where it begins in memory, on who runs first."""
    p = problem(tiles * TILE[dtype] - 3)
    results = []
    for schedule in SCHEDULES.values():
        kernels.set_schedule(*schedule)
        for skew in range(16 // np.dtype(Case(kernels, dtype, p).logits.array.dtype).itemsize):
            results.append(Case(kernels, dtype, p, skew).row_stats())
    alone = Problem(p.logits[2:], p.target[2:])
    for result in results:
        for name, values in result.items():
            np.testing.assert_array_equal(values, results[0][name], name)
    for name, values in Case(kernels, dtype, alone).row_stats().items():
        assert values[0] == results[0][name][2], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_ordered_by_column(kernels: Any, dtype: str, schedule: Any) -> None:
    """Rank 0 is argmax, wherever the target and its equals lie among vectors, chunks and blocks."""
    kernels.set_schedule(*schedule)
    rng = np.random.default_rng(1)
    for columns, device in ((61, MANY), (4 * TILE[dtype] + 3, ONE), (17 * TILE[dtype] + 5, MANY)):
        for values in ([1.0], [1.0, 2.0], [-np.inf, -1.0, 0.0]):
            p = problem(columns, rows=5)
            p.logits[:] = rng.choice(values, columns)
            p.logits[:, 0] = values[-1]
            p.target[[2, 3]] = 0, columns - 1
            case = Case(kernels, dtype, p, 1, device=device)
            out = case.row_stats(("argmax", "rank"))
            check_stats(case, {name: out[name] for name in ("argmax", "rank")})
            hit = (out["argmax"] == p.target)[p.valid]
            np.testing.assert_array_equal(hit, (out["rank"] == 0)[p.valid])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_too_long_for_one_state_a_tile(kernels: Any, dtype: str) -> None:
    """More than 256 tiles: chunks of two."""
    case = Case(kernels, dtype, problem(300 * TILE[dtype] + 11, rows=1), 1)
    check_stats(case, case.row_stats())
    assert case.told["chunks"] == 151


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_rows_without_statistics(kernels: Any, dtype: str, special: float) -> None:
    for columns in (40, 6200):
        p = problem(columns, rows=4)
        p.logits[0, columns // 2] = special
        p.logits[2, :] = -np.inf
        p.target[3] = columns
        case = Case(kernels, dtype, p)
        check_stats(case, case.row_stats())
        grad, _ = Case(kernels, dtype, p).row_grad(grad_loss=np.ones(4))
        check_gradient(case, grad, cross_entropy_gradient(case.problem).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [-1e6, -1e9, -3e9, -1e10, -1e20, -1e30])
def test_large_finite_masks(kernels: Any, dtype: str, mask: float) -> None:
    """A lane may meet nothing else, and so may a row: no power of two may overflow meanwhile."""
    for columns in (61, 6200):
        p = problem(columns)
        p.logits[:, columns // 4 :] = mask
        p.logits[2] = mask if dtype != "float16" else -6e4
        p.target[[0, 2]] = 3, columns - 1
        for options in ({}, {"scale": 0.7}):
            case = Case(kernels, dtype, dataclasses.replace(p, **options))
            check_stats(case, case.row_stats())
            check_stats(case, case.row_stats(PLAIN))
            for label_smoothing in (0.0, 0.1):
                q = dataclasses.replace(case.problem, label_smoothing=label_smoothing)
                grad, _ = Case(kernels, dtype, q).row_grad(grad_loss=np.ones(3), skew=0)
                check_gradient(case, grad, cross_entropy_gradient(q).logits)
            upstream = {name: np.ones(3) for name in ("entropy", "log_sum_sq_probs")}
            grad, _ = case.row_grad(upstream, skew=0)
            check_gradient(case, grad, stats_gradient(case.problem, **upstream).logits)
        case = Case(kernels, dtype, p)
        out, grad = case.fused()
        check_stats(case, out)
        check_gradient(case, grad, cross_entropy_gradient(case.problem).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_active_are_not_read(kernels: Any, dtype: str) -> None:
    p = problem(9000, rows=5)
    p.target[[1, 2]] = -100
    p.target[3] = -3
    case = Case(kernels, dtype, p)
    address = case.logits.row(0).nbytes
    case.logits.memory.hide(address, 4 * address)
    out = case.row_stats()
    case.logits.memory.show()
    check_stats(case, out)


@pytest.mark.parametrize(("dtype", "columns"), SIZES)
def test_gradients_at_every_kind_of_size(kernels: Any, dtype: str, columns: int) -> None:
    grad_loss = np.array([0.5, 1.0, 2.0])
    for options in ({}, {"label_smoothing": 0.1}, {"softcap": 5.0}):
        p = problem(columns, **options)
        # In place at two misalignments; elsewhere, aligned as the logits and otherwise.
        for skew, out_skew in ((None, None), (1, None), (0, 0), (1, 1), (1, 0), (0, 1)):
            case = Case(kernels, dtype, p, skew)
            grad, _ = case.row_grad(grad_loss=grad_loss, skew=out_skew)
            check_gradient(case, grad, cross_entropy_gradient(case.problem, grad_loss).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("columns", [61, 6200])
def test_gradients_with_options(kernels: Any, dtype: str, option: str, columns: int) -> None:
    if option == "large offset" and dtype == "float16":
        pytest.skip("10,000 leaves float16 a step of 8")
    rng = np.random.default_rng(1)
    grad_loss = rng.normal(0, 1, 3)
    upstream = {name: rng.normal(0, 1, 3) for name in FLOAT_STATISTICS}
    if option == "columns masked by -inf":
        del upstream["mean_log_prob"]  # it is -inf
    for extra in ({}, {"vocab_size": columns - 5}):
        p = problem(columns, **OPTIONS[option], **extra)
        case = Case(kernels, dtype, p, gap=3)
        grad, _ = case.row_grad(grad_loss=grad_loss)
        check_gradient(case, grad, cross_entropy_gradient(case.problem, grad_loss).logits)
        assert (case.logits.gaps() == 7).all()

        case = Case(kernels, dtype, p, gap=3)
        grad, scale = case.row_grad(upstream, with_scale=True)
        expected = stats_gradient(case.problem, **upstream)
        check_gradient(case, grad, expected.logits)
        size = np.abs(expected.scale).max() + 1
        tolerance = 1e-11 if dtype == "float64" else 2e-5
        np.testing.assert_allclose(scale / size, expected.scale / size, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_statistic_has_a_gradient_of_its_own(kernels: Any, dtype: str, schedule: Any) -> None:
    kernels.set_schedule(*schedule)
    for columns in (61, 6200, 9 * TILE[dtype]):
        for name in FLOAT_STATISTICS:
            case = Case(kernels, dtype, problem(columns), device=MANY)
            upstream = {name: np.array([1.0, 1.0, -0.5])}
            grad, _ = case.row_grad(upstream, skew=0)
            check_gradient(case, grad, stats_gradient(case.problem, **upstream).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learnable_scale_is_read_on_the_device(kernels: Any, dtype: str) -> None:
    case = Case(kernels, dtype, problem(6200, scale=0.6), scale_on_device=True)
    check_stats(case, case.row_stats())
    case = Case(kernels, dtype, problem(6200, scale=0.6), scale_on_device=True)
    grad, _ = case.row_grad(grad_loss=np.ones(3), with_scale=True)
    check_gradient(case, grad, cross_entropy_gradient(case.problem).logits)


# Shared memory of a block, largest cluster, and what the plan makes of a row of 40 tiles (164 KB).
CLUSTERS = {
    "one block": ((1, 227 << 10, 1), 1, True),
    "two blocks": ((1, 100 << 10, 16), 2, True),
    "four blocks": ((1, 64 << 10, 16), 4, True),
    "sixteen blocks": ((1, 16 << 10, 16), 16, True),
    "read again": ((1, 64 << 10, 1), 1, False),
    "more for few rows": ((16, 227 << 10, 16), 4, True),
    "most for few rows": ((160, 227 << 10, 16), 16, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLUSTERS)
def test_fused(kernels: Any, dtype: str, name: str, schedule: Any) -> None:
    kernels.set_schedule(*schedule)
    device, cluster, staged = CLUSTERS[name]
    for skew in (None, 0, 1):
        for options in ({}, {"z_loss": 0.01, "vocab_size": 39 * TILE[dtype] + 9}):
            p = problem(40 * TILE[dtype] - 7, **options)
            case = Case(kernels, dtype, p, skew, device=device)
            out, grad = case.fused()
            assert (case.told["cluster"], case.told["is_staged"]) == (cluster, staged)
            expected = cross_entropy_gradient(case.problem).logits
            check_stats(case, out)
            check_gradient(case, grad, expected)
            # The same bits as from the other two kernels.
            other = Case(kernels, dtype, p, skew)
            stats = other.row_stats(PLAIN)
            for key, values in out.items():
                np.testing.assert_array_equal(values, stats[key], key)
            grad_after, _ = other.row_grad(grad_loss=np.ones(p.rows))
            np.testing.assert_array_equal(grad, grad_after)


# The same where rows begin at multiples of 16 bytes: what does not fit stays in registers.
HELD = {"one block": ((1, 100 << 10, 16), 1), "two blocks": ((1, 16 << 10, 16), 2)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HELD)
def test_fused_with_chunks_in_registers(kernels: Any, dtype: str, name: str, schedule: Any) -> None:
    kernels.set_schedule(*schedule)
    device, cluster = HELD[name]
    for options in ({}, {"vocab_size": 39 * TILE[dtype] + 9}):
        p = problem(40 * TILE[dtype], **options)
        case = Case(kernels, dtype, p, 0, device=device)
        out, grad = case.fused()
        holds = dtype != "float64"
        assert case.told["holds"] == holds
        assert not holds or (case.told["cluster"], case.told["is_staged"]) == (cluster, False)
        check_stats(case, out)
        check_gradient(case, grad, cross_entropy_gradient(case.problem).logits)
        other = Case(kernels, dtype, p, 0)
        stats = other.row_stats(("log_prob", "lse"))
        for key, values in out.items():
            np.testing.assert_array_equal(values, stats[key], key)
        grad_after, _ = other.row_grad(grad_loss=np.ones(p.rows))
        np.testing.assert_array_equal(grad, grad_after)


@pytest.mark.parametrize(("dtype", "columns"), SIZES)
def test_fused_at_every_kind_of_size(kernels: Any, dtype: str, columns: int) -> None:
    for skew in (None, 0, 1, 3):
        case = Case(kernels, dtype, problem(columns), skew, device=(1, 20 << 10, 8))
        out, grad = case.fused()
        check_stats(case, out)
        check_gradient(case, grad, cross_entropy_gradient(case.problem).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_in_place_with_options(kernels: Any, dtype: str, option: str, schedule: Any) -> None:
    """One kernel for the plain loss, two for any other."""
    kernels.set_schedule(*schedule)
    if option == "large offset" and dtype == "float16":
        pytest.skip("10,000 leaves float16 a step of 8")
    p = problem(6200, rows=4, **OPTIONS[option])
    if p.has_indices:
        p.target[3] = 6200  # out of range
    case = Case(kernels, dtype, p, 1, gap=3, device=(1, 20 << 10, 8))
    out, grad = case.in_place()
    more = OPTIONS[option].keys() & {"scale", "softcap", "label_smoothing", "probabilities"}
    assert case.told["is_fused"] == (not more)
    check_stats(case, out)
    check_gradient(case, grad, cross_entropy_gradient(case.problem).logits)
    assert (case.logits.gaps() == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "option",
    ["no option", "weight", "z-loss and smoothing", "weight and z-loss", "probabilities"],
)
@pytest.mark.parametrize("rows", [1, 40, 1200])
def test_losses(kernels: Any, dtype: str, option: str, rows: int, schedule: Any) -> None:
    kernels.set_schedule(*schedule)
    case = Case(kernels, dtype, problem(9, rows=rows, **OPTIONS[option]))
    expected = cross_entropy(case.problem)
    tolerance = VALUE.get(dtype, 3e-6)
    for reduction in ("none", "mean", "sum"):
        loss, denominator = case.loss(reduction)
        want = expected.reduced(reduction)
        np.testing.assert_allclose(loss, want, rtol=tolerance, atol=tolerance)
        if reduction == "mean":
            numbers = (expected.denominator, expected.denominator / expected.tokens)
            np.testing.assert_allclose(denominator[0], numbers[0], rtol=tolerance)
            if case.problem.z_loss:
                np.testing.assert_allclose(denominator[1], numbers[1], rtol=tolerance)
    loss, _ = case.loss("mean", 7.0)
    np.testing.assert_allclose(loss, expected.reduced("mean", 7.0), rtol=tolerance, atol=tolerance)
    assert case.loss("mean", 0.0)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["weight and z-loss", "softcap"])
def test_a_mean_has_its_own_factor_of_the_z_loss(kernels: Any, dtype: str, option: str) -> None:
    mean = (4.0, 0.5)
    for columns in (61, 6200):
        p = problem(columns, **OPTIONS[option])
        case = Case(kernels, dtype, p, gap=3)
        scaled = dataclasses.replace(case.problem, z_loss=case.problem.z_loss * mean[1])
        expected = cross_entropy_gradient(scaled, 1 / mean[0]).logits
        grad, _ = case.row_grad(grad_loss=np.ones(p.rows), skew=0, mean=mean)
        check_gradient(case, grad, expected)
        _, grad = Case(kernels, dtype, p, gap=3, device=(1, 20 << 10, 8)).in_place(mean)
        check_gradient(case, grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["no option", "z-loss and smoothing", "softcap"])
def test_a_row_without_a_gradient_is_not_read(kernels: Any, dtype: str, option: str) -> None:
    """Nan at a token of weight 0, under an upstream gradient of 0, or in a step of 0 items."""
    for columns in (61, 6200):
        tokens = np.array([1.0, 0.0, 2.0])
        p = problem(columns, **OPTIONS[option] | {"token_weighted": False})
        clean = dataclasses.replace(p, token_weight=tokens)
        dirty = dataclasses.replace(clean, logits=clean.logits.copy())
        dirty.logits[1] = np.nan
        device = (1, 20 << 10, 8)
        cases = [Case(kernels, dtype, q, gap=3, device=device) for q in (clean, dirty)]
        losses = [case.loss("mean")[0] for case in cases]
        assert losses[0] == losses[1]
        grads = [case.row_grad(grad_loss=np.ones(3), skew=0)[0] for case in cases]
        np.testing.assert_array_equal(*grads)
        assert (grads[1][1] == 0).all()
        for name in FLOAT_STATISTICS:
            grad, _ = cases[1].row_grad({name: np.array([1.0, 0.0, -0.5])}, skew=0)
            assert (grad[1] == 0).all()
            assert np.isfinite(grad).all()
        assert (cases[1].row_grad(grad_loss=np.ones(3), skew=0, mean=(np.inf, 1.0))[0] == 0).all()
        fused = [case.in_place()[1] for case in cases]
        np.testing.assert_array_equal(*fused)
        assert (fused[1][1] == 0).all()


def confident(rng: Any, dtype: str, columns: int, **options: Any) -> Problem:
    """A row for each of these odds of its target, at each of these places of it."""
    odds = np.array([1.0, 1e4, 1e9])
    tile = TILE[dtype]
    places = [0, columns - 1, tile // 2, tile - 1, tile, 3 * tile + tile // 3]
    target = np.array([place for place in places if 0 <= place < columns for _ in odds])
    odds = np.tile(odds, len(target) // len(odds))
    rows = np.arange(len(target))
    logits = rng.normal(0, 2, (len(target), columns))
    logits[rows, target] = -np.inf
    logits[rows, target] = np.log(np.exp(logits).sum(1) * odds)
    return Problem(logits, target, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(kernels: Any, dtype: str) -> None:
    """As p goes to 1, the loss and the target's gradient keep their relative precision."""
    rng = np.random.default_rng(1)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    step = 6e-8 if dtype == "float16" else 0.0  # of its subnormal numbers
    scale = 2.0**15 if dtype == "float16" else 1.0
    # One other column; vectors; a batch that is not whole; several chunks, the last not whole.
    for columns in (2, 61, TILE[dtype] // 2 + 3, 5 * TILE[dtype] + 7):
        p = confident(rng, dtype, columns)
        cases = [Case(kernels, dtype, p, device=device) for device in (ONE, (1, 20 << 10, 8))]
        rows, x = np.arange(p.rows), cases[0].problem.logits
        others = np.exp(x - x[rows, p.target][:, None])
        others[rows, p.target] = 0
        others = others.sum(1)
        loss, gradient = np.log1p(others), -others / (1 + others)
        for wanted in (PLAIN, (*PLAIN, "mean_log_prob"), STATISTICS):  # kernels of other tasks
            stats = cases[0].row_stats(wanted)
            np.testing.assert_allclose(-stats["log_prob"], loss, rtol=tolerance)
            sure = others < 0.5
            np.testing.assert_allclose(stats["excess"][sure], others[sure], rtol=tolerance)
        grad, _ = cases[0].row_grad(grad_loss=np.full(p.rows, scale), skew=0)
        at_target = grad[rows, p.target] / scale
        rounded = GRADIENT[dtype] if dtype in ("bfloat16", "float16") else tolerance
        np.testing.assert_allclose(at_target, gradient, rtol=rounded, atol=step / scale)
        for case in cases:
            stats, grad = case.fused()
            np.testing.assert_allclose(-stats["log_prob"], loss, rtol=tolerance)
            np.testing.assert_allclose(grad[rows, p.target], gradient, rtol=rounded, atol=step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows_of_shards(kernels: Any, dtype: str) -> None:
    """The same where the others lie beside the target or elsewhere."""
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    p = confident(np.random.default_rng(1), dtype, 61)
    case = Case(kernels, dtype, p)
    rows, x = np.arange(p.rows), case.problem.logits
    others = np.exp(x - x[rows, p.target][:, None])
    others[rows, p.target] = 0
    loss = np.log1p(others.sum(1))
    for bounds in ([0, 61], [0, 1, 61], [0, 30, 60, 61]):
        stats, owners = case.merged(bounds)
        assert (owners == 1).all()
        np.testing.assert_allclose(-stats["log_prob"], loss, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_one_column_is_certain(kernels: Any, dtype: str) -> None:
    """To the bit: no others, no loss, no gradient."""
    p = Problem(np.array([[3.5], [-700.0]]), np.array([0, 0]))
    case = Case(kernels, dtype, p)
    assert (case.row_stats()["log_prob"] == 0).all()
    assert (case.row_grad(grad_loss=np.ones(2), skew=0)[0] == 0).all()
    stats, grad = case.fused()
    assert (stats["log_prob"] == 0).all()
    assert (grad == 0).all()


def focal(problem: Problem, gamma: float, grad_loss: Any) -> tuple[Any, Any]:
    """Each row's loss with the factor (1 - p_y)^gamma, and the gradient of grad_loss times it."""
    stats = row_stats(problem)
    at_target = (1 - problem.label_smoothing) * problem.target_weight
    with np.errstate(invalid="ignore", divide="ignore"):
        ce = -at_target * stats.log_prob - problem.label_smoothing * stats.mean_log_prob
        others = -np.expm1(stats.log_prob)
        factor = others**gamma
        slope = np.where(others == 0, 0, -gamma * factor / others * np.exp(stats.log_prob))
        loss = problem.tokens * (factor * ce + problem.z_loss * stats.lse**2)
        each = grad_loss * problem.tokens
        gradient = stats_gradient(
            problem,
            log_prob=each * (slope * ce - at_target * factor),
            mean_log_prob=-each * problem.label_smoothing * factor,
            lse=2 * each * problem.z_loss * stats.lse,
        )
    return np.where(problem.ignored, 0, loss), gradient.logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("option", ["no option", "weight", "softcap", "z-loss and smoothing"])
def test_focal_losses(kernels: Any, dtype: str, gamma: float, option: str) -> None:
    """The two kernels and the one in place, to the same bits; in a row of one column p is 1."""
    rng = np.random.default_rng(1)
    tolerance = VALUE.get(dtype, 3e-6)
    for columns in (1, 61, 6200, 17 * TILE[dtype] + 5):
        p = problem(columns, **OPTIONS[option])
        grad_loss = rng.normal(0, 1, 3)
        case = Case(kernels, dtype, p, gap=3, focal_gamma=gamma)
        expected, gradient = focal(case.problem, gamma, grad_loss)
        loss, _ = case.loss("none")
        np.testing.assert_allclose(loss, expected, rtol=tolerance, atol=tolerance)
        grad, _ = case.row_grad(grad_loss=grad_loss, skew=0)
        check_gradient(case, grad, gradient)

        separate, _ = case.row_grad(grad_loss=np.ones(3))
        for device in ((1, 227 << 10, 1), (1, 16 << 10, 8)):
            in_place = Case(kernels, dtype, p, gap=3, focal_gamma=gamma, device=device)
            np.testing.assert_array_equal(in_place.in_place()[1], separate)


@pytest.mark.parametrize(("dtype", "columns"), SIZES)
def test_scale(kernels: Any, dtype: str, columns: int) -> None:
    for skew in (None, 1):
        case = Case(kernels, dtype, problem(columns), skew, gap=1)
        expected = case.logits.values() * 0.5
        check_gradient(case, case.scaled(0.5), expected)
        assert (case.logits.gaps() == 7).all()
        garbage = problem(columns)
        garbage.logits[0, :] = np.nan
        garbage.logits[1, -1] = np.inf
        assert (Case(kernels, dtype, garbage, skew, gap=1).scaled(0.0) == 0).all()
    case = Case(kernels, dtype, problem(columns))
    address = case.logits.row(0).nbytes
    case.logits.memory.hide(0, 3 * address)  # a factor of 1 reads nothing
    case.kernels.scale(case._arguments() | {"factor": case._address([1.0], case.real)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(kernels: Any, dtype: str) -> None:
    case = Case(kernels, dtype, Problem(np.zeros((0, 5)), np.zeros(0, np.int64)))
    case.row_stats()
    case.fused()
    loss, _ = case.loss("sum")
    assert loss == 0
    assert np.isnan(case.loss("mean")[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [9, 700, 6200])
def test_int32_targets(kernels: Any, dtype: str, columns: int) -> None:
    """They end where memory cannot be read: each number of rows is another alignment."""
    for rows in (1, 2, 3, 5):
        p = problem(columns, rows=rows)
        case = Case(kernels, dtype, p, int64=False, device=MANY)
        check_stats(case, case.row_stats())
        expected = cross_entropy_gradient(case.problem).logits
        grad, _ = Case(kernels, dtype, p, int64=False).row_grad(grad_loss=np.ones(rows))
        check_gradient(case, grad, expected)
        _, grad = Case(kernels, dtype, p, int64=False).fused()
        check_gradient(case, grad, expected)
        loss, _ = Case(kernels, dtype, p, int64=False).loss("sum")
        want = cross_entropy(case.problem).reduced("sum")
        np.testing.assert_allclose(loss, want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_shards_merge_to_the_whole(kernels: Any, dtype: str, masked: bool) -> None:
    """More rows than a block has threads; a shard may have no logit above -inf."""
    p = problem(130, rows=260, masked=masked, offset=100.0)
    if masked:
        p.logits[:, :40] = -np.inf
        p.target[p.valid] = np.maximum(p.target[p.valid], 40)
        p.logits[np.arange(p.rows), np.maximum(p.target, 0)] = 1.0
    for bounds in ([0, 130], [0, 40, 130], [0, 1, 2, 77, 130]):
        case = Case(kernels, dtype, p)
        out, owners = case.merged(bounds)
        assert np.array_equal(owners, p.valid)
        check_stats(case, out)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_target_without_one_owner_has_no_statistics(kernels: Any, dtype: str) -> None:
    p = problem(50, rows=4)
    p.target[0] = 30
    case = Case(kernels, dtype, p)
    out, owners = case.merged([0, 20])  # nobody has 30, and 20 are not 50
    assert owners[0] == -1
    assert np.isnan(out["log_prob"][0])
    assert np.isnan(out["lse"][0])
    assert out["argmax"][0] == -1
    assert out["log_prob"][1] == 0  # ignored all the same
