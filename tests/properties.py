"""Hypothesis, where it is installed, and how often a property is tried."""

from __future__ import annotations

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

__all__ = ["SETTINGS", "hypothesis", "st"]

SETTINGS = hypothesis.settings(max_examples=25, deadline=None)
