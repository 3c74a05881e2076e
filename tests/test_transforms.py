"""Higher orders, torch.func, torch.compile, opcheck, autocast, checkpointing, pickling, threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import reference
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import assert_close
from torch.utils.checkpoint import checkpoint

import llmloss_ext
from llmloss_ext import cross_entropy, token_stats
from llmloss_ext.options import MEAN, LogitOptions, LossOptions, pack
from llmloss_ext.statistics import STATISTICS, FloatStats, asked

DOUBLE = torch.float64
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "none", "z_loss": 0.1},
    {"focal_gamma": 1.5, "label_smoothing": 0.1},
    {"softcap": 3.0, "logit_scale": 1.4, "vocab_size": 11, "label_smoothing": 0.1},
    {"softcap": 3.0, "temperature": 0.7},
]
BY_NAME = {"ids": lambda o: "+".join(o) or "plain"}


def make(device, shape=(5, 13)):
    input = torch.randn(shape, dtype=DOUBLE, device=device)
    target = torch.randint(0, 11, shape[:-1], device=device)
    target.view(-1)[1] = -100
    return input, target


@pytest.mark.parametrize("options", OPTIONS, **BY_NAME)
def test_gradcheck_to_second_order(device, options):
    input, target = make(device)
    scale = torch.tensor(1.2, dtype=DOUBLE, device=device, requires_grad=True)
    options = {**options, "logit_scale": scale}

    def loss(x, s):
        return cross_entropy(x, target, **{**options, "logit_scale": s})

    inputs = (input.requires_grad_(), scale)
    assert torch.autograd.gradcheck(loss, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, check_backward_ad=False)


def test_gradcheck_of_probability_targets(device):
    input, _ = make(device)
    target = torch.softmax(torch.randn_like(input), -1).requires_grad_()
    weight = torch.rand(13, dtype=DOUBLE, device=device)

    def loss(x, q):
        return cross_entropy(x, q, label_smoothing=0.1, weight=weight)

    inputs = (input.requires_grad_(), target)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 13)])
def test_gradcheck_of_statistics(device, shape):
    input, target = make(device, shape)
    scale = torch.tensor(1.2, dtype=DOUBLE, device=device, requires_grad=True)
    weight = torch.rand(13, dtype=DOUBLE, device=device)

    def stats(x, s):
        stats = token_stats(
            x, target, logit_scale=s, softcap=4.0, weight=weight, extra=("log_sum_sq_probs",)
        )
        return (*stats[:4], stats.log_sum_sq_probs)

    inputs = (input.requires_grad_(), scale)
    assert torch.autograd.gradcheck(stats, inputs)
    assert torch.autograd.gradgradcheck(stats, inputs)
    assert torch.autograd.gradcheck(stats, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("options", OPTIONS, **BY_NAME)
def test_torch_func(device, options):
    input, target = make(device)

    def ours(x):
        return cross_entropy(x, target, **options).sum()

    def other(x):
        return reference.cross_entropy(x, target, **options).sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        assert_close(transform(ours)(input), transform(other)(input), 1e-10)
    third = torch.func.grad(lambda x: torch.func.hessian(ours)(x).square().sum())
    wanted = torch.func.grad(lambda x: torch.func.hessian(other)(x).square().sum())
    assert_close(third(input), wanted(input), 1e-9)


@pytest.mark.parametrize("options", OPTIONS, **BY_NAME)
@pytest.mark.parametrize("shape", [(3, 5, 13), (3, 2, 4, 13)])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_vmap(device, options, shape, in_dims):
    input, target = make(device, shape)
    if in_dims == (0, None):
        target = target[0]
    if in_dims == (None, 0):
        input = input[0]
    if in_dims == (2, 1):
        input, target = input.movedim(0, 2), target.movedim(0, 1)
    for transform in (lambda f: f, torch.func.grad):
        actual = torch.vmap(
            transform(lambda x, t: cross_entropy(x, t, **options).sum()), in_dims=in_dims
        )
        wanted = torch.vmap(
            transform(lambda x, t: reference.cross_entropy(x, t, **options).sum()), in_dims=in_dims
        )
        assert_close(actual(input, target), wanted(input, target), 1e-10)


def test_vmap_over_every_tensor(device):
    input, target = make(device, (3, 5, 13))
    weight = torch.rand(3, 13, dtype=DOUBLE, device=device)
    tokens = torch.rand(3, 5, dtype=DOUBLE, device=device)
    probabilities = torch.softmax(torch.randn_like(input), -1)

    def each(function, *tensors):
        return torch.stack([function(*(t[i] for t in tensors)) for i in range(3)])

    cases = [
        (lambda x, t, w: cross_entropy(x, t, weight=w), (input, target, weight)),
        (lambda x, t, w: cross_entropy(x, t, token_weight=w), (input, target, tokens)),
        (lambda x, s: cross_entropy(x, target[0], logit_scale=s), (input, weight[:, 0])),
        (lambda x, q: cross_entropy(x, q, label_smoothing=0.1), (input, probabilities)),
        (lambda x, t: cross_entropy(x, t, num_items=7), (input, target)),
        (lambda x, t: token_stats(x, t).entropy, (input, target)),
        (lambda x, t: token_stats(x, t, with_rank=True).rank, (input, target)),
        (lambda x, w: token_stats(x, target[0], weight=w).mean_log_prob, (input, weight)),
    ]
    for function, tensors in cases:
        assert_close(torch.vmap(function)(*tensors), each(function, *tensors), 1e-13)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS, {"inplace": True}, {"num_items": 9}], **BY_NAME)
def test_compile(device, dynamic, options):
    torch._dynamo.reset()
    options = dict(options)
    inplace = options.pop("inplace", False)

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def loss(x, t):
        return cross_entropy(x * 2.0, t, **options, inplace=inplace)

    for rows, columns in ((5, 13), (8, 17)):
        input, target = make(device, (rows, columns))
        leaf, other = input.clone().requires_grad_(), input.clone().requires_grad_()
        value = loss(leaf, target)
        expected = reference.cross_entropy(other * 2.0, target, **options)
        assert_close(value, expected, 1e-12)
        upstream = torch.rand_like(value)
        value.backward(upstream)
        expected.backward(upstream)
        assert_close(leaf.grad, other.grad, 1e-12)


def test_compiled_backward_runs_the_kernel(device):
    """Not the composite arithmetic, which keeps copies of the logits."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, _inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiler = torch._dynamo.backends.common.aot_autograd(fw_compiler=backend, bw_compiler=backend)
    input, target = make(device)
    leaf = input.requires_grad_()
    torch.compile(lambda x: cross_entropy(x, target), backend=compiler)(leaf).backward()
    assert any("llmloss.cross_entropy_backward" in name for name in seen)
    assert not any("exp" in name and "expand" not in name for name in seen)


