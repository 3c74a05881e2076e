"""The losses inside torch's engines: meshes, context parallelism, pipelines, kept activations."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.utils.checkpoint import checkpoint

from llmloss_ext import linear_cross_entropy
from llmloss_ext.training import count_items

V, D, B, S = 32, 8, 4, 6


class Model(nn.Module):
    """A body, and a loss from its hidden states within the forward of the unit with the weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.weight = nn.Parameter(torch.randn(V, D))

    def forward(self, ids, target, **options):
        hidden = torch.tanh(self.body(self.embedding(ids)))
        loss = linear_cross_entropy(hidden, self.weight, target, **options)
        return loss.to_local() if isinstance(loss, DTensor) else loss


def batch(ignored=True):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, V, (B, S), generator=generator)
    target = torch.randint(0, V, (B, S), generator=generator)
    if ignored:  # other numbers of tokens in every part
        target[0], target[1, 1:], target[3, :2] = -100, -100, -100
    return ids, target


def expected_step():
    model = Model()
    loss = model(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(loss, model, factor=1):
    expected, grads = expected_step()
    assert_close(loss.detach(), expected, 1e-5)
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert_close(factor * grad, grads[name], 1e-5)


def rank_fsdp_and_tensor_parallel(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Model()
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh["tensor"], [Shard(0)]))
    for module in (model.embedding, model.body):
        distribute_module(module, mesh["tensor"])  # replicated
    fully_shard(model, mesh=mesh["data"])
    ids, target = batch()
    mine = slice(mesh.get_local_rank("data") * 2, mesh.get_local_rank("data") * 2 + 2)
    group = mesh.get_group("data")
    items = count_items([target[mine]], group=group) / 2  # FSDP averages over two ranks
    ids = distribute_tensor(ids[mine], mesh["tensor"], [Replicate()])
    loss = model(ids, target[mine], num_items=items)
    loss.backward()
    total = loss.detach() / 2
    dist.all_reduce(total, group=group)
    check(total, model)


def test_fsdp_and_tensor_parallelism(four):
    four.run(rank_fsdp_and_tensor_parallel)


def rank_context_parallel(rank, ranks):
    """Each rank has a part of every sequence, and another number of tokens."""
    model = Model()
    ids, target = batch()
    mine = slice(rank * S // ranks, (rank + 1) * S // ranks)
    items = count_items([target[:, mine]], group=dist.group.WORLD)
    loss = model(ids[:, mine], target[:, mine], num_items=items)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    for p in model.parameters():
        dist.all_reduce(p.grad)
    check(total, model)


def test_context_parallelism(ranks):
    ranks.run(rank_context_parallel)


@pytest.mark.parametrize("how", ["checkpoint", "reentrant checkpoint", "kept", "kept checkpoint"])
def test_activations(how):
    """Computed again in backward, or kept elsewhere until then."""
    model = Model()
    ids, target = batch()
    hidden = model.embedding(ids)

    def rest(hidden):
        return linear_cross_entropy(torch.tanh(model.body(hidden)), model.weight, target)

    kept = torch.autograd.graph.save_on_cpu() if "kept" in how else nullcontext()
    with kept:
        if "checkpoint" in how:
            loss = checkpoint(rest, hidden, use_reentrant="reentrant" in how)
        else:
            loss = rest(hidden)
        loss.backward()
    check(loss, model)


def test_backwards_out_of_order():
    """Pipelines keep the graphs of several micro-batches, and run them in an order of their own."""
    model = Model()
    ids, target = batch()
    items = count_items([target])
    losses = [model(ids[i : i + 1], target[i : i + 1], num_items=items) for i in range(B)]
    for i in (2, 0, 3, 1):
        losses[i].backward()
    check(sum(losses), model)


def rank_pipeline(rank, ranks, kind):
    """torch's own schedules: the last stage has the loss, from hidden states."""
    from torch.distributed import pipelining

    whole = Model()
    ids, target = batch(ignored=False)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = whole.embedding, whole.body

        def forward(self, ids):
            return torch.tanh(self.body(self.embedding(ids)))

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = whole.weight

        def forward(self, hidden):
            return hidden * 1

    module = Last() if rank else First()
    stage = pipelining.PipelineStage(module, rank, ranks, torch.device("cpu"))
    schedule = getattr(pipelining, kind)(
        stage, n_microbatches=4, scale_grads=False,
        loss_fn=lambda hidden, y: linear_cross_entropy(hidden, whole.weight, y, num_items=B * S),
    )  # fmt: skip
    losses = []
    if rank == 0:
        schedule.step(ids)
    else:
        schedule.step(target=target, losses=losses)
    model = Model()
    expected = model(ids, target)
    expected.backward()
    if rank:
        assert_close(torch.stack(losses).sum().detach(), expected.detach(), 1e-5)
    mine = dict(module.named_parameters())
    for name, p in model.named_parameters():
        if name in mine:
            assert_close(mine[name].grad, p.grad, 1e-5)


@pytest.mark.parametrize("kind", ["ScheduleGPipe", "Schedule1F1B"])
def test_pipelines(two, kind):
    two.run(rank_pipeline, kind)
