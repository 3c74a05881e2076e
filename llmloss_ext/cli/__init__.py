"""The command line: `llmloss train`, `llmloss info`, `llmloss verify` and `llmloss plan`.

A command in another package, such as `llmloss_train`, needs only the names exported here.
"""

from .devices import open_device
from .errors import INTERRUPTED, UserError, first_line

__all__ = ["INTERRUPTED", "UserError", "first_line", "open_device"]
