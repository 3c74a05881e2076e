"""What stands for TRL's functions: its values and gradients, and every name that is bound to it.

The trainers themselves are in test_trl_trainers.py.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import assert_close

from frameworks.models import VOCAB, batch_of, tiny_llama, uncompiled_deepspeed

trl = pytest.importorskip("trl")

from trl.trainer import utils  # noqa: E402

from llmloss_ext.integrations import trl as integration  # noqa: E402
from llmloss_ext.integrations.trl import stop_llmloss, use_llmloss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and datasets

NAMES = (
    "_ChunkedLogProbFunction", "selective_log_softmax", "entropy_from_logits",
    "selective_log_softmax_and_entropy",
)  # fmt: skip
# Not as names of this module: these would become ours as well.
STOCK = types.SimpleNamespace(**{name: getattr(utils, name) for name in NAMES})
N, D = 6, 16
TILE = 16  # of the vocabulary, in TRL's own function
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def ours():
    use_llmloss()
    yield utils
    stop_llmloss()


# ----------------------------------------------------------------------------- from hidden states


def problem(dtype=torch.float32, weight_dtype=None, bias=True):
    """Hidden states, weight, bias and targets, half of which are the predicted class."""
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype)
    weight = torch.randn(VOCAB, D).to(weight_dtype or dtype)
    b = torch.randn(VOCAB).to(weight.dtype) if bias else None
    logits = hidden.float() @ weight.float().T + (0 if b is None else b.float())
    targets = torch.where(torch.arange(N) % 2 == 1, logits.argmax(-1), torch.arange(N))
    return hidden, weight, b, targets


def applied(function, inputs, temperature=1.0, softcap=None, scale=1.0, outputs=ALL):
    """What a function returns, and the gradients of what is differentiable in it."""
    *floats, targets = inputs
    leaves = [None if x is None else x.clone().requires_grad_() for x in floats]
    results = function.apply(*leaves, targets, temperature, TILE, softcap, scale, outputs)
    torch.manual_seed(1)
    differentiable = [x for x in results if x is not None and x.requires_grad]
    upstream = [torch.randn_like(x) for x in differentiable]
    given = [x for x in leaves if x is not None]
    return results, torch.autograd.grad(differentiable, given, upstream)


def check_same(found, expected, tolerance=1e-5):
    (results, gradients), (stock, their_gradients) = found, expected
    for one, other in zip(results, stock, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert one.requires_grad == other.requires_grad
            assert one.dtype == other.dtype
            assert_close(one.detach(), other.detach(), tolerance)
    for one, other in zip(gradients, their_gradients, strict=True):
        assert one.dtype == other.dtype
        size = other.abs().max()
        assert_close(one / size, other / size, tolerance)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics(ours, softcap, scale, temperature):
    options = (temperature, softcap, scale)
    found = applied(ours._ChunkedLogProbFunction, problem(), *options)
    expected = applied(STOCK._ChunkedLogProbFunction, problem(), *options)
    check_same(found, expected)
    assert 0 < found[0].is_top1.sum() < N


@pytest.mark.parametrize("outputs", [("log_probs",), *((name,) for name in ALL[1:]), ALL[:2], ()])
def test_what_is_asked_for(ours, outputs):
    both = ours._ChunkedLogProbFunction, STOCK._ChunkedLogProbFunction
    check_same(*(applied(f, problem(bias=False), outputs=outputs) for f in both))


def test_without_asking(ours):
    """TRL's defaults: everything, of logits as they are."""
    hidden, weight, bias, targets = problem()
    found = ours._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, TILE)
    expected = STOCK._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, TILE)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "mixed"])
