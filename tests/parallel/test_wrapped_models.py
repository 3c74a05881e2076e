"""A patched model of transformers on two processes, against the stock one in the same wrapper."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_close
from torch.distributed.device_mesh import init_device_mesh

V = 37
LAYOUTS = ("ddp", "fsdp", "fsdp2 root", "fsdp2 own unit")


def wrapped(model, layout, ranks):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if layout == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp":
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    mesh = init_device_mesh("cpu", (ranks,))
    own = [model.lm_head] if layout == "fsdp2 own unit" else []
    for unit in (*model.model.layers, *own, model):
        fully_shard(unit, mesh=mesh)
    return model


def whole_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rank_layout(rank, ranks, layout, patched_first):
    import transformers

    from llmloss_ext.integrations.transformers import use_linear_cross_entropy

    results = []
    for is_ours in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).train()
        if is_ours and patched_first:
            use_linear_cross_entropy(model)
        outer = wrapped(model, layout, ranks)
        if is_ours and not patched_first:
            use_linear_cross_entropy(model)
        ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(rank))
        output = outer(input_ids=ids, labels=ids)
        output.loss.backward()
        assert output.logits.shape == (2, 1 if is_ours else 7, V)
        grads = {n: whole_of(p.grad) for n, p in outer.named_parameters() if p.grad is not None}
        results.append((output.loss.detach(), grads))
    (stock, stock_grads), (ours, our_grads) = results
    assert_close(ours, stock, 1e-5)
    assert our_grads.keys() == stock_grads.keys()
    for name, grad in our_grads.items():
        assert_close(grad, stock_grads[name], 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patched_first", [True, False])
def test_layouts(two, layout, patched_first):
    pytest.importorskip("transformers")
    two.run(rank_layout, layout, patched_first)


def rank_tensor_parallel(rank, ranks, folder):
    import transformers
    from transformers.distributed import DistributedConfig

    from llmloss_ext.integrations.transformers import use_linear_cross_entropy

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for is_ours in (False, True):
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto")
        ).train()
        assert hasattr(model.lm_head.weight, "placements")
        if is_ours:
            use_linear_cross_entropy(model, logits="argmax")
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        assert output.logits.shape == (2, 1 if is_ours else 7, V)
        grads = {name: whole_of(p.grad) for name, p in model.named_parameters()}
        with torch.no_grad():
            evaluated = model.eval()(input_ids=ids, labels=ids)
        results.append((output.loss.detach(), grads, evaluated))
    (stock, stock_grads, stock_evaluated), (ours, our_grads, evaluated) = results
    assert_close(ours, stock, 1e-5)
    for name, grad in our_grads.items():
        assert_close(grad, stock_grads[name], 1e-5)
    assert_close(evaluated.loss, stock_evaluated.loss, 1e-5)
    assert torch.equal(evaluated.logits[:, :-1], stock_evaluated.logits.argmax(-1)[:, :-1])


def test_tensor_parallelism_of_transformers(two, tmp_path):
    """Its `tp_plan="auto"`: the layer has a DTensor for its weight, and a forward of its own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    two.run(rank_tensor_parallel, str(tmp_path))
