"""Distils a larger GPT into a smaller one, without the logits of either in memory.

First from the text, with labels and teacher in one walk; then from what the student says itself.

python examples/distillation.py
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmloss_ext import linear_cross_entropy, linear_distillation_loss, linear_kl_div, losses
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


def hard_and_soft(x: Tensor) -> Tensor:
    """A little of the next tokens themselves, and most of what the teacher expects."""
    labels = losses.next_token_targets(x)
    return linear_distillation_loss(
        student.hidden(x), student.head.weight, teacher.hidden(x), teacher.head.weight, labels,
        weight_hard_loss=0.2, weight_soft_loss=0.8, temperature=2.0,
    ).loss  # fmt: skip


train(student, hard_and_soft, 120, "student, labels + teacher")
with torch.no_grad():
    x = batch()
    for name, model in (("teacher", teacher), ("student", student)):
        loss = linear_cross_entropy(model.hidden(x), model.head.weight, x, shift=1)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters:,} parameters, cross entropy {loss.item():.4f}")


@torch.no_grad()
def sample(prompt: Tensor, length: int) -> Tensor:
    """The student goes on by itself."""
    x = prompt
    for _ in range(length):
        logits = student.hidden(x)[:, -1] @ student.head.weight.t()
        x = torch.cat([x, torch.multinomial(torch.softmax(logits, -1), 1)], 1)
    return x


# The student's own text, where no label says what is right: the teacher scores each token.
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
for step in range(12):
    x = sample(batch()[:, :8], 24)
    drawn = torch.arange(x.shape[1]).expand_as(x) >= 8
    tokens = x[:, 1:].unsqueeze(-1)  # one a position; K of them where a teacher has stored K
    ours, theirs = (
        losses.linear_selected_log_probs(m.hidden(x)[:, :-1], m.head.weight, tokens).squeeze(-1)
        for m in (student, teacher)
    )
    on_policy = losses.sampled_reverse_kl(ours, theirs, drawn[:, 1:])
    on_policy.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 11):
        with torch.no_grad():
            both = (student.hidden(x), student.head.weight, teacher.hidden(x), teacher.head.weight)
            exact = linear_kl_div(*both, direction="reverse")
        kl = on_policy.reverse_kl.item()
        print(f"on-policy step {step:>2}  KL of its samples {kl:.4f}, of all tokens {exact:.4f}")
