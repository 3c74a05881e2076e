"""Megatron-Core on two CPU processes: its output layer, its losses and its GPT, beside ours.

Megatron asks for the current CUDA device and its random numbers where a CPU has neither: in the
processes of these tests, the device is the CPU, and dropout is off.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from llmloss_ext.integrations import megatron as ours

pytest.importorskip("megatron")  # its core takes seconds, and is needed in the ranks only

SEQUENCE, BATCH, WIDTH, VOCAB = 8, 3, 16, 64
CLOSE = {"rtol": 1e-4, "atol": 5e-6}


def megatron(tensor_parallel: int):
    """The library, with so many ranks in each tensor-parallel group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformer Engine and Apex
        core = importlib.import_module("megatron.core")
        for name in ("models.gpt.gpt_layer_specs", "models.gpt", "tensor_parallel", "distributed",
                     "fusions.fused_cross_entropy"):  # fmt: skip
            importlib.import_module(f"megatron.core.{name}")
    torch.cuda.current_device = lambda: "cpu"
    core.tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    core.parallel_state.destroy_model_parallel()
    core.parallel_state.initialize_model_parallel(tensor_parallel)
    return core


def config_of(core, **options):
    return core.transformer.TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=2, attention_dropout=0.0,
        hidden_dropout=0.0, use_cpu_initialization=True, **options,
    )  # fmt: skip


# ------------------------------------------------------------------------------- from logits


def rank_logits(rank, ranks):
    core = megatron(ranks)
    group = core.parallel_state.get_tensor_model_parallel_group()
    logits = 3 * torch.randn(SEQUENCE, BATCH, VOCAB)
    target = torch.randint(VOCAB, (SEQUENCE, BATCH))
    upstream = torch.rand(SEQUENCE, BATCH)
    for dtype in (torch.float32, torch.bfloat16):
        mine = logits.chunk(ranks, -1)[rank].to(dtype)
        losses, grads = [], []
        for function in (
            core.tensor_parallel.vocab_parallel_cross_entropy,
            ours.vocab_parallel_cross_entropy,
            lambda x, y: ours.fused_vocab_parallel_cross_entropy(x, y, group),
        ):
            x = mine.clone().requires_grad_()
            losses.append(function(x * 1, target))  # Megatron's writes over float32 logits
            losses[-1].backward(upstream)
            grads.append(x.grad)
        for loss, grad in zip(losses[1:], grads[1:], strict=True):
            assert loss.dtype == losses[0].dtype == torch.float32
            assert_close(loss, losses[0], **CLOSE)
            assert_close(grad, grads[0], rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-6)


def test_from_logits(two):
    two.run(rank_logits)


def rank_smoothing(rank, ranks):
    """Of several ranks as of one: there Megatron's own differ from rank to rank."""
    core = megatron(1)
    whole = torch.randn(SEQUENCE, BATCH, VOCAB, requires_grad=True)
    target = torch.randint(VOCAB, (SEQUENCE, BATCH))
    theirs = core.tensor_parallel.vocab_parallel_cross_entropy(whole * 1, target, 0.1)
    theirs.sum().backward()
    assert_close(ours.vocab_parallel_cross_entropy(whole, target, 0.1), theirs, **CLOSE)
    mine = whole.detach().chunk(ranks, -1)[rank].clone().requires_grad_()
    loss = ours.vocab_parallel_cross_entropy(mine, target, 0.1, tp_group=dist.group.WORLD)
    loss.sum().backward()
    assert_close(loss, theirs, **CLOSE)
    assert_close(mine.grad, whole.grad.chunk(ranks, -1)[rank], **CLOSE)
    hidden, weight = torch.randn(SEQUENCE * BATCH, WIDTH), torch.randn(VOCAB, WIDTH)
    logits = (hidden @ weight.t()).view(SEQUENCE, BATCH, VOCAB)
    theirs = core.tensor_parallel.vocab_parallel_cross_entropy(logits * 1, target, 0.1)
    loss = ours.linear_cross_entropy(
        hidden, weight.chunk(ranks)[rank], target, dist.group.WORLD, "none", label_smoothing=0.1
    )
    assert_close(loss, theirs.view(-1), **CLOSE)
    assert (ours.vocab_parallel_cross_entropy(whole, torch.full_like(target, -100)) == 0).all()


