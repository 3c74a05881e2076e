"""What a source distribution lacks of what a build reads, and what it has too much."""

from __future__ import annotations

import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

from tools.wheel_check import ROOT, sources

OF_A_BUILD = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
MADE = ("PKG-INFO", "setup.cfg", "llmloss_ext.egg-info/*")
"""By setuptools."""


def wanted() -> set[str]:
    """The files of the checkout that a source distribution has."""
    files = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    native = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    return native | sources() | set(OF_A_BUILD)


def faults(sdist: Path) -> list[str]:
    """What is wrong with a source distribution of this checkout, in a line each."""
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive if member.isfile()]
    names = {name.partition("/")[2] for name in members}
    others = {name for name in names - wanted() if not any(fnmatch(name, m) for m in MADE)}
    return [
        *(f"{name} is missing" for name in sorted(wanted() - names)),
        *(f"{name} does not belong there" for name in sorted(others)),
    ]


def report(sdist: Path) -> None:
    """Prints the file's size.

    Raises:
        SystemExit: Something is wrong with it.
    """
    found = faults(sdist)
    if found:
        sys.exit(f"{sdist.name}:\n" + "\n".join(f"  {fault}" for fault in found))
    print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.1f} MB, checked")
