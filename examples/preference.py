"""SimPO, KTO and APO of a small GPT, from hidden states: no logits in memory.

The model first learns to count, mostly upwards, from any number. Then it learns to prefer counting
downwards: from pairs without a reference (SimPO, with a margin over the mean log-probability of a
token), from pairs with one (APO-zero), and from sequences that come one by one, each good or bad
(KTO).

    python examples/preference.py
"""

import copy

import torch

from llmloss_ext import linear_cross_entropy, linear_log_probs
from llmloss_ext.losses import dpo_loss, kl_estimate, kto_loss, sequence_log_probs, simpo_loss
from llmloss_train.model import GPT

VOCAB, LENGTH = 64, 12


def counting(starts: torch.Tensor, by: torch.Tensor | int) -> torch.Tensor:
    """start, start + by, start + 2 by, ... modulo the vocabulary."""
    by = torch.as_tensor(by).expand_as(starts)
    return (starts.unsqueeze(1) + by.unsqueeze(1) * torch.arange(LENGTH)) % VOCAB


def log_probs(model: GPT, tokens: torch.Tensor, *, average: bool = False) -> torch.Tensor:
    """The log probability of each sequence after its first token, which is the prompt."""
    each = linear_log_probs(model.hidden(tokens), model.head.weight, tokens, shift=1)
    mask = torch.arange(LENGTH).expand_as(each) < LENGTH - 1  # the last position predicts nothing
    return sequence_log_probs(each, mask, average=average)


def simpo(model: GPT, reference: GPT) -> torch.Tensor:
    """One step's loss, from pairs alone."""
    starts = torch.randint(0, VOCAB, (32,))
    chosen, rejected = (log_probs(model, counting(starts, by), average=True) for by in (-1, 1))
    return simpo_loss(chosen, rejected, beta=2.0, gamma=1.0).loss


def apo(model: GPT, reference: GPT) -> torch.Tensor:
    """One step's loss, from pairs and a reference."""
    starts = torch.randint(0, VOCAB, (32,))
    pairs = [counting(starts, by) for by in (-1, 1)]
    policy = [log_probs(model, tokens) for tokens in pairs]
    with torch.no_grad():
        theirs = [log_probs(reference, tokens) for tokens in pairs]
    return dpo_loss(*policy, *theirs, kind="apo_zero", beta=0.1).loss


def kto(model: GPT, reference: GPT) -> torch.Tensor:
    """One step's loss, from sequences that are good or bad; most are bad."""
    starts, good = torch.randint(0, VOCAB, (64,)), torch.rand(64) < 0.3
    tokens = counting(starts, torch.where(good, -1, 1))
    with torch.no_grad():
        theirs = log_probs(reference, tokens)
        # The completions of other prompts, for the estimate of the KL.
        others = torch.cat([tokens[:, :1], tokens.roll(1, 0)[:, 1:]], 1)
        kl = kl_estimate(log_probs(model, others), log_probs(reference, others))
    return kto_loss(log_probs(model, tokens), theirs, good, kl=kl, desirable_weight=2.0).loss


@torch.no_grad()
def accuracy(model: GPT) -> float:
    """For how many prompts the model finds counting downwards more probable."""
    starts = torch.arange(VOCAB)
    down, up = (log_probs(model, counting(starts, by)) for by in (-1, 1))
    return (down > up).float().mean().item()


torch.manual_seed(0)
pretrained = GPT(VOCAB, LENGTH, dim=64, layers=2, heads=4)
optimizer = torch.optim.AdamW(pretrained.parameters(), lr=3e-3)
for _ in range(120):
    starts = torch.randint(0, VOCAB, (64,))
    tokens = counting(starts, torch.where(torch.rand(64) < 0.8, 1, -1))  # mostly upwards
    loss = linear_cross_entropy(pretrained.hidden(tokens), pretrained.head.weight, tokens, shift=1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"pretrained  preference accuracy {accuracy(pretrained):.0%}")

for objective in (simpo, apo, kto):
    model = copy.deepcopy(pretrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(60):
        loss = objective(model, pretrained)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{objective.__name__:<10}  preference accuracy {accuracy(model):.0%}")