def test_compile_statistics(device):
    torch._dynamo.reset()
    input, target = make(device)
    input.requires_grad_()
    options = {"with_rank": True, "extra": ("log_sum_sq_probs",)}
    compiled = torch.compile(lambda x: token_stats(x * 1.0, target, **options), fullgraph=True)
    actual, expected = compiled(input), token_stats(input, target, **options)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    (grad,) = torch.autograd.grad(actual.entropy.sum(), input)
    (wanted,) = torch.autograd.grad(expected.entropy.sum(), input)
    assert_close(grad, wanted, 1e-13)


def operator_calls(device):
    """Every operator with plausible arguments."""
    input, target = make(device)
    scale = torch.tensor(1.1, dtype=DOUBLE, device=device)
    tokens, weight = torch.rand(5, dtype=DOUBLE), torch.rand(13, dtype=DOUBLE)
    tokens, weight = tokens.to(device), weight.to(device)
    ops, options = torch.ops.llmloss, LogitOptions(1.0, 0.0, -100, 13)
    logits = pack(options)
    loss = pack(options, LossOptions(label_smoothing=0.1, z_loss=0.1, reduction=MEAN))
    state, *floats, _argmax, _rank = ops.token_stats(
        input, target, weight, scale, *logits, asked(STATISTICS)
    )
    grads = FloatStats(
        log_prob=tokens, entropy=tokens, mean_log_prob=tokens, log_sum_sq_probs=tokens
    )
    where = (input, target, weight, tokens, None, scale, *loss)
    _, state_of_loss, denominator = ops.cross_entropy(*where)
    one = torch.ones((), dtype=DOUBLE, device=device)
    saved = (target, weight, tokens, scale, *loss, state_of_loss, denominator, True)
    return [
        (ops.token_stats, (input, target, weight, scale, *logits, asked(STATISTICS))),
        (ops.token_stats, (input, target, None, None, *logits, asked(("log_prob", "lse")))),
        (
            ops.token_stats_backward,
            (grads, input, target, weight, scale, *logits, floats, state, True),
        ),
        (ops.cross_entropy, (input, target, weight, tokens, one, scale, *loss)),
        (ops.cross_entropy, (input, target, None, None, None, None, *pack(options, LossOptions()))),
        (ops.cross_entropy_backward, (one, input, *saved)),
        (ops.cross_entropy_backward_, (one, input.clone(), *saved)),
        (
            ops.cross_entropy_fused_,
            (input.clone(), target, weight, tokens, None, scale, *loss, True),
        ),
        (ops.scale_, (input.clone(), one * 2)),
    ]


