"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
FORMATS = ("auto", "text", "jsonl")
LARGEST_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class EvalConfig:
    """What decides the result, beside the model and the input.

    Attributes:
        window: The tokens that the model sees at once.
        stride: How many of them are new.
        top_k: For which k the top-k accuracy is counted.
        bins: The bins of the reliability diagram.
        alpha: The exponent of the length that divides a choice's score.
        batch_size: Windows or choices at a time.
        device: "cpu" or "cuda".
        dtype: Of the model's weights; "auto": as they are stored.
    """

    window: int
    stride: int
    top_k: tuple[int, ...]
    bins: int
    alpha: float
    batch_size: int
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self) | {"top_k": list(self.top_k)}
