"""Loads the compiled operators."""

from __future__ import annotations

from pathlib import Path

import torch


def load() -> Path:
    """Registers the operators ``torch.ops.llmloss.*`` and returns the shared object's path."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not found:
        raise ImportError(
            f"llmloss_ext: the compiled operators (_C*.so) are not in {folder}. Build them with "
            "`make` in the checkout, or `pip install --no-build-isolation .`"
        )
    torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
    return found[0]


LIBRARY = load()
