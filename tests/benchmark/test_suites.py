"""The suites hold what they should."""

from __future__ import annotations

import pytest

from llmloss_bench.cases import FROM_HIDDEN, OPTIONS, Case
from llmloss_bench.suites import SUITES, suite


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_each_case_once(name):
    cases = suite(name, has_gpu=name == "gpu")
    assert len(set(cases)) == len(cases) > (5 if name == "smoke" else 10)
    assert {case.device for case in cases} == {"cuda" if name == "gpu" else "cpu"}
    # The committed results of the CPU, which a test holds to its suite, are older than these.
    unmeasured = set(FROM_HIDDEN) if name == "cpu" else set()
    options = set(OPTIONS) - unmeasured
    if name in ("smoke", "steps"):
        options = {"plain", *(FROM_HIDDEN if name == "steps" else [])}
    assert {case.option for case in cases} == options
    has_steps = {case.operation for case in cases if case.is_step}
    assert has_steps == (set() if name in ("smoke", "cpu") else {"preference", "training_step"})
    for case in cases:
        assert Case(**case.to_json()) == case


def test_the_gpu_suite_needs_a_gpu():
    with pytest.raises(ValueError, match="CUDA device"):
        suite("gpu", has_gpu=False)