def test_label_smoothing(two):
    two.run(rank_smoothing)


# ------------------------------------------------------------------------ the output layer


def rank_output_layer(rank, ranks, sequence_parallel, reduction, main_grad, dtype=torch.float32):
    core = megatron(ranks)
    config = config_of(
        core, tensor_model_parallel_size=ranks, sequence_parallel=sequence_parallel,
        params_dtype=dtype,
    )  # fmt: skip
    layer = core.tensor_parallel.ColumnParallelLinear(
        WIDTH, VOCAB, config=config, init_method=torch.nn.init.normal_, bias=False
    )
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH).to(dtype)
    mine = hidden.chunk(ranks)[rank] if sequence_parallel else hidden
    labels = torch.randint(VOCAB, (SEQUENCE, BATCH))
    ignored = labels % 3 == 0 if reduction != "none" else torch.zeros_like(labels, dtype=bool)
    upstream = torch.rand(SEQUENCE, BATCH)

    theirs = mine.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CUDA_DEVICE_MAX_CONNECTIONS
        logits, _ = layer(theirs)
    expected = core.tensor_parallel.vocab_parallel_cross_entropy(logits, labels)
    if reduction != "none":
        expected = expected[~ignored].sum() / (1 if reduction == "sum" else (~ignored).sum())
    expected.backward(upstream if reduction == "none" else torch.tensor(0.7))
    weight_grad, layer.weight.grad = layer.weight.grad, None

    if main_grad:
        layer.weight.main_grad = torch.ones_like(layer.weight, dtype=torch.float32)
        layer.weight.grad_added_to_main_grad = False
        layer.weight.zero_out_wgrad = True
    here = mine.clone().requires_grad_()
    loss = ours.linear_cross_entropy(
        here, layer.weight, labels.masked_fill(ignored, -1), layer.tp_group, reduction, -1,
        sequence_parallel, gradient_accumulation_fusion=main_grad, max_chunk_bytes=1024,
    )  # fmt: skip
    assert loss.shape == (() if reduction != "none" else (SEQUENCE * BATCH,))
    loss.backward(upstream.view(-1) if reduction == "none" else torch.tensor(0.7))
    close = CLOSE if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    assert_close(loss.view(expected.shape), expected, **close)
    assert_close(here.grad, theirs.grad, **close)
    grad = layer.weight.grad
    if main_grad:
        assert layer.weight.grad_added_to_main_grad
        assert not grad.any()
        grad = layer.weight.main_grad - 1
    assert_close(grad, weight_grad.to(grad.dtype), **close)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_output_layer(two, sequence_parallel, reduction):
    two.run(rank_output_layer, sequence_parallel, reduction, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad(two, dtype):
    two.run(rank_output_layer, True, "none", True, dtype)


# --------------------------------------------------------------------------------- the model


class Norm(torch.nn.LayerNorm):
    """As Megatron has it: its wrapper of torch's refuses sequence parallelism."""

    def __init__(self, config, hidden_size, eps):
        super().__init__(hidden_size, eps)


def gpt(core, ranks, *, shared=False, mtp=None, **options):
    config = config_of(
        core, tensor_model_parallel_size=ranks, mtp_num_layers=mtp, add_bias_linear=False, **options
    )
    specs = core.models.gpt.gpt_layer_specs
    spec = specs.get_gpt_layer_local_spec()
    more = {}
    if mtp:
        more["mtp_block_spec"] = specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=False
        )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    blocks = core.transformer.transformer_block.TransformerBlockSubmodules([spec], Norm)
    return core.models.gpt.GPTModel(
        config, blocks, VOCAB, SEQUENCE, share_embeddings_and_output_weights=shared, **more
    )