def test_dtypes(ours, case):
    """16 bits; autocast; and a weight of another dtype, which TRL converts."""
    dtypes = {
        "bfloat16": (torch.bfloat16, None), "autocast": (torch.float32, None),
        "mixed": (torch.float32, torch.bfloat16),
    }  # fmt: skip
    context = torch.autocast("cpu", torch.bfloat16) if case == "autocast" else nullcontext()
    with context:
        both = ours._ChunkedLogProbFunction, STOCK._ChunkedLogProbFunction
        results = [applied(f, problem(*dtypes[case]), 0.7, 3.0) for f in both]
    check_same(*results, 2e-2)


def test_no_token(ours):
    """A micro-batch whose labels are all masked."""
    hidden, weight, bias, targets = problem()
    empty = (hidden[:0], weight, bias, targets[:0])
    (log_probs, *_), gradients = applied(ours._ChunkedLogProbFunction, empty)
    assert log_probs.shape == (0,)
    assert all(not gradient.any() for gradient in gradients)


def test_float32_logits():
    """TRL's own, of float64 operands, to 1e-4 nats; also where the weight has another dtype."""
    for weight_dtype in (torch.bfloat16, torch.float32):
        operands = problem(torch.bfloat16, weight_dtype, bias=False)
        (exact, *_), _ = applied(
            STOCK._ChunkedLogProbFunction, (operands[0].float(), operands[1].float(), *operands[2:])
        )
        use_llmloss(logits_dtype=torch.float32)
        (log_probs, *_), gradients = applied(utils._ChunkedLogProbFunction, operands)
        stop_llmloss()
        assert (log_probs - exact).abs().max() < 1e-4
        assert [g.dtype for g in gradients[:2]] == [torch.bfloat16, weight_dtype]


def test_small_chunks():
    """The memory that a user allows is kept to, and changes nothing."""
    row_bytes = 256  # of VOCAB floats, aligned
    with mock.patch.object(integration, "linear_token_stats", wraps=integration.linear_token_stats):
        use_llmloss(max_chunk_bytes=2 * row_bytes)
        found = applied(utils._ChunkedLogProbFunction, problem())
        assert integration.linear_token_stats.call_args.kwargs["max_chunk_bytes"] == 2 * row_bytes
    stop_llmloss()
    check_same(found, applied(STOCK._ChunkedLogProbFunction, problem()))
    use_llmloss(max_chunk_bytes=1)
    with pytest.raises(ValueError, match="max_chunk_bytes must be at least"):
        applied(utils._ChunkedLogProbFunction, problem())
    stop_llmloss()


