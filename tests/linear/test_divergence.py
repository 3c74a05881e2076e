"""Distillation between two chunked projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, assert_close
from torch import Tensor

from llmloss_ext import linear_kl_div

N, D, E, V = 23, 8, 12, 67
DIRECTIONS = ["forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse"]


def make(device, dtype=torch.float32) -> tuple[Tensor, ...]:
    sizes = ((N, D), (V, D), (N, E), (V, E))
    return tuple(torch.randn(size, device=device).to(dtype) for size in sizes)


def reference(tensors: Any, direction: str, beta: float, temperature: float, valid: Any) -> Tensor:
    """By torch's own kl_div, in float64."""
    student, teacher = (
        F.log_softmax(h @ w.t() / temperature, -1) for h, w in (tensors[:2], tensors[2:])
    )

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if direction == "forward":
        rows = kl(teacher, student)
    elif direction == "reverse":
        rows = kl(student, teacher)
    elif direction == "tvd":
        rows = (student.exp() - teacher.exp()).abs().sum(-1) / 2
    elif direction.startswith("skew_"):
        p, q = (teacher, student) if direction == "skew_forward" else (student, teacher)
        rows = kl(p, (0.1 * p.exp() + 0.9 * q.exp()).log())
    else:
        middle = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        rows = beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)
    return (rows * temperature**2)[valid].mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_as_torchs_kl_div(device, direction, temperature, chunk):
    tensors = make(device)
    target = torch.zeros(N, dtype=torch.long, device=device)
    target[::4] = -100
    student = [t.clone().requires_grad_() for t in tensors[:2]]
    loss = linear_kl_div(
        *student, *tensors[2:], direction=direction, beta=0.3, temperature=temperature,
        target=target, chunk_tokens=chunk,
    )  # fmt: skip
    exact = [t.double().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    expected = reference(exact, direction, 0.3, temperature, target != -100)
    assert_close(loss.detach(), expected.detach(), 1e-5)
    grads = torch.autograd.grad(2 * loss, student, retain_graph=True)
    wanted = torch.autograd.grad(2 * expected, exact[:2])
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, 1e-5)
    for grad, again in zip(grads, torch.autograd.grad(2 * loss, student), strict=True):
        assert torch.equal(grad, again)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("drop", [False, True])
def test_dropped_or_not(device, direction, drop, monkeypatch):
    """By default a CPU drops ignored tokens; CUDA does not, since it would have to wait."""
    tensors = make(device)
    target = torch.zeros(N, dtype=torch.long, device=device)
    target[::3] = -100
    student = [t.clone().requires_grad_() for t in tensors[:2]]
    options = {"direction": direction, "target": target, "chunk_tokens": 5}
    if not drop:
        monkeypatch.setattr(torch.Tensor, "nonzero", None)
    loss = linear_kl_div(*student, *tensors[2:], **options, drop_ignored=drop)
    exact = [t.double().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    expected = reference(exact, direction, 0.5, 1.0, target != -100)
    assert_close(loss.detach(), expected.detach(), 1e-5)
    grads = torch.autograd.grad(loss, student)
    for grad, want in zip(grads, torch.autograd.grad(expected, exact[:2]), strict=True):
        assert_close(grad, want, 1e-5)
    assert (grads[0][::3] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_compiles(device, direction, masked):
    tensors = make(device)
    target = None
    if masked:
        target = torch.arange(N, device=device) % 4 - 100
    bias = torch.randn(V, device=device)

    def run(hidden, weight, bias):
        return linear_kl_div(hidden, weight, *tensors[2:], student_bias=bias, target=target,
                             direction=direction, temperature=2.0, chunk_tokens=7)  # fmt: skip

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (*tensors[:2], bias)]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)


