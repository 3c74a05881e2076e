"""Packs documents of different lengths into one row, without padding, and loses nothing by it.

No token predicts the first one of the next document; where documents begin is told by position
ids, document ids or flash-attention's offsets, whichever a data loader has.

    python examples/packed_documents.py
"""

from typing import Any

import torch
import torch.nn.functional as F

from llmloss_ext import linear_cross_entropy
from llmloss_ext.losses import next_token_targets
from llmloss_ext.training import count_items

torch.manual_seed(0)
VOCAB, FEATURES = 5000, 64
lengths = [37, 5, 120, 1, 61]
documents = [torch.randint(VOCAB, (length,)) for length in lengths]
table, head = torch.randn(VOCAB, FEATURES), torch.randn(VOCAB, FEATURES) / 8

# As a reference: every document in a row of its own, padded on the left or on the right.
longest = max(lengths)
for side in ("left", "right"):
    room = [longest - length for length in lengths]
    pads = [(n, 0) if side == "left" else (0, n) for n in room]
    ids = torch.stack([F.pad(d, p) for d, p in zip(documents, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(d), p) for d, p in zip(documents, pads, strict=True)])
    padded = linear_cross_entropy(table[ids], head, ids, shift=1, attention_mask=mask)
    print(f"padded on the {side:<5}: {ids.numel():>4} tokens, loss {padded.item():.6f}")

packed = torch.cat(documents).unsqueeze(0)
positions = torch.cat([torch.arange(n) for n in lengths])
boundaries: dict[str, Any] = {
    "position_ids": positions,
    "document_ids": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
}
for name, tensor in boundaries.items():
    loss = linear_cross_entropy(table[packed], head, packed, shift=1, **{name: tensor})
    print(f"{name:<15}: {packed.numel():>4} tokens, loss {loss.item():.6f}")
    assert abs(loss.item() - padded.item()) < 1e-5

naive = linear_cross_entropy(table[packed], head, packed, shift=1)
print(f"without them   : {packed.numel():>4} tokens, loss {naive.item():.6f}")

# For gradient accumulation, count what is really predicted.
items = count_items([next_token_targets(packed, position_ids=positions)])
print(f"{items.item()} of {packed.numel()} tokens are predicted")
assert items == sum(length - 1 for length in lengths)
