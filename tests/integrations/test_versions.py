from __future__ import annotations

import pytest

from llmloss_ext.integrations.versions import check_version


def test_known_versions(monkeypatch):
    found = "0.16.1"
    monkeypatch.setattr("llmloss_ext.integrations.versions.version", lambda _: found)
    check_version("package", "0.16")
    check_version("package", "0.16.1")
    for other in ("0.1", "0.17", "0.16.2"):
        with pytest.raises(RuntimeError, match="package 0.16.1 is not known to work here, only"):
            check_version("package", other)


def test_a_missing_package():
    with pytest.raises(RuntimeError, match="no-such-package is not installed; version 1 is known"):
        check_version("no-such-package", "1")
