"""The one kind of error that ends a command in one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: printed as ``llmloss: error: <message>``, exit status 1."""
