"""The sizes that the tests of the loss family share, and a batch of texts."""

from __future__ import annotations

import torch

B, S, V, D = 3, 7, 41, 12


def lm_batch(device, vocab=V):
    logits = torch.randn(B, S, vocab, device=device)
    ids = torch.randint(1, vocab, (B, S), device=device)
    ids[1, 4:] = 0  # padding
    return logits, ids
