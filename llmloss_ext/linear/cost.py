"""What a linear loss should take on a GPU: a prediction from two constants of the machine.

The time of the matrix products, and what comes on top of it: the loss kernel's passes over the
logits, the sums of the weight's gradient, which every chunk reads and writes, their rounding, and
launches. The constants below are fitted to one NVIDIA H200 (torch 2.11, bfloat16, 8192 tokens of
4096 features, 128,256 classes); tests hold the model to what was measured there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..chips import CHIPS, H100, Chip
from .planning import Plan, plan

__all__ = ["Prediction", "chip_named", "frontier", "predict"]


_PRODUCTS_SHARE = 0.91
"""Of `Chip.products`, in a loss's products of many tokens."""
_SHORT_TOKENS = 32
"""A product of n tokens takes as long as one of so many more at full speed."""
_SHOWN = {2: 0.3, 4: 0.8, 8: 0.8}
"""What a product cannot hide of its weight gradient's traffic, by the bytes of an element."""
_LOSS_SHARE = 0.75
"""Of `Chip.copy_bandwidth`, in the loss kernel: 1.3 ms for 8192 x 128,256 bfloat16, fused."""
_LAUNCHES = 8
"""Of a chunk."""


@dataclass(frozen=True)
class Prediction:
    """Of a whole call, forward and backward.

    Attributes:
        chip: Where.
        seconds: What it takes.
        products_seconds: What its matrix products take, each alone, of all tokens at once.
    """

    chip: Chip
    seconds: float
    products_seconds: float

    @property
    def ratio(self) -> float:
        """Of the two: 1 is a loss that costs nothing but its products."""
        return self.seconds / self.products_seconds


def chip_named(name: str | None = None) -> Chip:
    """One of `CHIPS`; without a name this machine's, or an H100 where it is none of them.

    Raises:
        ValueError: No such chip.
    """
    if name is not None:
        if name.upper() not in CHIPS:
            raise ValueError(f"gpu must be one of {', '.join(CHIPS).lower()}, got {name}")
        return CHIPS[name.upper()]
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((chip for key, chip in CHIPS.items() if key in here), H100)


def predict(planned: Plan, chip: Chip | str | None = None) -> Prediction:
    """What a plan for CUDA should take, at one clock: a GPU that grows hot slows all parts alike.

    Args:
        planned: Of 16-bit products.
        chip: Where; as `chip_named` takes it.

    Raises:
        ValueError: No such GPU, or products of more bits, whose speed the model does not know.
    """
    if planned.dtype.itemsize != 2:
        raise ValueError(f"the model knows products of 16 bits, not of {planned.dtype}")
    if not isinstance(chip, Chip):
        chip = chip_named(chip)
    with_input, with_weight = planned.needs_grad
    seconds = _products(planned, chip)
    if planned.sum_bytes > _weight_bytes(planned):  # rounded
        seconds += (planned.sum_bytes + _weight_bytes(planned)) / chip.copy_bandwidth
    # The logits are read, and their gradient written; before that once more, if they are made anew.
    is_forward = not (with_input or with_weight)
    passes = 1 if is_forward else planned.products - with_input - with_weight + 1
    elements = planned.tokens * planned.vocab_size
    logits = elements * planned.logits_dtype.itemsize
    seconds += passes * logits / (chip.copy_bandwidth * _LOSS_SHARE)
    if planned.logits_dtype != planned.dtype and not is_forward:
        # Rounded: read once, and written twice, first where a cache holds it.
        seconds += (logits + elements * planned.dtype.itemsize) / chip.copy_bandwidth
    seconds += planned.chunks * _LAUNCHES * chip.launch_seconds
    whole = replace(planned, chunk_tokens=max(planned.tokens, 1), chunks=1, sum_bytes=0)
    return Prediction(chip, seconds, _products(whole, chip))


def _weight_bytes(planned: Plan) -> int:
    """Of the weight's gradient."""
    with_input, _ = planned.needs_grad
    own = with_input * planned.tokens * planned.features * planned.dtype.itemsize
    return planned.gradient_bytes - own


def _products(planned: Plan, chip: Chip) -> float:
    """Seconds of all products."""
    _, with_weight = planned.needs_grad
    one = planned.flops / max(planned.products, 1) / (chip.products * _PRODUCTS_SHARE)
    short = (planned.products - with_weight) * _SHORT_TOKENS / planned.chunk_tokens
    seconds = one * (planned.products + short)
    if with_weight:
        # The first chunk writes, every other reads and writes.
        written, times = _weight_bytes(planned), 1
        if planned.sum_bytes:
            written, times = planned.sum_bytes, 2 * planned.chunks - 1
        shown = _SHOWN[written // (planned.vocab_size * planned.features)]
        seconds += shown * times * written / chip.copy_bandwidth
    return seconds


def frontier(
    tokens: int, features: int, vocab_size: int, dtype: torch.dtype, **options: Any
) -> Iterator[Plan]:
    """Plans for CUDA from 1,024 tokens a chunk to all of them. options: others of `plan`."""
    sizes = [1024 << i for i in range(6) if 1024 << i < tokens]
    for chunk in (*sizes, max(tokens, 1)):
        yield plan(tokens, features, vocab_size, dtype, "cuda", chunk_tokens=chunk, **options)
