"""The command line: `llmloss train`, `eval`, `info`, `verify` and `plan`.

Commands in other packages, `llmloss_train` and `llmloss_eval`, need only the names exported here.
"""

from .devices import open_device
from .errors import INTERRUPTED, UserError, first_line

__all__ = ["INTERRUPTED", "UserError", "first_line", "open_device"]
