"""GRPO on a task whose answers a program can check: count down from a number to 0, then stop.

The model begins with random weights and sees no right answer, only the reward of what it has
sampled itself. Its log-probabilities come from hidden states: no logits in memory.

    python examples/grpo.py
"""

import torch

from llmloss_ext import TokenStats, linear_token_stats
from llmloss_ext.losses import group_advantages, grpo_loss
from llmloss_train.model import GPT

LARGEST, PROMPTS, GENERATIONS = 7, 8, 16
STOP = LARGEST + 1
LENGTH = LARGEST + 2  # of a completion, at most


@torch.no_grad()
def sample(model: GPT, prompts: torch.Tensor, greedy: bool = False) -> torch.Tensor:
    """(B, LENGTH) tokens after each prompt (B)."""
    tokens = prompts.unsqueeze(1)
    for _ in range(LENGTH):
        logits = model.hidden(tokens)[:, -1] @ model.head.weight.t()
        chosen = logits.argmax(-1) if greedy else torch.softmax(logits, -1).multinomial(1)[:, 0]
        tokens = torch.cat([tokens, chosen.unsqueeze(1)], 1)
    return tokens[:, 1:]


def until_stop(completions: torch.Tensor) -> torch.Tensor:
    """The mask (B, LENGTH) of the tokens up to the first STOP, with it."""
    stops = (completions == STOP).int()
    return stops.cumsum(1) - stops == 0


def reward(prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """How far a completion is right, as a part of the longer of it and the answer."""
    steps = torch.arange(1, LENGTH + 1)
    answer = prompts.unsqueeze(1) - steps
    answer = torch.where(answer >= 0, answer, STOP)
    right = (completions == answer).int().cumprod(1) * until_stop(completions)
    longer = torch.maximum(until_stop(completions).sum(1), prompts + 1)
    return right.sum(1) / longer


def statistics(model: GPT, prompts: torch.Tensor, completions: torch.Tensor) -> TokenStats:
    """Log-probability and entropy (B, LENGTH) of each token of the completions."""
    tokens = torch.cat([prompts.unsqueeze(1), completions], 1)
    return linear_token_stats(model.hidden(tokens[:, :-1]), model.head.weight, completions)


torch.manual_seed(0)
model = GPT(LARGEST + 2, LENGTH + 1, dim=32, layers=2, heads=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
for step in range(101):
    prompts = torch.randint(0, LARGEST + 1, (PROMPTS,)).repeat_interleave(GENERATIONS)
    completions = sample(model, prompts)
    mask, rewards = until_stop(completions), reward(prompts, completions)
    advantages = group_advantages(rewards, GENERATIONS)
    with torch.no_grad():
        old = statistics(model, prompts, completions).log_prob
    for _ in range(2):  # from the second update on, the ratio is not 1
        now = statistics(model, prompts, completions)
        result = grpo_loss(
            now.log_prob, old, advantages, mask, entropy=now.entropy, epsilon_high=0.28,
            entropy_coef=0.01,
        )  # fmt: skip
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if step % 20 == 0:
        m = result.metrics
        print(
            f"step {step:>3}  reward {rewards.mean():.3f}  entropy {m.entropy:.3f}  "
            f"ratio {m.ratio:.3f}  clipped {m.clip_low + m.clip_high:.3f}"
        )

prompts = torch.arange(LARGEST + 1)
answers = sample(model, prompts, greedy=True)
print("from 5:", " ".join(map(str, answers[5][until_stop(answers)[5]].tolist())), f"({STOP} stops)")
print(f"counts down rightly from {(reward(prompts, answers) == 1).sum()} of {LARGEST + 1} numbers")
