"""The command line: `llmloss train`, `llmloss info`, `llmloss verify` and `llmloss plan`.

A command in another package, such as `llmloss_train`, needs only the names exported here.
"""

from .errors import INTERRUPTED, UserError

__all__ = ["INTERRUPTED", "UserError"]
