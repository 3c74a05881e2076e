"""Exact gradient accumulation: micro-batches of unequal length give the large batch's gradient.

python examples/gradient_accumulation.py
"""

import torch

from llmloss_ext import cross_entropy
from llmloss_ext.training import accumulate_gradients

torch.manual_seed(0)
model = torch.nn.Linear(32, 1000).double()
inputs, targets = torch.randn(64, 32).double(), torch.randint(0, 1000, (64,))
targets[:29] = -100  # padding: the micro-batches have 0, 3, 16 and 16 tokens


def gradient() -> torch.Tensor:
    """Returns the gradient of the weight as a vector, and clears it."""
    assert model.weight.grad is not None
    result = model.weight.grad.flatten().clone()
    model.zero_grad()
    return result


cross_entropy(model(inputs), targets).backward()
large = gradient()

micro = list(zip(inputs.split(16), targets.split(16), strict=True))
loss = accumulate_gradients(
    lambda batch, items: cross_entropy(model(batch[0]), batch[1], num_items=items),
    [((x, y), y) for x, y in micro],
)
exact = gradient()

for x, y in micro:  # the usual way; skip a mean over no tokens, which is nan
    if (y != -100).any():
        (cross_entropy(model(x), y) / len(micro)).backward()
usual = gradient()

print(f"mean loss over the step                {loss.item():.4f}")
print(f"error with num_items                   {(exact - large).norm() / large.norm():.1e}")
print(
    f"error of each mean divided by {len(micro)}        {(usual - large).norm() / large.norm():.1e}"
)