def head_step(model, **changes):
    output = model(**batch_of(seed=3) | changes, fused_lm_head=True)
    (output.loss - 0.1 * output.entropy.mean()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return output, gradients


def test_compiled(ours):
    model = tiny_llama()
    utils.add_fused_lm_head(model, temperature=0.7, outputs=ALL)
    expected, gradients = head_step(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(**batch_of(seed=3), fused_lm_head=True)
    (output.loss - 0.1 * output.entropy.mean()).backward()
    for name in ALL:
        assert_close(output[name].detach(), expected[name].detach(), 1e-5)
    for name, p in model.named_parameters():
        assert_close(p.grad, gradients[name], 1e-5)


# ------------------------------------------------------------------------------------ from logits


def values_and_gradients(function, logits, *args, **options):
    x = logits.clone().requires_grad_()
    results = function(x, *args, **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    used = [r for r in results if r.requires_grad]
    (gradient,) = torch.autograd.grad(used, x, [torch.randn_like(r) for r in used])
    return [r.detach() for r in results], [r.requires_grad for r in results], gradient


def check_same_function(name, *args, tolerance=1e-5, **options):
    found = values_and_gradients(getattr(utils, name), *args, **options)
    expected = values_and_gradients(getattr(STOCK, name), *args, **options)
    assert found[1] == expected[1]
    for one, other in zip([*found[0], found[2]], [*expected[0], expected[2]], strict=True):
        assert one.shape == other.shape
        assert_close(one, other, tolerance)


LOGITS = (3 * torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0)),)
INDEX = torch.arange(10).reshape(2, 5)
MASK = INDEX % 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mask", [None, MASK, MASK > 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_of_logits(ours, temperature, mask, dtype):
    options = {"temperature": temperature, "row_mask": mask}
    logits = LOGITS[0].to(dtype)
    check_same_function("selective_log_softmax", logits, INDEX, **options)
    check_same_function("selective_log_softmax", logits[:, :, 3:], INDEX, **options)
    square = logits[:, :, :5]  # a sequence as long as the vocabulary
    check_same_function("selective_log_softmax", square, INDEX % 5, **options)
    both = "selective_log_softmax_and_entropy"
    for needs in (True, False):
        check_same_function(both, logits, INDEX, needs, **options)


def test_log_probs_of_many_classes(ours):
    index = torch.randint(0, VOCAB, (2, 5, 3))
    mask = (torch.arange(30) % 4).reshape(2, 5, 3)
    for options in ({}, {"temperature": 0.7}, {"row_mask": mask}):
        check_same_function("selective_log_softmax", *LOGITS, index, **options)


def test_entropy_of_logits(ours):
    check_same_function("entropy_from_logits", *LOGITS)
    check_same_function("entropy_from_logits", LOGITS[0][0], chunk_size=2)


def test_16_bits(ours):
    """Log-probabilities that are not rounded to the logits' dtype, unlike those of TRL on a CPU."""
    logits = LOGITS[0].bfloat16()
    exact = STOCK.selective_log_softmax(logits.float(), INDEX)
    found = utils.selective_log_softmax(logits, INDEX)
    assert found.dtype == torch.float32
    assert_close(found, exact, 1e-5)
    assert (STOCK.selective_log_softmax(logits, INDEX) - exact).abs().max() > 1e-3
    assert_close(utils.entropy_from_logits(logits), STOCK.entropy_from_logits(logits.float()), 1e-5)


def test_errors(ours):
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        with pytest.raises(ValueError, match="temperature must be positive"):
            getattr(utils, name)(*LOGITS, INDEX, temperature=0.0)
        with pytest.raises(IndexError, match="Target -100 "):
            getattr(utils, name)(*LOGITS, INDEX - 100, row_mask=torch.ones_like(INDEX))
        # A row that is masked is not read, whatever its index.
        result = getattr(utils, name)(*LOGITS, INDEX - 100, row_mask=torch.zeros_like(INDEX))
        assert not any(x.any() for x in (result if isinstance(result, tuple) else (result,)))


# ---------------------------------------------------------------------------------- bound by name


def importers():
    """The modules of TRL that import one of the names, by their source."""
    root = Path(trl.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if alias.name in (*NAMES, "ChunkedLogProbFunction"):
                    module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
                    yield module.removesuffix(".__init__"), alias.asname or alias.name


IMPORTERS = sorted(set(importers()))


def test_who_imports_them():
    modules = {module.split(".")[-1].removesuffix("_trainer") for module, _ in IMPORTERS}
    assert {"utils", "kernels", "orpo", "cpo", "tpo", "sdpo", "sdft", "a2po"} <= modules


@pytest.mark.parametrize("imported_first", [True, False])
def test_every_name(monkeypatch, imported_first):
    """Ours while in use, and TRL's again after it, whenever the module was imported."""
    every = [(module, name) for module, name in IMPORTERS if "experimental" in module]
    every += [("trl.trainer.utils", name) for name in NAMES]
    for module, _ in every:
        if imported_first:
            importlib.import_module(module)
        elif "experimental" in module:
            monkeypatch.delitem(sys.modules, module, raising=False)
    use_llmloss()
    try:
        for module, name in every:
            found = getattr(importlib.import_module(module), name)
            assert getattr(found, "__module__", "") == integration.__name__, (module, name)
    finally:
        stop_llmloss()
    for module, name in every:
        found = getattr(importlib.import_module(module), name)
        assert found is getattr(STOCK, name), (module, name)
    assert trl.kernels.ChunkedLogProbFunction is STOCK._ChunkedLogProbFunction
    assert integration._selective_log_softmax.__module__ == integration.__name__


def test_a_users_module(monkeypatch):
    """A name of the user's own, and a second use; what was not used is not undone."""
    module = types.ModuleType("mine")
    module.log_probs = utils.selective_log_softmax
    monkeypatch.setitem(sys.modules, "mine", module)
    stop_llmloss()
    assert module.log_probs is STOCK.selective_log_softmax
    use_llmloss()
    use_llmloss()
    assert module.log_probs is integration._selective_log_softmax
    stop_llmloss()
    stop_llmloss()
    assert module.log_probs is STOCK.selective_log_softmax
    assert utils._ChunkedLogProbFunction is STOCK._ChunkedLogProbFunction


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "1.160.0", "unknown"])
def test_another_version(monkeypatch, version):
    monkeypatch.setattr("llmloss_ext.integrations.versions.version", lambda _package: version)
    with pytest.raises(RuntimeError, match=rf"^trl {version} is not known .*, only 1\.16$"):
        use_llmloss()
    assert utils._ChunkedLogProbFunction is STOCK._ChunkedLogProbFunction


