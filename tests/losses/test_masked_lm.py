"""The masked language model: which tokens are hidden, and the loss of those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import losses

from .problem import B, D, S, V


def test_mask_tokens():
    ids = torch.randint(5, 1000, (200, 100))
    before = ids.clone()
    ids[:, 0] = 1  # special
    before[:, 0] = 1

    def mask(seed):
        generator = torch.Generator().manual_seed(seed)
        return losses.mask_tokens(ids, 4, 1000, special_tokens=[1], generator=generator)

    hidden, labels = mask(3)
    assert torch.equal(ids, before)
    chosen = labels != -100
    assert not chosen[:, 0].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    count = chosen.sum().item()
    assert count / ids[:, 1:].numel() == pytest.approx(0.15, abs=0.01)
    masked = (hidden == 4)[chosen].sum().item() / count
    same = (hidden == ids)[chosen].sum().item() / count
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1, abs=0.03)
    for a, b in zip(mask(3), (hidden, labels), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(mask(4)[1], labels)


def test_mask_tokens_options():
    ids = torch.arange(10, 20).view(2, 5)
    none, labels = losses.mask_tokens(ids, 3, 50, probability=0.0)
    assert torch.equal(none, ids)
    assert (labels == -100).all()
    allowed = torch.zeros(2, 5, dtype=torch.bool)
    allowed[0, 2] = True
    hidden, labels = losses.mask_tokens(
        ids, 3, 50, probability=1.0, mask_share=1.0, random_share=0.0, maskable=allowed
    )
    assert hidden[0, 2] == 3
    assert (labels != -100).sum() == 1
    for wrong in ({"probability": 1.5}, {"mask_share": 0.8, "random_share": 0.3},
                  {"maskable": allowed[:1]}, {"vocab_size": 0}, {"vocab_size": 3}):  # fmt: skip
        with pytest.raises(ValueError):
            losses.mask_tokens(ids, 3, **{"vocab_size": 50, **wrong})
    for dtype in (torch.float32, torch.uint8, torch.int16):
        with pytest.raises(ValueError, match="int64 or int32"):
            losses.mask_tokens(ids.to(dtype), 3, 50)


@pytest.mark.parametrize("from_hidden", [False, True])
def test_mlm_loss(device, from_hidden):
    hidden, weight = torch.randn(B, S, D, device=device), torch.randn(V, D, device=device)
    labels = torch.full((B, S), -100, device=device)
    labels[0, 2], labels[2, 5] = 7, 9
    leaf = (hidden if from_hidden else hidden @ weight.t()).clone().requires_grad_()
    arguments = (weight,) if from_hidden else ()
    loss = losses.mlm_loss(leaf, labels, *arguments)
    logits = (hidden.double() @ weight.double().t()).flatten(0, 1)
    assert_close(loss.detach(), F.cross_entropy(logits, labels.flatten()), 1e-5)
    loss.backward()
    assert (leaf.grad[1] == 0).all()
    for wrong in (labels[:, 1:], labels.t()):  # misaligned, with as many labels or not
        with pytest.raises(ValueError):
            losses.mlm_loss(leaf, wrong, *arguments)
    if from_hidden:
        for drop in (False, True):
            again = losses.mlm_loss(leaf, labels, weight, drop_ignored=drop, num_items=4)
            assert_close(again.detach(), loss.detach() / 2, 1e-5)
    else:
        for options in ({"drop_ignored": True}, {"linear_bias": weight[:, 0]}):
            with pytest.raises(ValueError, match="need linear_weight"):
                losses.mlm_loss(leaf, labels, **options)
    empty = losses.mlm_loss(leaf, torch.full_like(labels, -100), *arguments)
    assert empty == 0
    empty.backward()
