"""What torch sees of the kernels: operators with their derivatives, over rows of logits."""

from . import fake  # noqa: F401  (registers itself)
from .cross_entropy import LossInputs, cross_entropy
from .derivatives import can_read, in_transform
from .library import LIBRARY, has_cuda, kernels
from .token_stats import StatsInputs, token_stats

__all__ = [
    "LIBRARY",
    "LossInputs",
    "StatsInputs",
    "can_read",
    "cross_entropy",
    "has_cuda",
    "in_transform",
    "kernels",
    "token_stats",
]
