"""A case: what is computed, at which size, and the work that no implementation can do without."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

OPERATIONS = ("cross_entropy", "linear_cross_entropy")
PASSES = ("forward", "forward+backward")

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
    "softcap": {"softcap": 30.0},
    "entropy": {"entropy": 0.01},
    "entropy and rank": {"entropy": 0.01, "rank": 1.0},
}
"""Name and settings. ``entropy``: the loss is cross entropy less that much of the entropy.
``rank``: argmax and the target's rank as well, from the same pass."""

# Of a logit: x - m, exp, the sum, the maximum; then x - m, exp and the product.
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 3


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        operation: One of `OPERATIONS`.
        passes: One of `PASSES`.
        rows: Tokens, N.
        columns: Vocabulary, V.
        dtype: Of the logits or the hidden states, by torch's name.
        features: D of ``linear_cross_entropy``, else 0.
        option: A key of `OPTIONS`.
        ignored: Share of the tokens that are ignored.
        device: "cpu" or "cuda".
        threads: Of the CPU; 0 for all.
        warm: Whether the inputs may lie in the caches: for calls whose cost is their overhead.
        figure: What the case is for: "peers", "plain" (what options are compared with), "options",
            "ignored", "small", "V", "N", "D" or "threads" (curves).
    """

    operation: str
    passes: str
    rows: int
    columns: int
    dtype: str
    features: int = 0
    option: str = "plain"
    ignored: float = 0.0
    device: str = "cpu"
    threads: int = 0
    warm: bool = False
    figure: str = "peers"

    def __post_init__(self) -> None:
        """Raises ValueError where the description makes no sense."""
        if self.operation not in OPERATIONS or self.passes not in PASSES:
            raise ValueError(f"unknown operation or passes: {self.operation}, {self.passes}")
        if self.option not in OPTIONS or (self.features > 0) != self.is_linear:
            raise ValueError(f"unknown option, or features that do not fit: {self}")
        if not 0.0 <= self.ignored <= 1.0 or self.rows < 1 or self.columns < 2:
            raise ValueError(f"sizes out of range: {self}")

    @property
    def is_linear(self) -> bool:
        """From hidden states."""
        return self.operation == "linear_cross_entropy"

    @property
    def has_backward(self) -> bool:
        """Forward and backward."""
        return self.passes == "forward+backward"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def settings(self) -> dict[str, float]:
        """Of the option."""
        return OPTIONS[self.option]

    @property
    def label(self) -> str:
        """The case in one line."""
        size = f"{self.rows} x {self.columns}"
        if self.is_linear:
            size = f"{self.rows} x {self.features} x {self.columns}"
        parts = ["linear" if self.is_linear else "", self.passes, size, self.dtype]
        if self.option != "plain":
            parts.append(self.option)
        if self.ignored:
            parts.append(f"{self.ignored:.0%} ignored")
        if self.threads:
            parts.append(f"{self.threads} threads" if self.threads > 1 else "1 thread")
        if self.warm:
            parts.append("warm")
        return ", ".join(filter(None, parts))

    @property
    def valid_rows(self) -> int:
        """Tokens that are not ignored."""
        return self.rows - round(self.rows * self.ignored)

    @property
    def logits_bytes(self) -> int:
        """Of N x V logits."""
        return self.rows * self.columns * self.torch_dtype.itemsize

    @property
    def bytes(self) -> int:
        """The fewest bytes that can be moved.

        From logits: those of the valid tokens are read once; with backward the gradient, zeros of
        ignored tokens too, is written once. From hidden states: hidden states, weight and their
        gradients, each once.
        """
        size = self.torch_dtype.itemsize
        if self.is_linear:
            operands = (self.rows + self.columns) * self.features * size
            return operands * (2 if self.has_backward else 1)
        read = self.valid_rows * self.columns * size
        return read + (self.logits_bytes if self.has_backward else 0)

    @property
    def flops(self) -> int:
        """Floating-point operations: of the matrix products, or an estimate a logit."""
        if self.is_linear:
            products = 3 if self.has_backward else 1
            return 2 * products * self.valid_rows * self.columns * self.features
        per_logit = _FORWARD_FLOPS + (_BACKWARD_FLOPS if self.has_backward else 0)
        return per_logit * self.valid_rows * self.columns

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, so that files stay short and old ones readable."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _DEFAULTS or value != _DEFAULTS[name]
        }


_DEFAULTS = {
    field.name: field.default
    for field in Case.__dataclass_fields__.values()
    if isinstance(field.default, (str, int, float, bool))
}
