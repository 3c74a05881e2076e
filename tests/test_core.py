"""The torch-free core, bound to numpy (tests/cpp/bindings.cpp), against numpy in float64."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
from properties import hypothesis, st  # noqa: E402

from llmloss_ext.cli import info  # noqa: E402

BUILD = Path(__file__).parents[1] / "build" / "core"
sys.path.insert(0, str(BUILD))
core = pytest.importorskip("llmloss_core", reason="the numpy binding is not built: make cpp-test")
sys.path.remove(str(BUILD))

ISAS = core.isas
DTYPES = ["float32", "float64", "bfloat16", "float16"]
STATISTICS = core.statistics[: core.float_statistics]
VALUE = {"float64": 1e-12}  # else 3e-6: statistics are float32
GRADIENT = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}


def test_the_instruction_sets_have_their_names_in_python():
    """In the same order: `llmloss info` reads a number."""
    assert tuple(ISAS) == info.ISAS


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request) -> int:
    if not core.has_isa(request.param):
        pytest.skip(f"this processor has no {ISAS[request.param]}")
    return request.param


def stored(x, dtype: str):
    """x rounded to dtype (bfloat16: to its uint16 bits), and what that means in float64."""
    if dtype != "bfloat16":
        rounded = x.astype(dtype)
        return rounded, rounded.astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return bits, as_float64(bits, dtype)


def as_float64(array, dtype: str):
    if dtype != "bfloat16":
        return array.astype(np.float64)
    return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def oracle(x, target: int, weights):
    """The statistics of one row of float64 logits."""
    top = x.max()
    log_sum = np.log(np.exp(x - top).sum())
    log_p = (x - top) - log_sum
    p = np.exp(log_p)
    used = weights != 0
    return {
        "log_prob": log_p[target],
        "lse": top + log_sum,
        "entropy": -(p[p > 0] * log_p[p > 0]).sum(),
        "log_sum_sq_probs": np.log((p**2).sum()),
        "mean_log_prob": (weights[used] * log_p[used]).sum(),
        "argmax": int(x.argmax()),
        "rank": int((x > x[target]).sum() + (x[:target] == x[target]).sum()),
    }


def oracle_gradient(x, target: int, upstream):
    """dL/dx of one row; the mean's weights are 1/V."""
    s = oracle(x, target, np.full(x.size, 1 / x.size))
    log_p = (x - x.max()) - np.log(np.exp(x - x.max()).sum())
    p = np.exp(log_p)
    at_target = np.arange(x.size) == target
    up = dict(zip(STATISTICS, upstream, strict=True))
    gradient = up["log_prob"] * (at_target - p) + up["lse"] * p
    gradient += up["mean_log_prob"] * (1 / x.size - p)
    gradient += up["log_sum_sq_probs"] * 2 * p * (p / (p**2).sum() - 1)
    return gradient - up["entropy"] * p * (np.where(p > 0, log_p, 0) + s["entropy"])


# A few repeated values, so that ties are common; whole-number weights with 0 among them.
LOGIT = st.one_of(st.floats(-50, 50), st.sampled_from([-1e4, -1.0, 0.0, 2.0, 1e4, -np.inf]))


@st.composite
def split_rows(draw):
    """A row, its target, its weights, and its columns dealt into parts in any order."""
    x = np.array(draw(st.lists(LOGIT, min_size=1, max_size=40)))
    target = draw(st.integers(0, x.size - 1))
    if np.isinf(x[target]):
        x[target] = 0.5
    weights = np.array(draw(st.lists(st.integers(0, 3), min_size=x.size, max_size=x.size))) / 4
    weights[np.isinf(x)] = 0
    columns = draw(st.permutations(range(x.size)))
    cuts = sorted(draw(st.lists(st.integers(0, x.size), max_size=6)))
    parts = [columns[a:b] for a, b in zip([0, *cuts], [*cuts, x.size], strict=True)]
    return x, target, weights, parts, draw(st.randoms(use_true_random=False))


