"""Direct preference optimisation of a small GPT, from hidden states: no logits in memory.

The model first learns to count, mostly upwards, from any number. Then it learns from pairs of
continuations to prefer counting downwards.

    python examples/dpo.py
"""

import copy

import torch

from llmloss_ext import linear_cross_entropy, linear_log_probs
from llmloss_ext.losses import dpo_loss, sequence_log_probs
from llmloss_train.model import GPT

VOCAB, LENGTH = 64, 12


def counting(starts: torch.Tensor, by: int) -> torch.Tensor:
    """start, start + by, start + 2 by, ... modulo the vocabulary."""
    return (starts.unsqueeze(1) + by * torch.arange(LENGTH)) % VOCAB


def log_probs(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The log probability of each sequence after its first token, which is the prompt."""
    each = linear_log_probs(model.hidden(tokens), model.head.weight, tokens, shift=1)
    return sequence_log_probs(each)


torch.manual_seed(0)
model = GPT(VOCAB, LENGTH, dim=64, layers=2, heads=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    starts = torch.randint(0, VOCAB, (64,))
    by = torch.where(torch.rand(64) < 0.8, 1, -1)  # mostly upwards
    tokens = (starts.unsqueeze(1) + by.unsqueeze(1) * torch.arange(LENGTH)) % VOCAB
    loss = linear_cross_entropy(model.hidden(tokens), model.head.weight, tokens, shift=1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"pretrained     loss {loss.item():.3f}")

reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for step in range(61):
    starts = torch.randint(0, VOCAB, (32,))
    chosen, rejected = counting(starts, -1), counting(starts, 1)
    result = dpo_loss(
        log_probs(model, chosen),
        log_probs(model, rejected),
        log_probs(reference, chosen),
        log_probs(reference, rejected),
        beta=0.1,
    )
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        margin = (result.chosen_rewards - result.rejected_rewards).mean()
        print(f"step {step:>3}  loss {result.loss.item():.3f}  reward margin {margin.item():.2f}")

with torch.no_grad():
    starts = torch.arange(VOCAB)
    prefers = log_probs(model, counting(starts, -1)) > log_probs(model, counting(starts, 1))
print(f"prefers downwards for {prefers.float().mean():.0%} of the prompts")
