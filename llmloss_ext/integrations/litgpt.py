"""LitGPT: the loss of its training scripts and of its ``LLM``, by this library.

``LLM`` takes a loss, and a script is given one by its name::

    logits, loss = llm(input_ids, target_ids=input_ids, loss_fn=chunked_cross_entropy)
    litgpt.finetune.lora.chunked_cross_entropy = chunked_cross_entropy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy

__all__ = ["chunked_cross_entropy"]


def chunked_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    chunk_size: int = 128,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """``litgpt.utils.chunked_cross_entropy``: a mean over the tokens, of logits in parts or whole.

    Args:
        logits: (B, T, V), read in place also where it is a slice such as ``logits[:, :-1]``; or
            its parts along T, as LitGPT's models return them with ``lm_head_chunk_size``.
        targets: (B, T).
        chunk_size: 0: without tokens the loss is nan, as torch's; else it is 0. (What LitGPT cuts
            by it, the kernels take as a whole: nothing larger than their gradient is made.)
        ignore_index: Targets with this value are ignored.
        options: Of `llmloss_ext.cross_entropy`: ``z_loss``, ``inplace`` and more.

    Returns:
        0-d; float32 for 16-bit logits.

    Raises:
        ValueError: The parts are not as long as the targets; and as `llmloss_ext.cross_entropy`.
    """
    parts = [logits] if isinstance(logits, Tensor) else list(logits)
    lengths = [part.shape[-2] for part in parts]
    if sum(lengths) != targets.shape[-1]:
        raise ValueError(
            f"logits of {sum(lengths)} positions do not fit targets of shape {tuple(targets.shape)}"
        )
    items: Tensor = (targets != ignore_index).sum()
    losses = [
        cross_entropy(
            part, target, ignore_index=ignore_index, num_items=items, class_dim=-1, **options
        )
        for part, target in zip(parts, torch.split(targets, lengths, dim=-1), strict=True)
    ]
    total = torch.stack(losses).sum()
    return total if chunk_size else torch.where(items > 0, total, torch.nan)
