"""The mutants that mean the same as the source, each with the reason: `equivalent.txt`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .edits import Mutant

FILE = Path(__file__).with_name("equivalent.txt")


class Equivalent(NamedTuple):
    """A line, and a line that means the same."""

    path: str
    original: str
    mutated: str
    reason: str

    def is_of(self, mutant: Mutant) -> bool:
        """Whether the mutant is this one. A line is known by its text, wherever it stands."""
        return (mutant.path, mutant.original, mutant.mutated) == self[:3]


def read(file: Path) -> list[Equivalent]:
    """Reads the entries: four lines each, which are path, original, mutated and reason.

    Blank lines part them, and lines that begin with a # are comments.

    Raises:
        ValueError: An entry has not four lines.
    """
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# ")]
    entries = [entry.strip().splitlines() for entry in "\n".join(lines).split("\n\n")]
    entries = [entry for entry in entries if entry]
    for entry in entries:
        if len(entry) != 4:
            raise ValueError(f"{file.name}: an entry has four lines, not {len(entry)}: {entry[0]}")
    return [Equivalent(*(line.strip() for line in entry)) for entry in entries]
