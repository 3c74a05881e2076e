"""The cases: their model of bytes and operations, and which make no sense."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmloss_bench.cases import Case

from .runs import DENSE, PREFERENCE, TRAINING


def test_the_model_of_bytes_and_flops():
    whole = Case("cross_entropy", "forward", 10, 100, "bfloat16")
    assert (whole.bytes, whole.flops) == (2000, 4000)
    half = replace(whole, passes="forward+backward", ignored=0.5)
    assert half.bytes == 1000 + 2000  # half is read, all of the gradient is written
    assert half.flops == 7 * 500
    linear = Case("linear_cross_entropy", "forward+backward", 10, 100, "float32", features=8)
    assert linear.bytes == 2 * 4 * (10 + 100) * 8
    assert linear.flops == 3 * 2 * 10 * 100 * 8
    pairs = replace(linear, operation="preference", sequences=2)
    assert pairs.bytes == 3 * 4 * (10 + 100) * 8  # what belongs to the reference is read
    assert pairs.flops == 4 * 2 * 10 * 100 * 8
    assert pairs.label == "preference step, 2 x 5 x 8 x 100, float32"


@pytest.mark.parametrize(
    "change",
    [{"operation": "mse"}, {"option": "dropout"}, {"features": 3}, {"ignored": 2.0}, {"rows": 0}],
)
def test_a_case_that_makes_no_sense(change):
    with pytest.raises(ValueError):
        replace(DENSE, **change)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (PREFERENCE, {"sequences": 3}),
        (PREFERENCE, {"sequences": 32}),
        (PREFERENCE, {"sequences": 0}),
        (PREFERENCE, {"passes": "forward"}),
        (TRAINING, {"option": "z-loss"}),
        (TRAINING, {"features": 0}),
        (DENSE, {"sequences": 2}),
    ],
)
def test_a_step_that_makes_no_sense(case, change):
    with pytest.raises(ValueError):
        replace(case, **change)
