"""Which products of 16 bits this CPU makes itself, and which are made in float32 instead."""

from __future__ import annotations

import torch


def is_upcast(dtype: torch.dtype, device: str) -> bool:
    """Whether products of ``dtype`` are made in float32, of operands converted block by block.

    So are those of 16 bits on a CPU that has none. 16 bits multiplied are exact in float32, whose
    sum is rounded once: as far from the exact product as torch's own at most, and far sooner there.

    Args:
        dtype: Of the operands.
        device: A type of device, such as ``"cpu"``.
    """
    return device == "cpu" and dtype.itemsize == 2 and not has_products_of(dtype)


def has_products_of(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16 bits faster than float32.

    It is what torch itself asks before it gives such a product to oneDNN; without, it takes a loop
    of its own, which needs five to twenty times as long as the product in float32.
    """
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(getattr(torch.ops.mkldnn, names[dtype])())