def test_the_operator_is_what_it_says(device):
    from llmloss_ext.linear.divergence import linear_divergence

    tensors = make(device)
    valid = torch.arange(N, device=device) % 4 != 0
    bias = torch.randn(V, device=device)
    labels = torch.where(valid, torch.arange(N, device=device), -1)
    upstream = torch.randn(N, device=device)
    for reduction, upstream_of_rows, needs in (
        ("mean", None, [True, True, True]), ("sum", None, [False, True, False]),
        ("none", None, [False, False, False]), ("none", upstream, [True, True, False]),
    ):  # fmt: skip
        arguments = (upstream_of_rows, needs, tensors[0], tensors[1], bias, tensors[2], tensors[3],
                     None, None, labels, valid, None, "jsd", 0.3, 2.0, True, 0.5, 0.5, reduction, V,
                     [7, 0, 0], False, False)  # fmt: skip
        torch.library.opcheck(
            linear_divergence, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_columns_that_both_models_rule_out(device, direction):
    student, weight, teacher, other = make(device)
    bias = torch.zeros(V, device=device)
    bias[::3] = -torch.inf
    leaf = student.clone().requires_grad_()
    loss = linear_kl_div(
        leaf, weight, teacher, other, student_bias=bias, teacher_bias=bias, direction=direction
    )
    exact = student.double().requires_grad_()
    keep = [i for i in range(V) if i % 3]
    small = (exact, weight[keep].double(), teacher.double(), other[keep].double())
    expected = reference(small, direction, 0.5, 1.0, slice(None))
    assert_close(loss.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, exact)
    assert_close(grad, want, 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_of_itself_it_is_zero(device, dtype, direction):
    hidden, weight, _, _ = make(device, dtype)
    leaf = hidden.clone().requires_grad_()
    loss = linear_kl_div(leaf, weight, hidden, weight, direction=direction)
    loss.backward()
    assert_close(loss.detach(), torch.zeros(()), 1e-6)
    assert leaf.grad is not None
    assert_close(leaf.grad, torch.zeros(N, D), 1e-6)


def test_biases_sum_and_shapes(device):
    tensors = make(device)
    bias = torch.randn(V, device=device, requires_grad=True)
    other = torch.randn(V, device=device)
    loss = linear_kl_div(
        tensors[0].view(1, N, D), tensors[1], tensors[2].view(1, N, E), tensors[3],
        student_bias=bias, teacher_bias=other, reduction="sum", chunk_tokens=5,
    )  # fmt: skip
    exact = bias.detach().double().requires_grad_()
    q = F.log_softmax(tensors[0].double() @ tensors[1].double().t() + exact, -1)
    p = F.log_softmax(tensors[2].double() @ tensors[3].double().t() + other.double(), -1)
    expected = F.kl_div(q, p, reduction="sum", log_target=True)
    assert_close(loss.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = torch.autograd.grad(loss, bias), torch.autograd.grad(expected, exact)
    assert_close(grad, want, 1e-5)


def test_a_teacher_that_rules_tokens_out(device):
    student, weight, teacher, other = make(device)
    bias = torch.zeros(V, device=device)
    bias[::3] = -torch.inf
    leaf = student.clone().requires_grad_()
    loss = linear_kl_div(leaf, weight, teacher, other, teacher_bias=bias)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_no_token(device):
    tensors = make(device)
    target = torch.full((N,), -100, device=device)
    assert linear_kl_div(*tensors, target=target).isnan()
    assert linear_kl_div(*tensors, target=target, reduction="sum") == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direction": "both"}, "direction must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"beta": 1.1}, "beta must be"),
        ({"reduction": "avg"}, 'must be "mean", "sum" or "none"'),
        ({"teacher_hidden": torch.randn(N + 1, E)}, "the same tokens"),
        ({"vocab_size": V + 1}, "vocab_size must be in"),
        ({"num_items": 3, "reduction": "sum"}, "num_items replaces"),
        ({"teacher_weight": torch.randn(V, D)}, r"a weight \(V, D\)"),
        ({"target": torch.zeros(N + 1)}, "one label per token"),
        ({"chunk_tokens": 0}, "at least 1"),
    ],
)
def test_bad_input(changes, words):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    arguments = {**dict(zip(names, make("cpu"), strict=True)), **changes}
    with pytest.raises(ValueError, match=words):
        linear_kl_div(**arguments)


def test_a_teacher_that_requires_a_gradient_gets_none():
    """It may be the student of another loss."""
    tensors = [t.requires_grad_() for t in make("cpu")]
    bias = torch.zeros(V, requires_grad=True)
    linear_kl_div(*tensors, teacher_bias=bias).backward()
    assert all(t.grad is not None for t in tensors[:2])
    assert all(t.grad is None for t in (*tensors[2:], bias))


def test_without_gradients_there_are_two_products_and_a_teacher_may_be_trainable(monkeypatch):
    hidden, weight, other, teacher = (torch.randn(n, 6).requires_grad_() for n in (5, 9, 5, 9))
    products = []

    def counted(*args, mm=torch.mm, **kwargs):
        products.append(1)
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    with torch.no_grad():
        loss = linear_kl_div(hidden, weight, other, teacher)
    assert not loss.requires_grad
    assert len(products) == 2


def test_float16_gradients_summed_over_many_tokens_do_not_overflow():
    """The gradient is kept without its factor 1 / N until backward."""
    tokens = 8192
    hidden = torch.full((tokens, 4), 16.0).half()
    weight = torch.zeros(9, 4).half().requires_grad_()
    teacher = torch.zeros(9, 4).half()
    teacher[0] = 1.0  # sure of the first of nine
    linear_kl_div(hidden, weight, hidden, teacher).backward()
    exact = 16.0 * (1 / 9 - 1.0)
    torch.testing.assert_close(weight.grad[0].float(), torch.full((4,), exact), rtol=2e-3, atol=0)