def step(model):
    """The losses of a batch, after their backward."""
    ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) * 7 % VOCAB
    where = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    loss = model(ids, where, mask, labels=ids.roll(-1, 1))
    (loss * (1 + ids % 3)).sum().backward()
    return loss.detach()


def rank_model(rank, ranks, options):
    core = megatron(ranks)
    stock = gpt(core, ranks, **options)
    model = gpt(core, ranks, **options)
    model.load_state_dict(stock.state_dict())
    calls = []
    project = model.output_layer._forward_impl

    def count_and_project(*args, **kwargs):
        calls.append("logits")
        return project(*args, **kwargs)

    model.output_layer._forward_impl = count_and_project
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CUDA_DEVICE_MAX_CONNECTIONS
        expected = step(stock)
        for use in (ours.use_linear_cross_entropy, ours.use_cross_entropy, ours.stop_cross_entropy):
            use(model)
            model.zero_grad()
            assert_close(step(model), expected, **CLOSE)
            for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
                assert_close(p.grad, q.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
            calls.append(use.__name__)
    made = ["logits"] * (1 + (options.get("mtp") or 0))
    assert calls == ["use_linear_cross_entropy", *made, "use_cross_entropy", *made,
                     "stop_cross_entropy"]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True}, {"shared": True}, {"mtp": 1}],
    ids=["plain", "sequence_parallel", "shared", "mtp"],
)
def test_a_model(two, options):
    two.run(rank_model, options)


def rank_distributed(rank, ranks, shared):
    """Megatron's DistributedDataParallel, whose hooks wait for each gradient."""
    core = megatron(1)
    stock = gpt(core, 1, shared=shared)
    how = core.distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=False
    )
    results = []
    for patched in (False, True):
        model = gpt(core, 1, shared=shared)
        model.load_state_dict(stock.state_dict())
        if patched:
            ours.use_linear_cross_entropy(model, max_chunk_bytes=1024)
            model.output_layer.gradient_accumulation_fusion = True
        wrapped = core.distributed.DistributedDataParallel(model.config, how, model)
        for micro_batch in range(2):
            with wrapped.no_sync() if micro_batch == 0 else contextlib.nullcontext():
                step(wrapped)
        wrapped.finish_grad_sync()
        added = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
        assert added.grad_added_to_main_grad == patched
        results.append({n: p.main_grad.clone() for n, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert_close(results[1][name], grad, **CLOSE)


@pytest.mark.parametrize("shared", [False, True])
def test_data_parallel(two, shared):
    two.run(rank_distributed, shared)


def rank_refusals(rank, ranks):
    core = megatron(ranks)
    model = gpt(core, ranks)
    ours.use_linear_cross_entropy(model)
    model.output_layer.register_forward_hook(lambda *a: (a[-1][0] * 2, None))
    with pytest.raises(ValueError, match="changes its logits"):
        step(model)
    ours.stop_cross_entropy(model)
    assert not {"_postprocess", "compute_language_model_loss"} & vars(model).keys()
    model.output_layer.gather_output = True
    with pytest.raises(ValueError, match="makes no logits"):
        ours.use_linear_cross_entropy(model)
    with pytest.raises(ValueError, match="needs a GPTModel"):
        ours.use_linear_cross_entropy(model.output_layer)
    with pytest.raises(ValueError, match="has no compute_language_model_loss"):
        ours.use_cross_entropy(model.output_layer)


def test_refusals(two):
    two.run(rank_refusals)


def test_another_version(monkeypatch):
    monkeypatch.setattr(ours, "_VERSION", "0.1")
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.\S+ is not known to work here, only"):
        ours.use_cross_entropy(object())
