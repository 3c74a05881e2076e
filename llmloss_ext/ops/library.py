"""Loads the compiled operators: `kernels` are those of csrc/ops."""

from __future__ import annotations

from pathlib import Path

import torch

from .namespace import NAMESPACE, qualified


def load() -> Path:
    """Registers the operators and returns the shared object's path."""
    folder = Path(__file__).parent.parent
    found = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not found:
        raise ImportError(
            f"llmloss_ext: the compiled operators (_C*.so) are not in {folder}. Build them with "
            "`make` in the checkout, or `pip install --no-build-isolation .`"
        )
    torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
    return found[0]


LIBRARY = load()
kernels = getattr(torch.ops, NAMESPACE)


def has_cuda() -> bool:
    """Whether the CUDA kernels are in this build."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified("cross_entropy"), "CUDA")


def fields(of: str) -> tuple[str, ...]:
    """The names that C++ gives the parts of what it passes or takes, such as ``"state"``."""
    return tuple(kernels.fields(of).split())


STATE = fields("state")
"""The rows of the state that the gradient kernel of the statistics reads again."""
MEAN_DENOMINATOR = fields("mean_denominator")
"""The numbers that a mean is divided by: MeanDenominator of csrc/core/loss.h."""
