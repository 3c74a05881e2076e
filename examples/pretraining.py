"""Trains a small GPT on two tasks at once, with a loss monitor.

One task is to predict the next token, with label smoothing, z-loss and a confidence penalty. The
other is to predict masked tokens; its weight decays to 0. One batch is noise: its step is skipped.

    python examples/pretraining.py
"""

from functools import partial

import torch
from torch import Tensor

from llmloss_ext.losses import (
    LanguageModelLoss,
    combined_loss,
    linear_schedule,
    mask_tokens,
    mlm_loss,
)
from llmloss_ext.training import LossMonitor
from llmloss_train.model import GPT

VOCAB, MASK, PAD, LENGTH, STEPS, NOISE = 258, 256, 257, 48, 120, 90
text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))


def batch() -> torch.Tensor:
    """Windows of the text, the last of which is short and padded."""
    starts = torch.randint(0, len(text) - LENGTH, (16,))
    tokens = torch.stack([text[s : s + LENGTH] for s in starts.tolist()])
    tokens[-1, LENGTH // 2 :] = PAD
    return tokens


def masked_loss(tokens: Tensor, labels: Tensor) -> Tensor:
    """The loss of tokens that the model does not see, from those around them."""
    return mlm_loss(model.hidden(tokens, causal=False), labels, head)


torch.manual_seed(0)
model = GPT(VOCAB, LENGTH, dim=64, layers=2, heads=4)
head = model.head.weight
next_token = LanguageModelLoss(
    VOCAB, pad_token_id=PAD, label_smoothing=0.05, z_loss=1e-4, confidence_penalty=0.01
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
monitor = LossMonitor(spike_threshold=3.0, history_size=20)

for step in range(STEPS):
    tokens = batch() if step != NOISE else torch.randint(0, 256, (16, LENGTH))
    # Loss, perplexity and accuracies from one pass, without the logits in memory.
    stats = next_token.compute_loss_with_stats(model.hidden(tokens), tokens, linear_weight=head)
    masked, labels = mask_tokens(tokens, MASK, VOCAB, special_tokens=[PAD])
    combined = combined_loss(
        {
            "next": stats.loss,
            "masked": partial(masked_loss, masked, labels),
        },
        # From step 60 on the weight is 0, and the second pass through the model is skipped.
        {"next": 1.0, "masked": linear_schedule(step, 20, 60, 0.5, 0.0)},
    )
    combined.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if monitor.check_spike(combined.total.detach()):
        print(f"step {step:>3}  loss {combined.total.item():.3f} is a spike: skipped")
    else:
        optimizer.step()
    optimizer.zero_grad()
    if step % 30 == 0 or step == STEPS - 1:
        terms = "  ".join(f"{name} {loss.item():.3f}" for name, loss in combined.terms.items())
        print(
            f"step {step:>3}  {terms}  perplexity {stats.perplexity.item():.1f}  "
            f"accuracy {stats.accuracy.item():.0%} of {stats.tokens.item()}  norm {norm:.2f}"
        )
