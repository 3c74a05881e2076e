"""What a model does around its output layer is found, or refused by name."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmloss_ext import cross_entropy
from llmloss_ext.integrations.examination import AroundTheLayer, examined

V, D = 50, 4
PLAIN = functools.partial(cross_entropy, class_dim=-1)


def token_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    reduction = "mean" if num_items_in_batch is None else "sum"
    x, target = logits.reshape(-1, vocab_size).float(), labels.reshape(-1)
    return F.cross_entropy(x, target, reduction=reduction) / (num_items_in_batch or 1)


def next_token_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    return token_loss(logits, shifted, vocab_size, num_items_in_batch)


class Body(nn.Module):
    cap = 5.0

    def forward(self, input_ids, **_):
        raise AssertionError("the layers are not called")


class Softcap(nn.Module):
    def forward(self, logits):
        return 5 * torch.tanh(logits / 5)


class Model(nn.Module):
    def __init__(self, after=lambda x, _: x, added=lambda x: 0.0, loss=next_token_loss, moved=0):
        super().__init__()
        self.body, self.norm, self.softcap = Body(), nn.LayerNorm(D), Softcap()
        self.head = nn.Linear(D, V, device="meta")
        self.after, self.added, self.moved = after, added, moved
        self._loss_function = loss

    @property
    def loss_function(self):
        return self._loss_function

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value

    def forward(self, input_ids, labels=None, use_cache=True, **kwargs):
        assert not use_cache
        hidden = self.norm(self.body(input_ids, labels=labels).last_hidden_state)
        logits = self.after(self.head(hidden), self)
        labels = labels + self.moved
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=V, **kwargs)
        return SimpleNamespace(loss=loss + self.added(logits))


def found(model):
    return examined(model, model.head, V, [PLAIN])


@pytest.mark.parametrize(
    ("after", "scale", "cap"),
    [
        (lambda x, _: x, 1.0, 0.0),
        (lambda x, _: x.mul_(0.3), 0.3, 0.0),
        (lambda x, _: x / -16.0, -1 / 16, 0.0),
        (lambda x, m: m.body.cap * torch.tanh(x / m.body.cap), 1.0, 5.0),
        (lambda x, m: m.softcap(x), 1.0, 5.0),
        (lambda x, _: 30 * torch.tanh(0.2 * x.bfloat16() / 30), 0.2, 30.0),
        (lambda x, _: 50 * torch.tanh(-2 * x / 50), -2.0, 50.0),
    ],
)  # fmt: skip
def test_transforms(after, scale, cap):
    model = Model(after)
    before = dict(model.named_modules())
    result = found(model)
    assert result.logit_scale == pytest.approx(scale, rel=1e-2)
    assert result.softcap == pytest.approx(cap, rel=1e-2)
    assert result.shift == 1
    assert dict(model.named_modules()) == before
    assert model.loss_function is next_token_loss


def test_labels_that_stand_where_they_are():
    assert found(Model(loss=token_loss)) == AroundTheLayer(1.0, 0.0, 0)


def test_terms_that_do_not_depend_on_the_logits():
    assert found(Model(added=lambda _: 0.5)).shift == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(lambda x, _: x + torch.arange(V)), "more to its logits than a scale and a softcap"),
        (Model(lambda x, _: x.masked_fill(torch.arange(V) == 3, -1e9)), "more to its logits"),
        (Model(lambda x, _: 5 * torch.tanh(x) ** 3), "more to its logits"),
        (Model(lambda x, _: x.clamp(-5, 5)), "more to its logits"),
        (Model(lambda x, _: x[:, :-1]), "does not give all its logits"),
        (Model(moved=1), "does not give its labels"),
        (Model(added=lambda x: 1e-3 * x.logsumexp(-1).square().mean()), "adds terms of its logits"),
        (Model(loss=lambda *_, **__: torch.zeros(())), "not the mean cross entropy of its labels"),
        (Model(loss=lambda *_: torch.zeros(())), "not the mean cross entropy of its labels"),
        (Model(lambda _, m: m.body.missing), "cannot be examined .*AttributeError.*missing"),
    ],
)
def test_refusals(model, message):
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"Model .*{message}"):
        found(model)
    assert dict(model.named_modules()) == before


def test_a_loss_that_is_not_asked():
    silent = type("Silent", (Model,), {"forward": lambda self, input_ids, labels: self.added(0)})()
    with pytest.raises(ValueError, match="Silent does not call its loss_function once"):
        found(silent)