@pytest.mark.parametrize("index", range(9))
def test_opcheck(device, index):
    operator, args = operator_calls(device)[index]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, args, test_utils=tests)


@pytest.mark.parametrize("inplace", [False, True])
def test_autocast(device, inplace):
    """bfloat16 logits are read as they are, and the loss is float32."""
    linear = torch.nn.Linear(8, 33, device=device)
    hidden, target = torch.randn(6, 8, device=device), torch.randint(0, 33, (6,), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = linear(hidden)
        assert logits.dtype == torch.bfloat16
        expected = F.cross_entropy(logits.detach().float(), target)
        loss = cross_entropy(logits, target, inplace=inplace)
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), expected, 2e-6)
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32
    assert torch.isfinite(linear.weight.grad).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointing(device, use_reentrant, inplace):
    weight = torch.randn(8, 33, device=device, requires_grad=True)
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    target = torch.randint(0, 33, (6,), device=device)

    def run(h):
        return cross_entropy(h @ weight, target, inplace=inplace)

    grads = []
    for loss in (run(hidden), checkpoint(run, hidden, use_reentrant=use_reentrant)):
        hidden.grad = weight.grad = None
        loss.backward()
        grads.append((hidden.grad, weight.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_pickle_and_deepcopy():
    module = llmloss_ext.nn.CrossEntropyLoss(torch.rand(7), label_smoothing=0.1, z_loss=0.1)
    input, target = torch.randn(4, 7), torch.randint(0, 7, (4,))
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(input, target), module(input, target))
    stats = token_stats(input, target)
    again = pickle.loads(pickle.dumps(stats))
    assert type(again) is type(stats)
    assert torch.equal(again.lse, stats.lse)


def test_threads():
    """Calls from several threads at once do not disturb each other."""
    input, target = torch.randn(40, 999), torch.randint(0, 999, (40,))
    leaf = input.clone().requires_grad_()
    expected = torch.autograd.grad(cross_entropy(leaf, target), leaf)[0]
    results: list[torch.Tensor] = []

    def work():
        for _ in range(20):
            mine = input.clone().requires_grad_()
            results.append(torch.autograd.grad(cross_entropy(mine, target), mine)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(grad, expected) for grad in results)


def test_second_backward(device):
    input, target = make(device)
    leaf = input.requires_grad_()
    loss = cross_entropy(leaf, target)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward(torch.tensor(3.0, dtype=DOUBLE, device=device))
    assert_close(leaf.grad, first * 4, 1e-14)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_scale_of_minus_infinity(device, softcap):
    """A class that is masked by -inf leaves the scale a gradient, whoever derives it."""
    x, y = make(device)
    x = x.detach().clone()
    x[:, 3] = -torch.inf
    y = torch.where(y == 3, 4, y)

    def loss(scale):
        return cross_entropy(x, y, logit_scale=scale, softcap=softcap)

    scale = torch.tensor(1.5, dtype=x.dtype, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(scale), scale)
    (again,) = torch.autograd.grad(loss(scale), scale, create_graph=True)
    tangent = torch.func.jvp(loss, (scale.detach(),), (torch.ones_like(scale),))[1]
    for gradient in (again, torch.func.grad(loss)(scale.detach()), tangent):
        torch.testing.assert_close(gradient, expected)
