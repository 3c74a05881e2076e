"""Names in other libraries that stand for functions of this one, until they are put back."""

from __future__ import annotations

from typing import Any

__all__ = ["Rebindings"]


class Rebindings:
    """What was replaced, and by what it is put back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def bind(self, module: Any, ours: Any) -> None:
        """Makes the module's name of a function or class stand for ours of the same name."""
        name = ours.__name__
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, ours)

    def undo(self) -> None:
        """Puts back what was there, the latest first."""
        while self._before:
            setattr(*self._before.pop())
