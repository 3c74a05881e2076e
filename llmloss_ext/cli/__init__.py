"""The command line: `llmloss train`, `llmloss info`, `llmloss verify` and `llmloss plan`.

The names here are all that a command in another package needs; `llmloss_train` is one.
"""

from .errors import INTERRUPTED, UserError

__all__ = ["INTERRUPTED", "UserError"]
