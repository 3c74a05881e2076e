"""Trains with Lightning: exact gradient accumulation, and no logits in memory.

pip install lightning
python examples/lightning_module.py
"""

import logging
import warnings
from collections.abc import Iterator

import lightning
import torch
from torch import Tensor

from llmloss_ext import linear_cross_entropy
from llmloss_ext.training import count_items

VOCAB, WIDTH, LENGTH, MICRO_BATCHES = 2000, 32, 24, 4
PADDING = -100


class Model(lightning.LightningModule):
    """A language model that predicts a token from the one before."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        self.exact = exact

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """The loss of a micro-batch; Lightning divides it by accumulate_grad_batches."""
        labels, num_items = batch
        hidden = torch.tanh(self.embedding(labels.clamp_min(0)))
        loss = linear_cross_entropy(
            hidden, self.head.weight, labels, shift=1, num_items=num_items if self.exact else None
        )
        self.log("loss", loss, reduce_fx="sum", prog_bar=True)
        return loss * self.trainer.accumulate_grad_batches if self.exact else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, whose steps are the gradients."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Steps:
    """Micro-batches, each with the number of tokens of its whole step.

    Over several devices, give `count_items` their group, and divide by their number.
    """

    def __init__(self, micro_batches: list[Tensor], in_a_step: int) -> None:
        self.micro_batches, self.in_a_step = micro_batches, in_a_step

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), self.in_a_step):
            step = self.micro_batches[start : start + self.in_a_step]
            items = count_items(step, shift=1)
            yield from ((labels, items) for labels in step)


def examples() -> Tensor:
    """Sequences of unequal length, padded."""
    torch.manual_seed(1)
    labels = torch.randint(0, VOCAB, (44, LENGTH))
    lengths = torch.randint(2, LENGTH + 1, (44, 1))
    return labels.masked_fill(torch.arange(LENGTH) >= lengths, PADDING)


def train(micro_batch: int, accumulated: int, exact: bool) -> Tensor:
    """An epoch. Its last step has fewer micro-batches than the others.

    Returns:
        All weights in a row.
    """
    model = Model(exact)
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=accumulated, accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, Steps(list(examples().split(micro_batch)), accumulated))
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def main() -> None:
    """Compares two ways to accumulate with batches that need not be."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    start = torch.nn.utils.parameters_to_vector(Model(True).parameters()).detach()
    large = train(4 * MICRO_BATCHES, 1, exact=True)
    moved = (large - start).norm()
    print(f"an epoch of large batches moves the weights by  {moved:.3f}")
    for exact in (True, False):
        error = (train(4, MICRO_BATCHES, exact) - large).norm() / moved
        how = "with num_items" if exact else "by means of means"
        print(f"accumulated {how:<17}: off by {error:.1e} of that")


if __name__ == "__main__":
    main()
