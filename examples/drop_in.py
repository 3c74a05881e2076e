"""A drop-in replacement in an existing training loop: two lines change.

python examples/drop_in.py
"""

import torch

# Before: from torch.nn.functional import cross_entropy
from llmloss_ext import cross_entropy
from llmloss_train.model import GPT

torch.manual_seed(0)
text = torch.tensor(list((__doc__ or "").encode() * 20))
model = GPT(vocab_size=256, seq_len=64, dim=64, layers=2, heads=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(60):
    starts = torch.randint(0, len(text) - 65, (8,))
    tokens = torch.stack([text[s : s + 65] for s in starts.tolist()])
    logits = model.head(model.hidden(tokens[:, :-1]))
    # Before: cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss = cross_entropy(logits, tokens[:, 1:], inplace=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == 59:
        print(f"step {step:>3}  loss {loss.item():.3f}")