@hypothesis.given(split_rows())
def test_any_split_in_any_order_merges_to_the_same_statistics(case):
    x, target, weights, parts, random = case
    states = [core.state_of(x, weights, np.array(part, np.int64), target) for part in parts]
    while len(states) > 1:  # a random tree of merges, empty parts included
        a = states.pop(random.randrange(len(states)))
        b = states.pop(random.randrange(len(states)))
        states.append(core.merge(a, b))
    actual = core.finalize(states[0], x[target], x.size)
    expected = oracle(x, target, weights)
    for name in STATISTICS:
        assert actual[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-11), name
    assert actual["argmax"] == expected["argmax"]
    assert actual["rank"] == expected["rank"]


@hypothesis.given(split_rows())
def test_the_empty_state_is_the_identity_to_the_bit(case):
    x, target, weights, parts, _ = case
    state = core.state_of(x, weights, np.concatenate(parts).astype(np.int64), target)
    fields = [
        "max",
        "sum_exp",
        "sum_x_exp",
        "sum_sq_exp",
        "sum_weighted",
        "sum_weights",
        "argmax",
        "rank",
    ]
    for merged in (core.merge(state, core.PartialState()), core.merge(core.PartialState(), state)):
        assert [getattr(merged, f) for f in fields] == [getattr(state, f) for f in fields]


