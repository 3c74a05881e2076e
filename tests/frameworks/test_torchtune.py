"""The contract of torchtune's linear loss, on a stand-in of its decoder.

torchtune itself asks for torchao. Of version 0.6.1, the file of its chunked loss is imported where
it is installed; its linear loss is newer, and imitated.
"""

from __future__ import annotations

import abc
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmloss_ext.integrations.torchtune import LinearCrossEntropyLoss
from llmloss_ext.nn import CrossEntropyLoss

BATCH, LENGTH, WIDTH, VOCAB = 2, 8, 16, 40
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class SFTLoss(abc.ABC):
    """By which its recipes know such a loss."""

    @abc.abstractmethod
    def set_model_output(self, model): ...


@pytest.fixture(autouse=True)
def _recipe(monkeypatch):
    """What a recipe has imported."""
    module = types.ModuleType("torchtune.modules.loss")
    module.SFTLoss = SFTLoss
    monkeypatch.setitem(sys.modules, module.__name__, module)


class Imitated(torch.nn.Module):
    """Its linear loss: a sum over chunks of the sequence, each of its tokens that count."""

    def __init__(self, num_output_chunks=8, ignore_index=-100):
        super().__init__()
        self.num_output_chunks, self.ignore_index = num_output_chunks, ignore_index

    def set_model_output(self, model):
        model.skip_output_layer = True
        self.linear_projection = model.output

    def forward(self, outputs, targets):
        chunks = (x.tensor_split(self.num_output_chunks, dim=1) for x in (outputs, targets))
        total = 0.0
        for hidden, target in zip(*chunks, strict=True):
            counts = target != self.ignore_index
            logits = self.linear_projection(hidden[counts])
            total = total + F.cross_entropy(logits.float(), target[counts], reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp_min(1)


class TiedLinear:
    """Its output layer of tied weights, which is no module."""

    def __init__(self, tied_module):
        self.tied_module = tied_module

    def __call__(self, x):
        return F.linear(x, self.tied_module.weight)


class Decoder(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = torch.nn.Embedding(VOCAB, WIDTH)
        self.norm = torch.nn.RMSNorm(WIDTH)
        output = torch.nn.Linear(WIDTH, VOCAB, bias=True)
        self.output = TiedLinear(self.tok_embeddings) if tied else output
        self.skip_output_layer = False

    def forward(self, tokens):
        h = self.norm(self.tok_embeddings(tokens))
        return h if self.skip_output_layer else self.output(h)


def batch(masked=3):
    torch.manual_seed(1)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -1
    labels[0, :masked] = -1
    return tokens, labels


@pytest.mark.parametrize("chunks", [None, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder(tied, chunks):
    tokens, labels = batch()
    results = []
    for loss_fn in (Imitated(3, -1), LinearCrossEntropyLoss(chunks, ignore_index=-1)):
        model = Decoder(tied)
        loss_fn.set_model_output(model)
        loss = loss_fn(model(tokens), labels)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert isinstance(loss_fn, SFTLoss)
    assert loss_fn.apply_compile_strategy(backend="inductor") is loss_fn
    assert_close(results[1], results[0], **CLOSE)


def test_options_and_no_tokens():
    tokens, labels = batch()
    model = Decoder(tied=False)
    plain, capped = (
        LinearCrossEntropyLoss(ignore_index=-1),
        LinearCrossEntropyLoss(ignore_index=-1, softcap=0.1),
    )
    for loss_fn in (plain, capped):
        loss_fn.set_model_output(model)
    hidden = model(tokens)
    assert capped(hidden, labels) < plain(hidden, labels)
    nothing = plain(hidden, torch.full_like(labels, -1))
    nothing.backward()
    assert nothing == 0
    assert not model.output.weight.grad.any()


def test_refusals():
    with pytest.raises(RuntimeError, match="call set_model_output first"):
        LinearCrossEntropyLoss()(torch.zeros(1, 2, WIDTH), torch.zeros(1, 2).long())
    model = Decoder(tied=False)
    model.output = torch.nn.Sequential(model.output)
    with pytest.raises(ValueError, match="or a TiedLinear, got Sequential"):
        LinearCrossEntropyLoss().set_model_output(model)


def test_beside_the_chunked_loss():
    """Of version 0.6.1, as its recipes call it; and `CrossEntropyLoss` as they call torch's."""
    found = importlib.util.find_spec("torchtune")
    if found is None:
        pytest.skip("could not import 'torchtune'")
    path = Path(found.origin).parent / "modules" / "loss" / "ce_chunked_output_loss.py"
    spec = importlib.util.spec_from_file_location("ce_chunked_output_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokens, labels = batch()
    model = Decoder(tied=False)
    theirs = module.CEWithChunkedOutputLoss(4, ignore_index=-1)
    wanted = theirs(list(model(tokens).chunk(4, dim=1)), labels)
    logits = model(tokens)
    ours = CrossEntropyLoss(ignore_index=-1)
    assert ours.ignore_index == -1
    assert_close(ours(logits.reshape(-1, VOCAB), labels.reshape(-1)), wanted, **CLOSE)
    linear = LinearCrossEntropyLoss(ignore_index=-1)
    linear.set_model_output(model)
    assert_close(linear(model(tokens), labels), wanted, **CLOSE)
