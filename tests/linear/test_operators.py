"""What torch's tracers, transforms and higher orders see of the linear losses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, assert_close

from llmloss_ext import linear_cross_entropy, linear_kl_div, linear_token_stats
from llmloss_ext.linear import plan
from llmloss_ext.linear.operators import pack_chunks
from llmloss_ext.linear.planning import ChunkLimit, ChunkOptions
from llmloss_ext.options import MEAN, LogitOptions, LossOptions, pack
from llmloss_ext.statistics import STATISTICS, FloatStats, asked

from .problem import D, N, Problem, V, error, linear, reference


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_tensors(reduction):
    """Shapes and dtypes without values, as model builders want them."""
    meta = torch.device("meta")
    hidden, weight = (
        torch.empty(n, D, device=meta, dtype=torch.bfloat16, requires_grad=True) for n in (N, V)
    )
    target = torch.empty(N, device=meta, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert (loss.shape, loss.dtype) == ((N,) if reduction == "none" else (), torch.float32)
    loss.sum().backward()
    assert (weight.grad.shape, weight.grad.dtype) == ((V, D), torch.bfloat16)
    assert linear_token_stats(hidden, weight, target).entropy.is_meta


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward(device, reduction):
    problem = Problem(device)
    leaves = problem.leaves()
    loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2],
                                reduction=reduction).sum()  # fmt: skip
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(3 * loss, leaves)
    for one, kept_one, other in zip(first, kept, second, strict=True):
        assert torch.equal(one, kept_one)  # the second has not touched what was handed out
        assert_close(other, 3 * one, 1e-5)


def test_accumulated_gradients(device):
    problem = Problem(device)
    leaves = problem.leaves()
    for _ in range(2):
        linear(problem.target)(*leaves).backward()
    _, expected = problem.run(reference(problem.target), True)
    for leaf, want in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, 2 * want, 1e-5)


def test_upstream_gradients_of_stride_0(device):
    problem = Problem(device)
    rows = linear(problem.target, reduction="none")
    _, expected = problem.run(rows, upstream=torch.full((N,), 2.0, device=device))
    _, grads = problem.run(rows, upstream=torch.tensor(2.0, device=device).expand(N))
    for grad, want in zip(grads, expected, strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_order_gradients(device, reduction):
    problem = Problem(device, torch.float64)

    def gradient_norm(loss):
        leaves = problem.leaves()
        value = loss(*leaves).square().sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    ours = gradient_norm(linear(problem.target, reduction=reduction, label_smoothing=0.1))
    dense = gradient_norm(reference(problem.target, reduction=reduction, label_smoothing=0.1))
    for a, b in zip(ours, dense, strict=True):
        assert_close(a, b, 1e-9)


def test_function_transforms(device):
    problem = Problem(device)
    for reduction in ("mean", "sum"):
        loss = linear(problem.target, reduction=reduction)
        plain = problem.leaves()
        grads = torch.func.grad(loss, argnums=(0, 1, 2))(*(p.detach() for p in plain))
        for grad, want in zip(grads, torch.autograd.grad(loss(*plain), plain), strict=True):
            assert_close(grad, want, 1e-5)
    hidden = torch.randn(4, N, D, device=device)
    targets = torch.randint(0, V, (4, N), device=device)

    def one(h, y):
        return linear_cross_entropy(h, problem.weight, y)

    batched = torch.func.vmap(one)(hidden, targets)
    assert_close(batched, torch.stack([one(*a) for a in zip(hidden, targets, strict=True)]), 1e-5)
    per_sample = torch.func.vmap(torch.func.grad(one))(hidden, targets)
    assert_close(per_sample[2], torch.func.grad(one)(hidden[2], targets[2]), 1e-5)
    tangent = torch.randn(N, D, device=device)
    _, slope = torch.func.jvp(lambda h: one(h, targets[0]), (hidden[0],), (tangent,))
    assert_close(slope, (torch.func.grad(one)(hidden[0], targets[0]) * tangent).sum(), 1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device, reduction, dynamic):
    problem = Problem(device)
    loss = linear(problem.target, reduction=reduction, z_loss=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    upstream = torch.tensor(2.0) if reduction == "mean" else torch.randn(N)
    value, grads = problem.run(compiled, upstream=upstream.to(device))
    expected, expected_grads = problem.run(loss, upstream=upstream.to(device))
    assert_close(value, expected, 1e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want, 1e-6)


def test_compiled_without_gradients(device):
    problem = Problem(device)
    loss = linear(problem.target)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    leaves = problem.leaves()
    with torch.no_grad():
        value = compiled(*leaves)
        assert not value.requires_grad
        assert_close(value, loss(*leaves), 1e-6)
    compiled(*leaves).backward()  # the graph without gradients is not taken for one with
    _, expected = problem.run(loss)
    assert_close(leaves[1].grad, expected[1], 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device, reduction):
    problem = Problem(device, tokens=400)
    leaves = problem.leaves()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2],
                                    reduction=reduction, chunk_tokens=64).sum()  # fmt: skip
        theirs = problem.leaves()
        their_loss = F.cross_entropy(F.linear(*theirs), problem.target, reduction=reduction).sum()
    loss.backward()
    their_loss.backward()
    exact_loss, exact = problem.run(
        lambda *p: reference(problem.target, reduction=reduction)(*p).sum(), True
    )
    assert error(loss, exact_loss) <= error(their_loss, exact_loss) + 1e-3
    for ours, their, want in zip(leaves, theirs, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert error(ours.grad, want) <= 1.2 * error(their.grad, want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    """The operators that tracers see: their fake kernels give what they return."""
    problem = Problem("cpu", dtype)
    scale = torch.tensor(0.7)
    where = (problem.hidden, problem.weight, problem.bias, scale, problem.target, None)
    logits = LogitOptions(1.0, 5.0, -100, V)
    loss = LossOptions(label_smoothing=0.1, z_loss=1e-3, reduction=MEAN)
    needs, tests = [True] * 4, ("test_schema", "test_faketensor")
    ops = torch.ops.llmloss
    chunks = pack_chunks(ChunkOptions(ChunkLimit(8, False), True, torch.float32))
    for wanted in (0, asked(("log_prob", "argmax"))):
        torch.library.opcheck(
            ops.linear_loss.default,
            (*where, None, None, *pack(logits, loss), *chunks, torch.float32, needs, wanted),
            test_utils=tests,
        )
    stats = (*where, *pack(logits), asked(STATISTICS), *chunks)
    torch.library.opcheck(ops.linear_stats.default, stats, test_utils=tests)
    state, *floats, _argmax, _rank = ops.linear_stats(*stats)
    upstream = torch.ones(N, dtype=state.dtype)
    grads = FloatStats(log_prob=upstream, entropy=upstream)
    torch.library.opcheck(
        ops.linear_stats_backward.default,
        (grads, *where, *pack(logits), floats, state, *chunks, torch.float32, needs),
        test_utils=tests,
    )


TRACED = {
    "mean": linear_cross_entropy,
    "none": partial(linear_cross_entropy, reduction="none", max_chunk_bytes=1 << 20),
    "log-probability": lambda *args: linear_token_stats(*args).log_prob,
    "divergence": lambda hidden, weight, target: linear_kl_div(
        hidden, weight, 2 * hidden.detach(), weight.detach(), target=target
    ),
}


class Traced(torch.nn.Module):
    """Traced at a chunk's tokens, and then given those of several."""

    few, many = 20, 17_000

    def __init__(self, name):
        super().__init__()
        assert plan(self.few, D, 1000).chunks == 1 < plan(self.many, D, 1000).chunks
        self.weight = torch.nn.Parameter(torch.randn(1000, D))
        self.function = TRACED[name]

    def forward(self, hidden, target):
        return self.function(hidden, self.weight, target)

    @staticmethod
    def batch(tokens):
        target = torch.randint(1000, (tokens,))
        target[::5] = -100
        return torch.randn(tokens, D), target


@pytest.mark.parametrize("name", TRACED)
def test_exported_for_any_number_of_tokens(name):
    model, tokens = Traced(name), torch.export.Dim("tokens")
    few, many = model.batch(model.few), model.batch(model.many)
    exported = torch.export.export(model, few, dynamic_shapes=({0: tokens}, {0: tokens})).module()
    for batch in (few, many):
        assert torch.equal(exported(*batch), model(*batch))


@pytest.mark.parametrize("name", ["mean", "none"])
def test_compiled_for_any_number_of_tokens(name):
    torch.compiler.reset()
    model = Traced(name)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(*model.batch(model.few)).sum().backward()
    many = model.batch(model.many)
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = compiled(*many)
    theirs = model(*many)
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), model.weight) for loss in (ours, theirs)]
    assert torch.equal(*(of_weight for (of_weight,) in gradients))
