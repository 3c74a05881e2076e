"""Outcomes on disk: a run continues where one was stopped, and runs again only what changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from .edits import Mutant
from .trial import Outcome


class Results:
    """The outcomes of one source's mutants."""

    def __init__(
        self,
        folder: Path,
        tree: Path,
        source: str,
        tests: Sequence[str],
        only_survivors: bool = False,
    ) -> None:
        """Reads those that are there, and drops what may be different now.

        Args:
            folder: Where they are: one file for each source.
            tree: The repository, or its copy.
            source: The source's path.
            tests: Those of its tests.
            only_survivors: Whether tests that have changed still catch what they have caught.
        """
        self._path = folder / f"{source.replace('/', '.')}.json"
        self._hashes = {"source": _hash(tree, [source]), "tests": _hash(tree, tests)}
        self._outcomes: dict[str, Outcome] = {}
        if not self._path.exists():
            return
        stored = json.loads(self._path.read_text())
        if stored["source"] == self._hashes["source"]:
            same = stored["tests"] == self._hashes["tests"]
            self._outcomes = {
                name: outcome
                for name, outcome in stored["outcomes"].items()
                if same or (only_survivors and outcome != "survived")
            }

    def get(self, mutant: Mutant) -> Outcome | None:
        """The outcome, if it is known."""
        return self._outcomes.get(_name(mutant))

    def put(self, mutant: Mutant, outcome: Outcome) -> None:
        """Stores an outcome."""
        self._outcomes[_name(mutant)] = outcome
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._hashes | {"outcomes": self._outcomes}, indent=1))
        os.replace(temporary, self._path)


def _name(mutant: Mutant) -> str:
    return f"{mutant.edit.start}-{mutant.edit.end} {mutant.edit.text}"


def _hash(root: Path, names: Sequence[str]) -> str:
    """A hash of files, and of all sources in folders."""
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()
