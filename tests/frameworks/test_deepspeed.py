"""A patched model of transformers under DeepSpeed's ZeRO, on two processes."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_close

from frameworks.models import batch_of, tiny_llama, uncompiled_deepspeed

pytest.importorskip("deepspeed")

LEARNING_RATE = 0.1


def rank_step(rank, ranks, stage, tied, patched_first):
    import deepspeed

    from llmloss_ext.integrations.transformers import use_linear_cross_entropy

    os.environ["LOCAL_RANK"] = str(rank)
    results = []
    for is_ours in (False, True):
        model = tiny_llama(tied=tied)
        if is_ours and patched_first:
            use_linear_cross_entropy(model)
        with uncompiled_deepspeed():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE),
                config={
                    "train_micro_batch_size_per_gpu": 2,
                    "gradient_accumulation_steps": 2,
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                },
                dist_init_required=False,
            )
        if is_ours and not patched_first:
            use_linear_cross_entropy(model)
        losses = []
        for step in range(4):  # two of the optimiser, each of two micro-batches
            output = engine(**batch_of(seed=2 * step + rank))
            assert output.logits.shape[1] == (1 if is_ours else 7)
            losses.append(output.loss.detach().clone())
            engine.backward(output.loss)
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        results.append((torch.stack(losses), weights))
        engine.destroy()
    (stock, expected), (ours, actual) = results
    assert_close(ours, stock, 1e-5)
    start = dict(tiny_llama(tied=tied).named_parameters())
    for name, weight in actual.items():
        # What the steps have added: each gradient, and not the weights that hide it.
        assert_close((weight - start[name]).detach(), (expected[name] - start[name]).detach(), 1e-4)


@pytest.mark.parametrize(
    ("stage", "tied", "patched_first"),
    [(1, False, True), (2, False, True), (3, False, True), (3, False, False), (3, True, True)],
)
def test_zero(two, stage, tied, patched_first):
    two.run(rank_step, stage, tied, patched_first)
