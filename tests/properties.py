"""Hypothesis, where it is installed: how often a property is tried, with no regard to the time."""

from __future__ import annotations

import os

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

__all__ = ["SETTINGS", "hypothesis", "st"]

# On a busy machine any example, and the making of examples, may take long. A change is judged by
# the same examples as the one before; `make fuzz` draws others.
hypothesis.settings.register_profile(
    "llmloss",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="LLMLOSS_FUZZ" not in os.environ,
)
hypothesis.settings.load_profile("llmloss")
SETTINGS = hypothesis.settings(max_examples=25)
