"""The benchmark behind `llmloss bench`: this library, others and the machine's limits in one run.

It is a package of its own for the reasons of `llmloss_train`, two of whose modules it needs.

`cases` describes what is measured, and the bytes and FLOPs that it needs; `suites` groups cases.
`inputs` makes their tensors, and `contenders` the functions that compete on them. `reference`
checks every contender against float64 before `timing` and `memory` measure it. `run` works through
a suite and writes `results`, which `compare` and `report` read.
"""

import importlib.util

__all__ = ["missing_packages"]

_PACKAGES = ("jinja2", "matplotlib")


def missing_packages() -> list[str]:
    """The packages that a report needs and that are not installed, by import name.

    A run goes without: it needs torch alone.
    """
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
