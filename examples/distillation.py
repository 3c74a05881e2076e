"""Distils a larger GPT into a smaller one, without the logits of either in memory.

python examples/distillation.py
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmloss_ext import linear_cross_entropy, linear_kl_div
from llmloss_ext.losses import linear_selected_log_probs
from llmloss_train.model import GPT

VOCAB, LENGTH = 256, 48
text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))


def batch() -> torch.Tensor:
    """Random windows of the text."""
    starts = torch.randint(0, len(text) - LENGTH, (16,))
    return torch.stack([text[s : s + LENGTH] for s in starts.tolist()])


def train(model: GPT, loss_of: Callable[[Tensor], Tensor], steps: int, name: str) -> None:
    """Trains a model on the loss that ``loss_of`` computes for a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss = loss_of(batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"{name}  step {step:>3}  {loss.item():.4f}")


torch.manual_seed(0)
teacher = GPT(VOCAB, LENGTH, dim=96, layers=2, heads=4)
train(
    teacher,
    lambda x: linear_cross_entropy(teacher.hidden(x), teacher.head.weight, x, shift=1),
    120,
    "teacher, cross entropy ",
)
teacher.requires_grad_(False)
student = GPT(VOCAB, LENGTH, dim=48, layers=1, heads=2)
train(
    student,
    lambda x: linear_kl_div(
        student.hidden(x), student.head.weight, teacher.hidden(x), teacher.head.weight,
        temperature=2.0,
    ),
    150,
    "student, KL to teacher ",
)  # fmt: skip
with torch.no_grad():
    x = batch()
    for name, model in (("teacher", teacher), ("student", student)):
        loss = linear_cross_entropy(model.hidden(x), model.head.weight, x, shift=1)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters:,} parameters, cross entropy {loss.item():.4f}")
    likeliest = (teacher.hidden(x) @ teacher.head.weight.t()).topk(4).indices
    log_probs = linear_selected_log_probs(student.hidden(x), student.head.weight, likeliest)
    share = log_probs.exp().sum(-1).mean().item()
    print(f"the student gives {share:.0%} to the teacher's 4 likeliest tokens")
