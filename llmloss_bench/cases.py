"""A case: an operation at a size, and the least work that any implementation has to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

OPERATIONS = {
    "cross_entropy": "",
    "linear_cross_entropy": "linear",
    "preference": "preference step",
    "training_step": "training step",
}
"""What a case measures, and how its label begins. ``preference``: DPO of hidden states, with those
of a reference model. ``training_step``: a small Llama of transformers, from tokens to gradients."""
_STEPS = ("preference", "training_step")
"""Those whose tokens are sequences, and which are always forward and backward."""
PASSES = ("forward", "forward+backward")

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
    "softcap": {"softcap": 30.0},
    "entropy": {"entropy": 0.01},
    "entropy and rank": {"entropy": 0.01, "rank": 1.0},
    "float32 logits": {"float32_logits": 1.0},
}
"""Settings by name. ``entropy``: the loss is cross entropy minus this factor times the entropy.
``rank``: the same pass also gives argmax and the target's rank.
``float32_logits``: products of 16 bits keep their logits in float32."""
FROM_HIDDEN = ("float32 logits",)
"""Those of a loss from hidden states alone."""

# Per logit. Forward: x - m, exp, the sum and the maximum. Backward: x - m, exp and the product.
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 3


class UnsupportedError(Exception):
    """A contender lacks the operation or the option, or a package; reported as unsupported."""


@dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes:
        operation: A key of `OPERATIONS`.
        passes: One of `PASSES`.
        rows: The number of tokens, N.
        columns: The vocabulary size, V.
        dtype: The dtype of the logits or the hidden states, by torch's name.
        features: D, but for ``cross_entropy``.
        option: A key of `OPTIONS`.
        ignored: The fraction of tokens that are ignored.
        device: "cpu" or "cuda".
        threads: The number of CPU threads; 0 for all.
        warm: Whether the inputs may be in the caches, to measure the overhead of small calls.
        figure: The figure that the case belongs to: "peers", "plain" (the baseline of options),
            "options", "ignored", "small", "steps", or a curve over "V", "N", "D" or "threads".
        sequences: Those that the tokens of a step are, all of one length; else 0. In a preference
            step the first half are chosen, and the second half rejected.
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
    sequences: int = 0

    def __post_init__(self) -> None:
        """Raises a ValueError if the attributes are invalid."""
        if self.operation not in OPERATIONS or self.passes not in PASSES:
            raise ValueError(f"unknown operation or passes: {self.operation}, {self.passes}")
        if self.option not in OPTIONS or (self.features > 0) != self.is_linear:
            raise ValueError(f"unknown option, or features that do not fit: {self}")
        if self.option in FROM_HIDDEN and not self.is_linear:
            raise ValueError(f"{self.option} needs hidden states: {self}")
        if (self.sequences > 0) != self.is_step or (self.is_step and not self.has_backward):
            raise ValueError(f"sequences, or a forward alone, that do not fit: {self}")
        if self.is_step and self.option != "plain":
            raise ValueError(f"a step has no {self.option}: {self}")
        if self.is_step and self.rows % self.sequences:
            raise ValueError(f"tokens that are no such sequences: {self}")
        if self.operation == "preference" and self.sequences % 2:
            raise ValueError(f"chosen sequences without as many rejected: {self}")
        if not 0.0 <= self.ignored <= 1.0 or self.rows < 1 or self.columns < 2:
            raise ValueError(f"sizes out of range: {self}")

    @property
    def is_linear(self) -> bool:
        """Whether the projection is part of the case."""
        return self.operation != "cross_entropy"

    @property
    def is_step(self) -> bool:
        """Whether the tokens are sequences."""
        return self.operation in _STEPS

    @property
    def has_backward(self) -> bool:
        """Whether the case includes backward."""
        return self.passes == "forward+backward"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def settings(self) -> dict[str, float]:
        """The settings of the option."""
        return OPTIONS[self.option]

    @property
    def label(self) -> str:
        """Describes the case in one line."""
        tokens = f"{self.rows}"
        if self.is_step:
            tokens = f"{self.sequences} x {self.rows // self.sequences}"
        features = f"{self.features} x " if self.is_linear else ""
        size = f"{tokens} x {features}{self.columns}"
        passes = "" if self.is_step else self.passes
        parts = [OPERATIONS[self.operation], passes, size, self.dtype]
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
        """The number of tokens that are not ignored."""
        return self.rows - round(self.rows * self.ignored)

    @property
    def logits_bytes(self) -> int:
        """The size of N x V logits."""
        return self.rows * self.columns * self.torch_dtype.itemsize

    @property
    def bytes(self) -> int:
        """The least memory traffic in bytes.

        From logits: the valid rows are read once, and with backward the whole gradient, with its
        zeros, is written once. From hidden states: the hidden states, the weight and their
        gradients are moved once each, and what the reference of a preference step has is read.
        """
        size = self.torch_dtype.itemsize
        if self.is_linear:
            operands = (self.rows + self.columns) * self.features * size
            return operands * (self.has_backward + 1 + (self.operation == "preference"))
        read = self.valid_rows * self.columns * size
        return read + (self.logits_bytes if self.has_backward else 0)

    @property
    def flops(self) -> int:
        """Floating-point operations: of the projection's products, or an estimate per logit."""
        if self.is_linear:
            products = 3 if self.has_backward else 1
            products += self.operation == "preference"
            return 2 * products * self.valid_rows * self.columns * self.features
        per_logit = _FORWARD_FLOPS + (_BACKWARD_FLOPS if self.has_backward else 0)
        return per_logit * self.valid_rows * self.columns

    def to_json(self) -> dict[str, Any]:
        """The attributes that differ from the defaults: short, and old files stay readable."""
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
