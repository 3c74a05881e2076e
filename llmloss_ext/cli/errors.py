"""The exception and the exit status that the commands share."""

from __future__ import annotations

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells (128 + SIGINT)."""


class UserError(Exception):
    """A mistake that the user can fix: printed as ``llmloss: error: <message>``, exit status 1."""