# 1: log p = 0; 7, 67, 257: tails of every vector width; 2048: one block; 4099: blocks and a tail.
@pytest.mark.parametrize("columns", [1, 7, 67, 257, 2048, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(isa, dtype, columns):
    rng = np.random.default_rng(columns)
    # Rows one element longer than the vocabulary: every second row starts off a vector's alignment.
    buffer, values = stored(rng.normal(0, 4, (5, columns + 1)), dtype)
    logits, x = buffer[:, :columns], values[:, :columns]
    targets = rng.integers(0, columns, 5)
    targets[3] = -100
    actual = getattr(core, f"row_stats_{dtype}")(isa, logits, targets, columns)
    upstream = rng.normal(0, 1, (len(STATISTICS), 5))
    grad = np.full((5, columns), 7, logits.dtype)
    getattr(core, f"row_grad_{dtype}")(isa, logits, targets, columns, upstream, grad)
    grad = as_float64(grad, dtype)
    weights = np.full(columns, 1 / columns)
    for row in (0, 1, 2, 4):
        expected = oracle(x[row], targets[row], weights)
        for name in STATISTICS:
            tolerance = VALUE.get(dtype, 3e-6)
            assert actual[name][row] == pytest.approx(expected[name], rel=tolerance, abs=tolerance)
        assert actual["argmax"][row] == expected["argmax"]
        assert actual["rank"][row] == expected["rank"]
        expected = oracle_gradient(x[row], targets[row], upstream[:, row])
        t = GRADIENT[dtype]
        np.testing.assert_allclose(grad[row], expected, rtol=t, atol=t if t < 1e-4 else 1e-6)
    assert [actual[name][3] for name in STATISTICS] == [0] * len(STATISTICS)
    assert actual["argmax"][3] == -1
    assert not grad[3].any()


@pytest.mark.parametrize("columns", [1, 2, 40, 2048, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_ordered_by_column(isa, dtype, columns):
    """Rank 0 is argmax; of equals, each rank is taken once."""
    rng = np.random.default_rng(columns)
    for values in ([1.0], [1.0, 2.0], [-np.inf, -1.0, 0.0, 1.0]):
        x = rng.choice(values, columns)
        x[0] = values[-1]
        targets = rng.choice(columns, min(columns, 50), replace=False)
        targets[0] = columns - 1
        logits, _ = stored(np.tile(x, (len(targets), 1)), dtype)
        actual = getattr(core, f"row_stats_{dtype}")(isa, logits, targets, columns)
        places = np.empty(columns, np.int64)
        places[np.argsort(-x, kind="stable")] = np.arange(columns)
        np.testing.assert_array_equal(actual["rank"], places[targets])
        np.testing.assert_array_equal(actual["rank"] == 0, actual["argmax"] == targets)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_kernel_in_place(isa, dtype, gamma):
    rng = np.random.default_rng(1)
    logits, x = stored(rng.normal(0, 4, (4, 1031)), dtype)
    targets, smoothing, z_loss = np.array([3, 1030, -100, 0]), 0.1, 0.01
    fused = getattr(core, f"fused_{dtype}")
    stats = fused(isa, logits, targets, 1031, smoothing, z_loss, gamma)
    grad = as_float64(logits, dtype)
    for row in (0, 1, 3):
        s = oracle(x[row], targets[row], np.full(1031, 1 / 1031))
        assert stats["lse"][row] == pytest.approx(s["lse"], rel=VALUE.get(dtype, 3e-6))
        p = np.exp(s["log_prob"])
        factor, slope = (1 - p) ** gamma, -gamma * (1 - p) ** (gamma - 1) * p
        ce = (smoothing - 1) * s["log_prob"] - smoothing * s["mean_log_prob"]
        upstream = {
            "log_prob": (smoothing - 1) * factor + slope * ce,
            "mean_log_prob": -smoothing * factor,
            "lse": 2 * z_loss * s["lse"],
        }
        values = [upstream.get(name, 0) for name in STATISTICS]
        expected = oracle_gradient(x[row], targets[row], values)
        t = GRADIENT[dtype]
        np.testing.assert_allclose(grad[row], expected, rtol=t, atol=t if t < 1e-4 else 1e-7)
    assert not grad[2].any()


# 2: one other column; 67: a vector that is not whole; 4099: three blocks.
@pytest.mark.parametrize("columns", [2, 67, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(isa, dtype, columns):
    """As p goes to 1, the loss and the target's gradient keep their relative precision."""
    rng = np.random.default_rng(columns)
    p = np.array([0.5, 0.99, 0.9999, 1 - 1e-6, 1 - 1e-9])
    rows, targets = np.arange(5), rng.integers(0, columns, 5)
    x = rng.normal(0, 2, (5, columns))
    x[rows, targets] = -np.inf
    x[rows, targets] = np.log(np.exp(x).sum(1) * p / (1 - p))
    logits, x = stored(x, dtype)
    others = np.exp(x - x[rows, targets][:, None])
    others[rows, targets] = 0
    others = others.sum(1)
    loss, gradient = np.log1p(others), -others / (1 + others)

    tolerance = VALUE.get(dtype, 3e-6)
    stats = getattr(core, f"row_stats_{dtype}")(isa, logits, targets, columns)
    np.testing.assert_allclose(-stats["log_prob"], loss, rtol=tolerance)
    upstream = np.zeros((len(STATISTICS), 5))
    scale = 2.0**15 if dtype == "float16" else 1.0  # or the gradient would be subnormal
    upstream[STATISTICS.index("log_prob")] = -scale
    grad = np.empty_like(logits)
    getattr(core, f"row_grad_{dtype}")(isa, logits, targets, columns, upstream, grad)
    grad = as_float64(grad[rows, targets], dtype) / scale
    step = 6e-8 if dtype == "float16" else 0.0  # of its subnormal numbers
    np.testing.assert_allclose(grad, gradient, rtol=GRADIENT[dtype], atol=step / scale)

    stats = getattr(core, f"fused_{dtype}")(isa, logits, targets, columns, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(-stats["log_prob"], loss, rtol=tolerance)
    grad = as_float64(logits[rows, targets], dtype)
    np.testing.assert_allclose(grad, gradient, rtol=GRADIENT[dtype], atol=step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_around_it(isa, dtype):
    rng = np.random.default_rng(2)
    logits, _ = stored(rng.normal(0, 4, (6, 515)), dtype)
    targets = rng.integers(0, 515, 6)
    stats = getattr(core, f"row_stats_{dtype}")
    together = stats(isa, logits, targets, 515)
    for row in range(6):
        alone = stats(isa, logits[row : row + 1].copy(), targets[row : row + 1], 515)
        for name, value in alone.items():
            assert value[0] == together[name][row], name


def test_no_instruction_set_leaks_into_shared_code():
    """Code that the linker may share is in a namespace of its own per instruction set.

    The linker keeps one copy of an inline function, whichever file it came from: were that the copy
    compiled for AVX-512, the portable kernels would crash on an older processor.
    """
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "-C", "--defined-only", str(BUILD / "libllmloss_cpu.a")]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    member, leaks = "", []
    for line in listing.splitlines():
        if line.endswith(".o:"):
            member = line
        name = line[19:]
        isa = member.removeprefix("kernels_").split(".")[0]
        if isa in ISAS[1:] and line[17:18] in tuple("WVu") and f"::{isa}::" not in name:
            leaks.append(f"{member} {name}")
    assert "kernels_" in listing
    assert [leak for leak in leaks if "DW.ref" not in leak] == []
