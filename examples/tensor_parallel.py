"""Splits the vocabulary over two ranks, each of which holds half of the output layer.

The ranks see the same text, and their losses are bitwise equal. One device with the whole layer
gets the same losses up to rounding.

    python examples/tensor_parallel.py
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from llmloss_ext import linear_cross_entropy, parallel
from llmloss_train.model import GPT

VOCAB, LENGTH, STEPS, RANKS = 256, 48, 40, 2
text = torch.tensor(list(b"pack my box with five dozen liquor jugs. " * 40))


def train(loss_of: Callable[..., Tensor], head: torch.nn.Parameter, model: GPT) -> list[float]:
    """Returns the losses of a few steps; ``head`` is this rank's part of the output layer."""
    optimizer = torch.optim.AdamW([*model.parameters(), head], lr=3e-3)
    losses = []
    torch.manual_seed(1)
    for _ in range(STEPS):
        starts = torch.randint(0, len(text) - LENGTH, (16,))
        tokens = torch.stack([text[s : s + LENGTH] for s in starts.tolist()])
        loss = loss_of(model.hidden(tokens), head, tokens, shift=1, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def on_rank(rank: int, folder: str) -> None:
    """Trains on one rank."""
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = GPT(VOCAB, LENGTH, dim=64, layers=2, heads=4)
    rows = VOCAB // RANKS
    mine = torch.nn.Parameter(model.head.weight.detach()[rank * rows : (rank + 1) * rows].clone())
    losses = train(parallel.linear_cross_entropy, mine, model)
    Path(folder, f"{rank}.txt").write_text("\n".join(map(str, losses)))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(on_rank, (folder,), RANKS)
        ranks = [Path(folder, f"{rank}.txt").read_text() for rank in range(RANKS)]
    torch.manual_seed(0)
    model = GPT(VOCAB, LENGTH, dim=64, layers=2, heads=4)
    whole = torch.nn.Parameter(model.head.weight.detach().clone())
    alone = train(linear_cross_entropy, whole, model)
    first = [float(line) for line in ranks[0].splitlines()]
    print(f"all ranks have the same bits: {len(set(ranks)) == 1}")
    for step in range(0, STEPS, 13):
        print(f"step {step:>2}  {RANKS} ranks {first[step]:.5f}  one device {alone[step]:.5f}")
