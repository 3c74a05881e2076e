"""The ranks that the tests of this folder share."""

from __future__ import annotations

import pytest
from ranks import Ranks


@pytest.fixture(scope="session", params=[2, 3])
def ranks(request):
    every = Ranks(request.param)
    yield every
    every.stop()


@pytest.fixture(scope="session")
def two():
    every = Ranks(2)
    yield every
    every.stop()
