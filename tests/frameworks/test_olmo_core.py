"""OLMo-core's losses and its LMHead, beside ours.

Of OLMo-core, only what these need is imported: the rest reads data from clouds. Liger's kernel,
which its fused loss takes, is imitated by torch.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmloss_ext.integrations import olmo_core as ours

if importlib.util.find_spec("olmo_core") is None:
    pytest.skip("could not import 'olmo_core'", allow_module_level=True)
pytest.importorskip("dataclass_extensions")

BATCH, SEQUENCE, WIDTH, VOCAB = 2, 6, 16, 40
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@pytest.fixture
def olmo(monkeypatch):
    """Its packages, without what they import on their own."""
    (where,) = importlib.util.find_spec("olmo_core").submodule_search_locations
    for name in ("olmo_core", "olmo_core.nn", "olmo_core.distributed"):
        package = types.ModuleType(name)
        package.__path__ = [where + name.removeprefix("olmo_core").replace(".", "/")]
        monkeypatch.setitem(sys.modules, name, package)
    if importlib.util.find_spec("cached_path") is None:
        stand_in = types.ModuleType("cached_path")
        stand_in.cached_path = None
        monkeypatch.setitem(sys.modules, "cached_path", stand_in)
    yield importlib.import_module
    ours.stop_cross_entropy()
    for name in [name for name in sys.modules if name.startswith("olmo_core.")]:
        monkeypatch.delitem(sys.modules, name)


def problem(seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(BATCH * SEQUENCE, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    bias = torch.randn(VOCAB, requires_grad=True)
    labels = torch.randint(VOCAB, (BATCH * SEQUENCE,))
    labels[2:4] = -1
    return hidden, weight, bias, labels


@REDUCTIONS
@pytest.mark.parametrize("compute_z_loss", [False, True])
def test_from_logits(olmo, compute_z_loss, reduction):
    theirs = olmo("olmo_core.nn.functional").cross_entropy_loss
    results = []
    for function in (theirs, ours.cross_entropy_loss):
        hidden, weight, bias, labels = problem()
        logits = (hidden @ weight.t() + bias).detach().requires_grad_()
        options = {"ignore_index": -1, "reduction": reduction}
        cross, z = function(
            logits, labels, compute_z_loss=compute_z_loss, z_loss_multiplier=0.1, **options
        )
        assert (z is None) == (not compute_z_loss)
        loss = cross.sum()
        if z is not None:
            loss = loss + 0.5 * torch.where(labels == -1, 0, z).sum()  # apart
        loss.backward()
        results.append([cross.detach(), loss.detach(), logits.grad])
    assert_close(results[1], results[0], **CLOSE)


def imitated(hidden, weight, labels, *, bias, reduction, z_loss_multiplier, softcap, **options):
    """What Liger's kernel returns to OLMo-core."""
    logits = softcap * torch.tanh((hidden @ weight.t() + bias) / softcap)
    counts = labels != -1
    z = z_loss_multiplier * logits.logsumexp(-1).square() * counts
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none", **options) + z
    if reduction == "none":
        return loss, z
    items = 1 if reduction == "sum" else counts.sum()
    return loss.sum() / items, z.sum() / items


@REDUCTIONS
def test_from_hidden_states(reduction):
    results = []
    for function, more in (
        (imitated, {}),
        (ours.fused_linear_cross_entropy_loss, {
            "ignore_index": -1, "compute_z_loss": True, "accum_dtype": torch.float32,
        }),
    ):  # fmt: skip
        hidden, weight, bias, labels = problem()
        loss, z = function(
            hidden, weight, labels, bias=bias, reduction=reduction, z_loss_multiplier=0.1,
            softcap=5.0, label_smoothing=0.1, **more,
        )  # fmt: skip
        loss.sum().backward()
        results.append([loss.detach(), z.detach(), hidden.grad, weight.grad, bias.grad])
    assert not z.requires_grad
    assert_close(results[1], results[0], **CLOSE)
    assert ours.fused_linear_cross_entropy_loss(hidden, weight, labels, ignore_index=-1)[1] is None


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("z_loss", [None, 1e-2])
def test_the_head(olmo, z_loss, reduction):
    """Its own implementation, then ours in the place of that and of the fused one."""
    head = olmo("olmo_core.nn.lm_head")
    norm = olmo("olmo_core.nn.layer_norm").LayerNormConfig()
    results = []
    for is_ours, kind in ((False, "default"), (True, "default"), (True, "fused_linear")):
        if is_ours:
            ours.use_cross_entropy()
        torch.manual_seed(1)
        config = head.LMHeadConfig(
            layer_norm=norm, bias=True, loss_implementation=head.LMLossImplementation(kind)
        )
        layer = config.build(d_model=WIDTH, vocab_size=VOCAB)
        hidden, _, _, labels = problem()
        output = layer(
            hidden.view(BATCH, SEQUENCE, WIDTH), labels=labels.view(BATCH, SEQUENCE),
            ignore_index=-1, loss_reduction=reduction, z_loss_multiplier=z_loss,
            loss_div_factor=7.0,
        )  # fmt: skip
        counted = labels.view(BATCH, SEQUENCE) != -1 if reduction == "none" else True
        (output.loss * counted).sum().backward()
        assert (output.logits is None) == (kind == "fused_linear")
        losses = [output.loss, output.ce_loss, *([] if z_loss is None else [output.z_loss])]
        grads = [p.grad for p in layer.parameters()]
        results.append([*(x.detach() * counted for x in losses), hidden.grad, *grads])
    assert head.cross_entropy_loss is ours.cross_entropy_loss
    for other in results[1:]:
        assert_close(other, results[0], **CLOSE)


def test_its_module(olmo):
    """And what is put back."""
    module = olmo("olmo_core.nn.cross_entropy_loss")
    results = []
    for use in (lambda: None, ours.use_cross_entropy, ours.stop_cross_entropy):
        use()
        loss_fn = module.CrossEntropyLoss(reduction="sum", z_loss_multiplier=0.1, ignore_index=-1)
        is_ours = loss_fn.loss_fn.base_loss_fn is ours.cross_entropy_loss
        assert is_ours == (use is ours.use_cross_entropy)
        hidden, weight, bias, labels = problem()
        logits = (hidden @ weight.t() + bias).view(BATCH, SEQUENCE, VOCAB)
        cross, z = loss_fn(logits, labels.view(BATCH, SEQUENCE), div_factor=torch.tensor(7.0))
        (cross + z).backward()
        results.append([cross.detach(), z.detach(), hidden.grad])
    assert_close(results[1], results[0], **CLOSE)
