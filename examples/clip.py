"""CLIP-style contrastive training: matches two views of the same things.

The B x B similarities of a batch are never in memory.

    python examples/clip.py
"""

import torch

from llmloss_ext.losses import ClipLoss
from llmloss_ext.metrics import accuracy

torch.manual_seed(0)
things = torch.randn(2048, 16)
image_of, text_of = torch.randn(2, 16, 64)
images = torch.tanh(things @ image_of) + 0.3 * torch.randn(2048, 64)
texts = torch.tanh(things @ text_of) + 0.3 * torch.randn(2048, 64)


def encoder() -> torch.nn.Module:
    """Maps a view to an embedding."""
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 32))


image_encoder, text_encoder, loss_of = encoder(), encoder(), ClipLoss()
parameters = [p for m in (image_encoder, text_encoder, loss_of) for p in m.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=2e-3)
for step in range(201):
    rows = torch.randperm(1792)[:256]
    loss = loss_of(image_encoder(images[rows]), text_encoder(texts[rows]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step:>3}  loss {loss.item():.3f}  scale {loss_of.log_scale.exp().item():.1f}")

with torch.no_grad():  # the last 256 things are held out
    q, k = (
        torch.nn.functional.normalize(e(x[1792:]), dim=-1)
        for e, x in ((image_encoder, images), (text_encoder, texts))
    )
    found = accuracy(q @ k.t(), torch.arange(256))
print(f"of 256 unseen pairs, {found.item():.0%} of the images find their text")
