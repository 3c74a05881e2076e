"""A patched model of transformers under accelerate's plugin for FSDP2, on two processes."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_close
from torch.distributed.tensor import DTensor

from frameworks.models import batch_of, tiny_llama

pytest.importorskip("accelerate")

LEARNING_RATE = 0.1


def accelerator_of():
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    # It leaves the plugin aside on a CPU, where all of it runs as well.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def weights_of(model):
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def rank_steps(rank, ranks, tied, patched_first):
    from llmloss_ext.integrations.transformers import use_linear_cross_entropy

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already
    results = []
    for is_ours in (False, True):
        accelerator = accelerator_of()
        model = tiny_llama(tied=tied)
        if is_ours and patched_first:
            use_linear_cross_entropy(model)
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
        outer, optimizer = accelerator.prepare(model, optimizer)
        assert {type(x) for x in outer.parameters()} == {DTensor}
        if is_ours and not patched_first:
            use_linear_cross_entropy(accelerator.unwrap_model(outer))
        losses = []
        for step in range(4):  # two of the optimiser, each of two micro-batches
            with accelerator.accumulate(outer):
                output = outer(**batch_of(seed=2 * step + rank))
                assert output.logits.shape[1] == (1 if is_ours else 7)
                losses.append(output.loss.detach().clone())
                accelerator.backward(output.loss)
                optimizer.step()
                optimizer.zero_grad()
        results.append((torch.stack(losses), weights_of(outer)))
    (stock, expected), (ours, actual) = results
    assert_close(ours, stock, 1e-5)
    start = dict(tiny_llama(tied=tied).named_parameters())
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        # What the steps have added: each gradient, and not the weights that hide it.
        assert_close((weight - start[name]).detach(), (expected[name] - start[name]).detach(), 1e-4)


@pytest.mark.parametrize(("tied", "patched_first"), [(False, True), (True, True), (False, False)])
def test_fsdp2(two, tied, patched_first):
    two.run(rank_steps, tied, patched_first)
