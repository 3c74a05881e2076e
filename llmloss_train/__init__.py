"""The training demo behind `llmloss train`: text, tokens, model, losses, loop and report.

It is a package of its own so that the library stays free of its dependencies, and so that the demo
stays an example of what a user can build: it uses llmloss_ext's public API and nothing else.
"""

import importlib.util

__all__ = ["missing_packages"]

_PACKAGES = ("matplotlib", "mistral_common", "numpy", "rich")


def missing_packages() -> list[str]:
    """The packages of the extra ``train`` that are not installed, by import name."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
