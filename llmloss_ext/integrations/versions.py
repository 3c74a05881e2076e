"""Refuses versions of other libraries whose code has not been read and tested against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["check_version"]


def check_version(package: str, known: str) -> None:
    """Raises a RuntimeError unless the installed version is the known one, or a later patch of it.

    Args:
        package: As package indices name it.
        known: Such as "0.16": 0.16.1 is known then, 0.17 is not.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise RuntimeError(f"{package} is not installed; version {known} is known") from None
    if found != known and not found.startswith(f"{known}."):
        raise RuntimeError(f"{package} {found} is not known to work here, only {known}")
