"""Vocabulary-parallel losses inside compiled graphs, with nothing left out of them."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch.distributed.device_mesh import init_device_mesh

import llmloss_ext
from llmloss_ext import Shard
from llmloss_ext.training import count_items

ROWS, CLASSES, D = 12, 24, 8

FROM_LOGITS = {
    "loss": lambda x, _w, y, **how: llmloss_ext.cross_entropy(x, y, z_loss=1e-3, **how),
    "statistics": lambda x, _w, y, **how: sum(
        s.sum() for s in llmloss_ext.token_stats(x, y, **how)[:4]
    ),
}
FROM_HIDDEN = {
    "linear": lambda h, w, y, **how: llmloss_ext.linear_cross_entropy(
        h, w, y, chunk_tokens=5, label_smoothing=0.1, **how
    ),
    "linear per token": lambda h, w, y, **how: llmloss_ext.linear_cross_entropy(
        h, w, y, reduction="none", **how
    ).sum(),
    "linear log-probabilities": lambda h, w, y, **how: llmloss_ext.linear_log_probs(
        h, w, y, **how
    ).sum(),
}


def rank_compiled(rank, ranks, name):
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, D), torch.randn(CLASSES, D)
    logits, target = hidden @ weight.t(), torch.randint(0, CLASSES, (ROWS,))
    target[::5] = -100
    columns = slice(rank * CLASSES // ranks, (rank + 1) * CLASSES // ranks)
    if name in FROM_LOGITS:
        function, given = FROM_LOGITS[name], (logits[:, columns], weight)
    else:
        function, given = FROM_HIDDEN[name], (hidden, weight[columns])

    def step(x, w):
        return function(x * 1, w, target, shard=Shard(mesh))

    torch.compiler.reset()
    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in given]
        value = run(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves if x.grad is not None)])
    eager, compiled = results
    assert len(eager) == len(compiled) == (2 if name in FROM_LOGITS else 3)
    for one, other in zip(compiled, eager, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("name", [*FROM_LOGITS, *FROM_HIDDEN])
def test_one_graph(two, name):
    two.run(rank_compiled, name)


def rank_mesh_of_two(rank, ranks):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(rank)
    logits, target = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"several dimensions: give mesh\['tensor'\]"):
        llmloss_ext.cross_entropy(logits, target, shard=Shard(mesh))
    for given in (mesh["tensor"], mesh.get_group("tensor")):
        two = llmloss_ext.cross_entropy(logits, target, vocab_size=8, shard=Shard(given))
        both = [torch.empty_like(logits) for _ in range(2)]
        torch.distributed.all_gather(both, logits, group=mesh.get_group("tensor"))
        assert_close(two, llmloss_ext.cross_entropy(torch.cat(both, 1), target), 1e-6)
    one = mesh.get_local_rank("tensor") + 1
    assert count_items([target[:one]], group=mesh["tensor"]) == 3


def test_a_mesh_of_one_dimension_is_a_group(four):
    four.run(rank_mesh_of_two)
