"""What the mutants of both languages have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SWAPPED = {
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*",
    "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "&&": "||", "||": "&&", "and": "or", "or": "and",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
    "0": "1", "1": "0", "min": "max", "max": "min",
}  # fmt: skip
"""Each operator, constant and function that is replaced, and by what."""


class Edit(NamedTuple):
    """The characters [start, end) of a source, and what takes their place."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, order=True)
class Mutant:
    """One edit of one file.

    Attributes:
        path: The file, from the repository's root.
        line: Where the edit begins, from 1.
        edit: The edit.
        original: The edited lines, joined and stripped.
        mutated: The same after the edit.
    """

    path: str
    line: int
    edit: Edit
    original: str
    mutated: str

    def apply(self, source: str) -> str:
        """The mutated source."""
        return source[: self.edit.start] + self.edit.text + source[self.edit.end :]


def mutant(path: str, source: str, edit: Edit) -> Mutant:
    """Describes an edit of the source of ``path``."""
    begin = source.rfind("\n", 0, edit.start) + 1
    end = source.find("\n", edit.end)
    after = source[edit.end : len(source) if end < 0 else end]
    before = source[begin : edit.start]
    original = before + source[edit.start : edit.end] + after
    mutated = before + edit.text + after
    line = source.count("\n", 0, edit.start) + 1
    return Mutant(path, line, edit, " ".join(original.split()), " ".join(mutated.split()))
