"""Evaluation behind `llmloss eval`: a model and a text in, perplexity and its kin out.

It is a package of its own for the reasons of `llmloss_train`, whose checkpoints it evaluates, too.
"""

import importlib.util

__all__ = ["missing_packages"]

_PACKAGES = ("rich",)


def missing_packages() -> list[str]:
    """The packages that each evaluation needs and that are not installed, by import name."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
