"""A LightningModule with the loss of hidden states: what examples/lightning_module.py shows."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("lightning")

QUIET = "ignore::UserWarning", "ignore:.*:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def test_accumulated_gradients(monkeypatch):
    """The weights after an epoch are those of torch's loss of whole logits, of large batches."""
    from examples import lightning_module as example

    class Stock(example.Model):
        def training_step(self, batch, _index):
            labels, num_items = batch
            logits = self.head(torch.tanh(self.embedding(labels.clamp_min(0))))[:, :-1]
            total = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )  # fmt: skip
            return total / num_items

    accumulated = example.train(4, 4, exact=True)
    monkeypatch.setattr(example, "Model", Stock)
    large = example.train(16, 1, exact=True)
    assert_close(accumulated, large, rtol=1e-5, atol=1e-6)


def test_the_example(capsys):
    from examples import lightning_module as example

    example.main()
    shown = capsys.readouterr().out
    assert re.search(r"with num_items +: off by \d\.\de-0[678] of that", shown), shown
    assert re.search(r"by means of means: off by [1-5]\.\de-01 of that", shown), shown
