"""verl's log-probabilities and entropies: its module, its models' forward, its kernel's contract.

Of verl, only the files that compute are imported: the package itself wants Ray. Its Triton kernel
needs a GPU, and is imitated by torch.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from llmloss_ext.integrations import verl as ours

if importlib.util.find_spec("verl") is None:
    pytest.skip("could not import 'verl'", allow_module_level=True)

TOKENS, WIDTH, VOCAB = 11, 16, 40
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


class WithoutLiger:
    """Finds what there would be if Liger were not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "liger_kernel":
            raise ModuleNotFoundError(f"No module named {name!r}", name="liger_kernel")


@pytest.fixture
def verl(monkeypatch):
    """Its packages, without what they import on their own."""
    (where,) = importlib.util.find_spec("verl").submodule_search_locations
    for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel",
                 "verl.models", "verl.models.transformers", "verl.models.mcore"):  # fmt: skip
        package = types.ModuleType(name)
        package.__path__ = [where + name.removeprefix("verl").replace(".", "/")]
        monkeypatch.setitem(sys.modules, name, package)
    # verl asks for Liger, and not whether the Triton of its kernels is there.
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [WithoutLiger, *sys.meta_path])
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, name)


def results_of(function, shape, dtype=torch.float32, **options):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).to(dtype).requires_grad_()
    log_probs, entropy = function(hidden, weight, torch.randint(VOCAB, shape), **options)
    loss = (log_probs * torch.rand(shape)).sum() + (entropy * torch.rand(shape)).sum()
    loss.backward()
    return [log_probs.detach(), entropy.detach().float(), hidden.grad, weight.grad]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(TOKENS,), (2, 5)])
def test_the_module(verl, shape, temperature):
    theirs = verl("verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=4)
    wanted = results_of(theirs, shape, temperature=temperature)
    module = ours.FusedLinearForPPO(4, impl_backend="liger")
    assert_close(results_of(module, shape, temperature=temperature), wanted, **CLOSE)
    rough = results_of(module, shape, torch.bfloat16, temperature=temperature)
    for got, want in zip(rough, wanted, strict=True):
        assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_float32_logits():
    """Asked for once, for every call of the process."""
    hidden, weight = torch.randn(TOKENS, 64).bfloat16(), torch.randn(VOCAB, 64).bfloat16()
    labels = torch.randint(VOCAB, (TOKENS,))
    exact, _ = imitated(hidden.double(), weight.double(), labels, 0.7, "none")

    def error():
        found = (
            ours.FusedLinearForPPO()(hidden, weight, labels, temperature=0.7)[0],
            ours.linear_cross_entropy(hidden, weight, labels, temperature=0.7)[0],
        )
        return [float((x - exact).abs().max()) for x in found]

    assert min(error()) > 1e-3
    ours.FusedLinearForPPO.logits_dtype = torch.float32
    try:
        assert max(error()) < 1e-4
    finally:
        ours.stop_linear_cross_entropy()
    assert min(error()) > 1e-3


def imitated(hidden, weight, labels, temperature, reduction):
    """What verl's Triton kernel computes."""
    logits = hidden.flatten(0, -2) @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    every = logits.log_softmax(-1)
    log_probs = every.gather(-1, labels.reshape(-1, 1)).squeeze(-1)
    entropy = -(every.exp() * every).sum(-1)
    return getattr(log_probs, reduction)() if reduction != "none" else log_probs, entropy


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_function(reduction):
    torch.manual_seed(0)
    results = []
    for function in (imitated, ours.linear_cross_entropy):
        torch.manual_seed(0)
        hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
        weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
        log_probs, entropy = function(hidden, weight, torch.randint(VOCAB, (2, 3)), 0.7, reduction)
        (log_probs.sum() + (entropy * torch.arange(6)).sum()).backward()
        results.append([log_probs.detach(), entropy.detach(), hidden.grad, weight.grad])
    assert_close(results[1], results[0], **CLOSE)


def rank_function(rank, ranks, sum_input_grad):
    hidden, labels = torch.randn(TOKENS, WIDTH), torch.randint(VOCAB, (TOKENS,))
    weight = torch.randn(VOCAB, WIDTH)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    mine = [hidden.clone().requires_grad_(), weight.chunk(ranks)[rank].clone().requires_grad_()]
    wanted = imitated(*whole, labels, 1.3, "none")
    got = ours.linear_cross_entropy(
        *mine, labels, 1.3, "none", dist.group.WORLD, sum_input_grad=sum_input_grad
    )
    for values in (wanted, got):
        (values[0] * labels + values[1]).sum().backward()
        assert_close(values, wanted, **CLOSE)
    if not sum_input_grad:
        dist.all_reduce(mine[0].grad)
    assert_close(mine[0].grad, whole[0].grad, **CLOSE)
    assert_close(mine[1].grad, whole[1].grad.chunk(ranks)[rank], **CLOSE)


@pytest.mark.parametrize("sum_input_grad", [False, True])
def test_over_ranks(two, sum_input_grad):
    two.run(rank_function, sum_input_grad)


def test_a_model(verl, monkeypatch):
    """A Llama with the forward that verl gives it for either backend."""
    import transformers

    common = verl("verl.models.transformers.dense_common")
    importer = types.ModuleType("verl.models.mcore.model_forward_fused")
    kernel = verl("verl.utils.kernel.linear_cross_entropy")
    importer.linear_cross_entropy = kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, importer.__name__, importer)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(3, VOCAB, (2, 7))
    results = []
    for forward, is_ours in (
        (common.forward_with_torch_backend, False),
        (common.forward_with_torch_backend, True),
        (common.forward_with_triton_backend, True),
    ):
        if is_ours:
            ours.use_linear_cross_entropy()
            assert importer.linear_cross_entropy is ours.linear_cross_entropy
        model.zero_grad()
        output = forward(model, input_ids=ids, return_dict=True, temperature=0.8)
        log_probs, entropy = output.log_probs.view(2, 7), output.entropy.view(2, 7)
        (log_probs[:, :-1].sum() + 0.1 * entropy.sum()).backward()
        grads = [p.grad for p in model.parameters()]
        results.append([log_probs.detach(), entropy.detach(), *grads])
    ours.stop_linear_cross_entropy()
    assert importer.linear_cross_entropy is not ours.linear_cross_entropy
    module = verl("verl.utils.experimental.torch_functional")
    assert module.FusedLinearForPPO is not ours.FusedLinearForPPO
    for other in results[1:]:
        assert_close(other, results[0], **CLOSE)


def test_refusals():
    with pytest.raises(ValueError, match='must be "torch" or "liger"'):
        ours.FusedLinearForPPO(impl_backend="triton")
    with pytest.raises(ValueError, match="Invalid reduction: max"):
        ours.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(),
                                  reduction="max")  # fmt: skip
