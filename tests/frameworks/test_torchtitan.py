"""torchtitan's losses beside ours, also under FSDP2 and its two kinds of tensor parallelism."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

pytest.importorskip("torchtitan")
pytest.importorskip("spmd_types")

SEQUENCE, BATCH, WIDTH, VOCAB = 8, 2, 16, 63
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def titan():
    from torchtitan.components import loss

    from llmloss_ext.integrations import torchtitan as ours

    return loss, ours


def batch(rank=0):
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[rank, :3] = -100
    return tokens, labels


def chunked(loss, count=4):
    """torchtitan's way without the whole logits."""
    return loss.ChunkedLossWrapper.Config(
        num_chunks=count, loss_fn=loss.CrossEntropyLoss.Config(global_vocab_size=VOCAB)
    ).build()


class Decoder(torch.nn.Module):
    """Like torchtitan's, which needs Triton: its parts, and whose job the output layer is."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = torch.nn.Embedding(VOCAB, WIDTH)
        self.layers = torch.nn.ModuleDict({"0": torch.nn.Linear(WIDTH, WIDTH)})
        self.norm = torch.nn.RMSNorm(WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        self._skip_lm_head = False

    def forward(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = h + layer(h)
        h = self.norm(h)
        return h if self._skip_lm_head else self.lm_head(h)


@pytest.mark.parametrize("tokens", [None, 11.0])
def test_from_logits(tokens):
    loss, ours = titan()
    _, labels = batch()
    logits = torch.randn(BATCH, SEQUENCE, VOCAB)
    tokens = None if tokens is None else torch.tensor(tokens)
    results = []
    for module in (loss, ours):
        x = logits.clone().requires_grad_()
        value, metrics = module.CrossEntropyLoss.Config(global_vocab_size=VOCAB).build()(
            x, labels, tokens, positions=None
        )
        assert metrics == {}
        value.backward()
        results.append((value.detach(), x.grad))
    assert_close(results[1], results[0], **CLOSE)


def test_without_tokens():
    _, ours = titan()
    logits = torch.randn(1, 2, VOCAB, requires_grad=True)
    value, _ = ours.CrossEntropyLoss.Config().build()(
        logits, torch.full((1, 2), -100), torch.tensor(0.0)
    )
    value.backward()
    assert value == 0
    assert not logits.grad.any()


def step(model, loss_fn, tokens, labels, valid):
    """A step of torchtitan's trainer."""
    if isinstance(loss_fn, titan()[0].ChunkedLossWrapper):
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    loss, _ = loss_fn(model(tokens), labels, valid, positions=None)
    loss.backward()
    return loss.detach()


def test_a_decoder():
    """The loss takes the place of the chunked one, and options arrive."""
    loss, ours = titan()
    tokens, labels = batch()
    model = Decoder()
    results = []
    for loss_fn in (
        chunked(loss), ours.LinearCrossEntropyLoss.Config(
            max_chunk_bytes=VOCAB * 4 * 3, float32_logits=True
        ).build()
    ):  # fmt: skip
        model.zero_grad()
        value = step(model, loss_fn, tokens, labels, torch.tensor(11.0))
        results.append([value, *(p.grad for p in model.parameters())])
    assert_close(results[1], results[0], **CLOSE)
    assert "forward" not in vars(model.lm_head)
    with torch.no_grad():  # as its validator does
        assert_close(loss_fn(model(tokens), labels, torch.tensor(11.0))[0], value, **CLOSE)
    own = model.lm_head.forward  # torchtitan's parallelize leaves such a one there
    model.lm_head.forward = own
    smooth = ours.LinearCrossEntropyLoss.Config(label_smoothing=0.1, z_loss=1e-2).build()
    assert step(model, smooth, tokens, labels, torch.tensor(11.0)) > value
    assert model.lm_head.forward is own


def rank_fsdp(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    loss, ours = titan()
    tokens, labels = batch(rank)
    valid = (labels != -100).sum().float()
    dist.all_reduce(valid)
    results = []
    for make in (lambda: chunked(loss), lambda: ours.LinearCrossEntropyLoss.Config().build()):
        torch.manual_seed(0)
        model = Decoder()
        mesh = init_device_mesh("cpu", (ranks,))
        # The units of torchtitan.distributed.fsdp.apply_fsdp_to_decoder.
        for unit in (model.tok_embeddings, [model.norm, model.lm_head], *model.layers.values(),
                     model):  # fmt: skip
            fully_shard(unit, mesh=mesh)
        value = step(model, make(), tokens, labels, valid)
        grads = [p.grad.full_tensor() for p in model.parameters()]
        results.append([value, *grads])
    assert_close(results[1], results[0], **CLOSE)


def test_fsdp2(two):
    two.run(rank_fsdp)


def rank_tensor_parallel(rank, ranks, backend):
    """The last rank has a class less."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torchtitan.distributed import spmd_types, utils

    loss, ours = titan()
    utils.set_spmd_backend(backend)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    _, labels = batch()
    hidden, weight = torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(VOCAB, WIDTH)
    results = []
    for make in (
        lambda: chunked(loss, 2),
        lambda: ours.LinearCrossEntropyLoss.Config(global_vocab_size=VOCAB).build(),
        lambda: loss.CrossEntropyLoss.Config(global_vocab_size=VOCAB).build(),
        lambda: ours.CrossEntropyLoss.Config(global_vocab_size=VOCAB).build(),
    ):
        layer = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        h = hidden.clone().requires_grad_()
        if backend == "spmd_types":
            layer.weight = torch.nn.Parameter(weight.chunk(ranks)[rank].clone())
            context, given = spmd_types.set_current_spmd_mesh(mesh), h
        else:
            layer.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
            given = DTensor.from_local(h, mesh, [Replicate()], run_check=False)
            context = torch.enable_grad()
        loss_fn = make()
        is_linear = isinstance(loss_fn, loss.ChunkedLossWrapper)
        with context:
            if is_linear:
                loss_fn.set_lm_head(layer)
            value, _ = loss_fn(given if is_linear else layer(given), labels, torch.tensor(11.0))
            value.backward()
        if isinstance(value, DTensor):  # torchtitan's from DTensors of hidden states
            assert not type(loss_fn).__module__.startswith("llmloss_ext")
            value = value.full_tensor()
        if backend == "spmd_types":
            dist.all_reduce(h.grad)  # as the norm's redistribution does
            grad = layer.weight.grad
        else:
            grad = layer.weight.grad.full_tensor()
        results.append([value.detach(), h.grad, grad])
    for other in results[1:]:
        assert_close(other, results[0], **CLOSE)
    utils.set_spmd_backend("spmd_types")


@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
def test_tensor_parallel(two, backend):
    two.run(rank_tensor_parallel, backend)


def test_refusals():
    _, ours = titan()
    from torchtitan.distributed import utils

    linear = ours.LinearCrossEntropyLoss.Config().build()
    _, labels = batch()
    with pytest.raises(RuntimeError, match="call set_lm_head first"):
        linear(torch.zeros(BATCH, SEQUENCE, WIDTH), labels)
    with pytest.raises(ValueError, match=r"plain linear layer, got Sequential"):
        linear.set_lm_head(torch.nn.Sequential())
    utils.set_spmd_backend("full_dtensor")
    try:
        with pytest.raises(ValueError, match="need spmd_backend"):
            ours.CrossEntropyLoss.Config().build()(torch.zeros(BATCH, SEQUENCE, VOCAB), labels)
    finally:
        utils.set_spmd_backend("spmd_types")
