"""Trains a model of Hugging Face transformers without its logits in memory.

pip install transformers
python examples/hugging_face.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmloss_ext.integrations.transformers import (
    stop_linear_cross_entropy,
    use_linear_cross_entropy,
)

VOCAB, LENGTH, BATCH, STEPS = 32_000, 128, 8, 6
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=LENGTH,
)  # fmt: skip


def train(model: LlamaForCausalLM) -> tuple[list[float], int]:
    """Returns the losses, and the bytes of the largest tensor that a step keeps for backward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1)
    losses, largest = [], 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, 0 if tensor.grad_fn is None else tensor.nbytes)
        return tensor

    for _ in range(STEPS):
        tokens = torch.randint(0, 50, (BATCH, LENGTH))  # a small part of the vocabulary
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, largest


def fresh_model() -> LlamaForCausalLM:
    """Returns a model with the same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


model = fresh_model()
use_linear_cross_entropy(model, z_loss=0.0)  # any option of linear_cross_entropy
ours, ours_kept = train(model)
theirs, theirs_kept = train(fresh_model())
for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
    print(f"step {step}  linear cross entropy {one:.5f}  the model's own {other:.5f}")
print(
    f"largest tensor kept for backward: {ours_kept / 2**20:.1f} and {theirs_kept / 2**20:.1f} MiB"
)

stop_linear_cross_entropy(model)  # restores the model
model.eval()
print(f"logits for generation: {tuple(model(torch.tensor([[1, 2, 3]])).logits.shape)}")
