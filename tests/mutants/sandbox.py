"""A copy of the repository, in which one file at a time is mutated: never the checkout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from .edits import Mutant

_COPIED = (
    "llmloss_bench", "llmloss_eval", "llmloss_ext", "llmloss_train", "bench", "csrc", "docs",
    "examples", "tests", "README.md", "pyproject.toml",
)  # fmt: skip
_IGNORED = shutil.ignore_patterns("__pycache__", ".hypothesis", "results")


class Sandbox:
    """The copy.

    Attributes:
        root: Its folder.
    """

    def __init__(self, checkout: Path, root: Path) -> None:
        """Copies what the tests need, the compiled library included, into the folder ``root``."""
        self.root = root
        # Python knows a changed source by its time in whole seconds: each version gets its own.
        self._times = count(1_000_000_000)
        for name in _COPIED:
            path = checkout / name
            if path.is_dir():
                shutil.copytree(path, root / name, ignore=_IGNORED)
            elif path.exists():
                shutil.copy(path, root / name)

    @contextmanager
    def holding(self, mutant: Mutant) -> Iterator[None]:
        """Holds the mutant instead of its source."""
        path = self.root / mutant.path
        source = path.read_text()
        self._write(path, mutant.apply(source))
        try:
            yield
        finally:
            self._write(path, source)

    def _write(self, path: Path, source: str) -> None:
        path.write_text(source)
        time = next(self._times)
        os.utime(path, (time, time))
