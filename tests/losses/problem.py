"""The sizes that the tests of the loss family share, and a batch of texts."""

from __future__ import annotations

import torch
from torch import Tensor

B, S, V, D = 3, 7, 41, 12


def lm_batch(device: torch.device | str, vocab: int = V) -> tuple[Tensor, Tensor]:
    """Logits (B, S, vocab) and token ids (B, S), of which 0 is padding."""
    logits = torch.randn(B, S, vocab, device=device)
    ids = torch.randint(1, vocab, (B, S), device=device)
    ids[1, 4:] = 0  # padding
    return logits, ids