# ---------------------------------------------------------------------------------------- ZeRO-3


def test_a_weight_that_is_let_go(ours, monkeypatch):
    """ZeRO-3's contract with TRL: whole inside of `maybe_gather_lm_head_ctx`, empty outside."""
    hidden, weight, bias, targets = problem()
    expected = applied(STOCK._ChunkedLogProbFunction, (hidden, weight, bias, targets))
    whole = {}

    @contextmanager
    def gathered(*parameters):
        for p in parameters:
            p.data = whole[id(p)]
        yield
        for p in parameters:
            p.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    for p in leaves[1:]:
        p.ds_status = "NOT_AVAILABLE"
        whole[id(p)] = p.detach().clone()
    with gathered(*leaves[1:]):
        results = ours._ChunkedLogProbFunction.apply(*leaves, targets, 1.0, TILE)
    torch.manual_seed(1)
    upstream = [torch.randn_like(x) for x in results[:2]]
    assert leaves[1].shape == (0,)
    edges = [torch.autograd.graph.get_gradient_edge(x) for x in leaves]
    found = torch.autograd.grad(results[:2], edges, upstream)
    assert leaves[1].shape == (0,)
    check_same((results, found), expected)


def rank_zero3(rank, ranks):
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    os.environ["LOCAL_RANK"] = str(rank)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {  # no weight stays whole after its use
            "stage": 3, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    known = HfDeepSpeedConfig(config)  # as long as it lives, TRL gathers weights
    results = []
    for is_ours in (False, True):
        model = tiny_llama()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with uncompiled_deepspeed():
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        theirs = STOCK._ChunkedLogProbFunction
        refused = mock.patch.object(theirs, "forward", side_effect=AssertionError)
        if is_ours:
            use_llmloss()
        with refused if is_ours else nullcontext():
            for step in range(2):
                output = engine(**batch_of(seed=2 * step + rank), fused_lm_head=True)
                assert model.lm_head.weight.shape == (0,)
                engine.backward(output.loss - 0.1 * output.entropy.mean())
                engine.step()
        stop_llmloss()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            moved = {name: p.detach() - start[name] for name, p in model.named_parameters()}
        results.append((output.loss.detach(), moved))
        engine.destroy()
    del known
    (stock_loss, expected), (loss, moved) = results
    assert_close(loss, stock_loss, 1e-5)
    for name, change in moved.items():
        assert change.any(), name
        assert_close(change, expected[name], 1e-5)


def test_zero3(two):
    """Two processes, each of which holds half of every weight."""
    pytest.importorskip("deepspeed")
    two.run(rank_zero3)
