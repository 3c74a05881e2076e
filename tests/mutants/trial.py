"""What a mutant's tests say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

from .edits import Mutant

Outcome = Literal["caught", "hung", "survived", "invalid"]
"""Failed a test; took too long, which is noticed too; passed them all; cannot be compiled."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class TrialError(Exception):
    """The tests cannot be run, or do not pass without a mutant."""


class Trial(ABC):
    """The tests that watch one source."""

    @abstractmethod
    def outcome(self, mutant: Mutant) -> Outcome:
        """Runs the tests over a mutant of the source."""

    @abstractmethod
    def close(self) -> None:
        """Ends what runs them."""
