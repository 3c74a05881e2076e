"""The command line: `llmloss train`, `eval`, `bench`, `info`, `verify` and `plan`.

Commands in other packages, `llmloss_train`, `llmloss_eval` and `llmloss_bench`, need only the names
exported here.
"""

from .devices import open_device
from .errors import INTERRUPTED, UserError, first_line
from .info import instruction_set

__all__ = ["INTERRUPTED", "UserError", "first_line", "instruction_set", "open_device"]
