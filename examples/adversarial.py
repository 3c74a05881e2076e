"""A generator of letters against a discriminator, on real text, in two ways.

Letters are discrete, so the discriminator's gradient does not reach what they were sampled from. By
Gumbel-softmax it does: the generator feeds samples that have a gradient to itself and to the
discriminator. By policy gradient, the discriminator's scores are the rewards of what was sampled.
The distance between the pairs of letters of generated and of real text falls in both ways.

    python examples/adversarial.py [FILE]
"""

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from llmloss_ext import linear_log_probs
from llmloss_ext.losses import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    linear_gumbel_embeddings,
    policy_gradient_loss,
)

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
LENGTH, BATCH, DIM, STEPS = 10, 64, 32, 150
README = Path(__file__).parents[1] / "README.md"
path = Path(sys.argv[1]) if len(sys.argv) > 1 else README
letters = re.sub("[^a-z]+", " ", path.read_text(errors="ignore").lower())
text = torch.tensor([ALPHABET.index(letter) for letter in letters])
if len(text) < 1000:
    sys.exit(f"{path} is too short: {len(text)} letters, at least 1000 are needed")


def real_text(count: int) -> Tensor:
    """Windows of the text, (count, LENGTH)."""
    starts = torch.randint(0, len(text) - LENGTH, (count, 1))
    return text[starts + torch.arange(LENGTH)]


def pairs(ids: Tensor) -> Tensor:
    """How often each letter follows each other one: probabilities, (27 x 27)."""
    numbers = ids[:, :-1] * len(ALPHABET) + ids[:, 1:]
    return numbers.flatten().bincount(minlength=len(ALPHABET) ** 2) / numbers.numel()


class Generator(nn.Module):
    """Writes letter by letter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(len(ALPHABET), DIM))
        self.first = nn.Parameter(torch.zeros(DIM))
        self.cell = nn.GRUCell(DIM, 2 * DIM)
        self.head = nn.Linear(2 * DIM, len(ALPHABET), bias=False)

    def sample(self, count: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Letters (count, LENGTH), and what a reader with this table sees of them."""
        both = torch.cat([self.table, table], 1)
        read, state = self.first.expand(count, DIM), None
        ids, seen = [], []
        for _ in range(LENGTH):
            state = self.cell(read, state)
            sampled = linear_gumbel_embeddings(state, self.head.weight, both)
            read, of_reader = sampled.embeddings.split([DIM, table.shape[1]], 1)
            ids.append(sampled.ids)
            seen.append(of_reader)
        return torch.stack(ids, 1), torch.stack(seen, 1)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Of letters (B, LENGTH) that were sampled: their log-probabilities."""
        before = torch.cat([self.first.expand(len(ids), 1, DIM), self.table[ids[:, :-1]]], 1)
        states: list[Tensor] = []
        for read in before.unbind(1):
            states.append(self.cell(read, states[-1] if states else None))
        return linear_log_probs(torch.stack(states, 1), self.head.weight, ids)


class Discriminator(nn.Module):
    """Scores each letter after the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(len(ALPHABET), DIM))
        self.convolution = nn.Conv1d(DIM, 4 * DIM, 3)
        self.score = nn.Linear(4 * DIM, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, LENGTH, DIM) to (B, LENGTH)."""
        padded = nn.functional.pad(embeddings.transpose(1, 2), (2, 0))
        hidden = nn.functional.leaky_relu(self.convolution(padded).transpose(1, 2), 0.2)
        return self.score(hidden).squeeze(-1)


def distance(generator: Generator, table: Tensor) -> float:
    """Between generated and real pairs of letters: 0 for the same, 1 for none in common."""
    with torch.no_grad():
        generated = pairs(generator.sample(1000, table)[0])
    return float((generated - pairs(text.unsqueeze(0))).abs().sum() / 2)


def train(way: str) -> None:
    """Trains a pair, and prints how the distance falls."""
    torch.manual_seed(0)
    generator, discriminator = Generator(), Discriminator()
    of_generator = torch.optim.Adam(generator.parameters(), lr=3e-3, betas=(0.5, 0.99))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.99))
    first = distance(generator, discriminator.table)
    for _ in range(STEPS):
        table = discriminator.table
        if way == "Gumbel-softmax":
            ids, seen = generator.sample(BATCH, table.detach())
            loss = generator_loss(discriminator(seen), kind="hinge").loss
        else:
            with torch.no_grad():
                ids, seen = generator.sample(BATCH, table)
                scores = discriminator(seen)
            # What a letter earns: its own score and those of the letters that follow.
            rewards = scores.flip(1).cumsum(1).flip(1)
            log_probs = generator.log_probs(ids)
            loss = policy_gradient_loss(log_probs, rewards, torch.ones_like(ids)).loss
        of_generator.zero_grad()
        loss.backward()

        real, fake = table[real_text(BATCH)], table[ids]
        judged = discriminator_loss(discriminator(real), discriminator(fake), kind="hinge")
        penalty = gradient_penalty(discriminator, real, fake)
        of_discriminator.zero_grad()  # what the generator's loss has left there
        (judged.loss + 0.1 * penalty).backward()
        of_discriminator.step()
        of_generator.step()
    last = distance(generator, discriminator.table)
    ids, _ = generator.sample(3, discriminator.table)
    wrote = "|".join("".join(ALPHABET[i] for i in row) for row in ids.tolist())
    print(
        f"{way:<15} distance {first:.2f} -> {last:.2f}   accuracy of the discriminator "
        f"{judged.accuracy.item():.0%}   |{wrote}|"
    )


torch.manual_seed(0)
other = (pairs(real_text(1000)) - pairs(text.unsqueeze(0))).abs().sum() / 2
print(f"distance of a sample of real text: {other.item():.2f}")
train("Gumbel-softmax")
train("policy gradient")
