"""Hard and soft distillation in one walk, from every kind of teacher."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FLOATS, assert_close
from torch.utils.flop_counter import FlopCounterMode

from llmloss_ext import cross_entropy, linear_distillation_loss, linear_kl_div, losses

N, D, E, V, W = 19, 6, 9, 31, 34
DIRECTIONS = ["forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse"]
KINDS = ["hidden", "log_probs", "top k", "top k alone"]
SHARED = {"beta": 0.3, "skew_alpha": 0.2, "temperature": 2.0}


class Problem:
    def __init__(self, device="cpu", dtype=torch.double):
        torch.manual_seed(0)
        sizes = (N, D), (V, D), (V,), (N, E), (W, E), (W,)
        tensors = [torch.randn(size).to(device, dtype) for size in sizes]
        self.student = [t.requires_grad_() for t in tensors[:3]]
        self.teacher = tensors[3:]
        self.target = torch.randint(0, V, (N,), device=device)
        self.target[::4] = -100

    def given(self, kind):
        """The arguments of the teacher, and its logits."""
        hidden, weight, bias = self.teacher
        logits = (hidden @ weight.t() + bias)[:, :V]
        if kind == "hidden":
            return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
        log_p = torch.log_softmax(logits.to(torch.float64) / SHARED["temperature"], -1)
        log_p = log_p.to(logits.dtype)
        if kind == "log_probs":
            return {"teacher_log_probs": log_p}
        values, ids = log_p.topk(4, -1)
        return {"teacher_log_probs": values, "teacher_ids": ids, "add_tail": kind == "top k"}

    def whole(self, kind, weights, direction, **options):
        """The same from whole logits, which other tests hold to the definitions."""
        h, w, b = self.student
        given = self.given(kind)
        if kind == "hidden":
            hidden, weight, bias = given.values()
            given = {"teacher_logits": hidden @ weight.t() + bias}
        return losses.hard_soft_distillation_loss(
            h @ w.t() + b, **{"teacher_logits": None, **given}, target=self.target,
            direction=direction, weight_hard_loss=weights[0], weight_soft_loss=weights[1],
            **SHARED, **options,
        )  # fmt: skip

    def ours(self, kind, weights, direction, **options):
        h, w, b = self.student
        return linear_distillation_loss(
            h, w, student_bias=b, target=self.target, **self.given(kind), direction=direction,
            weight_hard_loss=weights[0], weight_soft_loss=weights[1], **SHARED, **options,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 2.0), (1.5, 0.0)])
def test_against_whole_logits(device, kind, direction, weights):
    problem = Problem(device)
    wanted = problem.whole(kind, weights, direction)
    wants = torch.autograd.grad(3 * wanted.loss, problem.student)
    for chunk, drop in ((None, True), (5, False)):
        found = problem.ours(kind, weights, direction, chunk_tokens=chunk, drop_ignored=drop)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, 1e-11)
        assert not found.hard_loss.requires_grad
        assert not found.soft_loss.requires_grad
        grads = torch.autograd.grad(3 * found.loss, problem.student)
        for one, other in zip(grads, wants, strict=True):
            assert_close(one, other, 1e-11)
        assert (grads[0][::4] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 2.0), (1.5, 0.0)])
def test_without_a_reduction(device, kind, weights):
    """One loss a token; upstream gradients of all sizes, of which one is 0."""
    problem = Problem(device)
    upstream = torch.randn(N, dtype=torch.double, device=device)
    upstream[5] = 0
    wanted = problem.whole(kind, weights, "jsd", reduction="none")
    wants = torch.autograd.grad(wanted.loss, problem.student, upstream)
    for chunk, drop in ((None, True), (5, False), (4, True)):
        options = {"chunk_tokens": chunk, "drop_ignored": drop, "reduction": "none"}
        found = problem.ours(kind, weights, "jsd", **options)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == (N,)
            assert_close(one, other, 1e-11)
        assert not found.hard_loss.requires_grad
        grads = torch.autograd.grad(found.loss, problem.student, upstream)
        for one, other in zip(grads, wants, strict=True):
            assert_close(one, other, 1e-11)
        assert (grads[0][::4] == 0).all()
        assert (grads[0][5] == 0).all()
    # Its mean is the mean's, and so is the gradient of that.
    count = (problem.target != -100).sum()
    mean = problem.ours(kind, weights, "jsd")
    assert_close(found.loss.sum() / count, mean.loss, 1e-11)
    again = problem.ours(kind, weights, "jsd", reduction="none").loss.sum() / count
    for one, other in zip(
        torch.autograd.grad(again, problem.student),
        torch.autograd.grad(mean.loss, problem.student), strict=True,
    ):  # fmt: skip
        assert_close(one, other, 1e-11)


@pytest.mark.parametrize("drop", [True, False])
def test_without_a_reduction_masked_tokens_may_hold_anything(device, drop):
    problem, spoilt = Problem(device), Problem(device)
    left_out = problem.target == -100
    with torch.no_grad():
        spoilt.student[0][left_out] = math.nan
        spoilt.teacher[0][left_out] = math.inf
    results = []
    for each in (problem, spoilt):
        found = each.ours("hidden", (0.4, 0.6), "forward", reduction="none", drop_ignored=drop)
        results.append([found.loss, *torch.autograd.grad(found.loss.sum(), each.student)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_without_a_reduction_of_every_shape_and_compiled(device):
    problem = Problem(device)
    h, w, b = problem.student
    hidden, weight, bias = problem.teacher
    given = {"student_bias": b, "teacher_bias": bias, "reduction": "none", **SHARED}

    def rows(h, hidden, target):
        return linear_kl_div(h, w, hidden, weight, target=target, **given)

    one = rows(h, hidden, problem.target)
    other = rows(h.reshape(1, N, D), hidden.reshape(1, N, E), problem.target.reshape(1, N))
    assert other.shape == (1, N)
    assert torch.equal(one, other[0])
    compiled = torch.compile(rows, fullgraph=True)(h, hidden, problem.target)
    assert_close(compiled.detach(), one.detach(), 1e-12)
    for x, y in zip(
        torch.autograd.grad(compiled.square().sum(), problem.student),
        torch.autograd.grad(one.square().sum(), problem.student),
        strict=True,
    ):
        assert_close(x, y, 1e-11)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        torch.autograd.grad(one.sum(), h, create_graph=True)


def test_numbers_of_items_sums_and_padding(device):
    problem = Problem(device)
    for options in ({"reduction": "sum"}, {"num_items": 7}, {"vocab_size": V}):
        how = ("hidden", (0.4, 0.6), "jsd")
        one, other = problem.ours(*how, **options), problem.whole(*how, **options)
        assert_close(one.loss, other.loss, 1e-11)
    nothing = problem.target
    problem.target = torch.full_like(nothing, -100)
    assert problem.ours("hidden", (0.4, 0.6), "jsd").loss.isnan()
    found = problem.ours("hidden", (0.4, 0.6), "jsd", num_items=0)
    assert found.loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(found.loss, problem.student))


def test_the_two_terms_are_those_that_there_are(device):
    problem = Problem(device)
    h, w, b = problem.student
    found = problem.ours("hidden", (0.25, 0.75), "reverse")
    hard = cross_entropy(h @ w.t() + b, problem.target)
    hidden, weight, bias = problem.teacher
    soft = linear_kl_div(
        h, w, hidden, weight, student_bias=b, teacher_bias=bias, target=problem.target,
        direction="reverse", **SHARED,
    )  # fmt: skip
    assert_close(found.hard_loss, hard, 1e-11)
    assert_close(found.soft_loss, soft, 1e-11)
    assert_close(found.loss, 0.25 * hard + 0.75 * soft, 1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_types(device, dtype, kind):
    problem, exact = Problem(device, dtype), Problem(device)
    exact.student = [t.detach().double().requires_grad_() for t in problem.student]
    exact.teacher = [t.double() for t in problem.teacher]
    small = {torch.bfloat16: 4e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    found, wanted = (p.ours(kind, (0.5, 0.5), "forward") for p in (problem, exact))
    assert_close(found.loss, wanted.loss, small)
    assert found.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(found.loss, problem.student)
    for one, other in zip(grads, torch.autograd.grad(wanted.loss, exact.student), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < small * other.norm()


def test_a_sure_student_keeps_its_digits():
    """The gradient of the hard loss where p is 1 to float32's rounding."""
    weight = torch.zeros(V, 1)
    weight[0] = 25.0
    hidden = torch.ones(1, 1, requires_grad=True)
    found = linear_distillation_loss(
        hidden, weight, teacher_log_probs=torch.log_softmax(weight.t(), -1),
        target=torch.zeros(1, dtype=torch.long), weight_hard_loss=1.0, weight_soft_loss=1.0,
    )  # fmt: skip
    exact = math.log1p((V - 1) * math.exp(-25.0))
    assert found.hard_loss.item() == pytest.approx(exact, rel=1e-5)
    (grad,) = torch.autograd.grad(found.loss, hidden)
    assert grad.item() == pytest.approx(25 * math.expm1(-exact), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_part_may_hold_anything(device, kind, drop, value):
    results = []
    for spoilt in (False, True):
        problem = Problem(device, torch.float32)
        given = problem.given(kind)
        h, w, b = (t.detach().clone() for t in problem.student)
        absent = problem.target == -100
        if spoilt:
            h[absent] = value
            for name, t in given.items():
                if name in ("teacher_hidden", "teacher_log_probs"):
                    given[name] = t.masked_fill(absent[:, None], value)
                elif name == "teacher_ids":
                    given[name] = t.masked_fill(absent[:, None], 10**9)
        leaves = [t.requires_grad_() for t in (h, w, b)]
        found = linear_distillation_loss(
            h, w, student_bias=b, target=problem.target, **given, drop_ignored=drop,
            chunk_tokens=5, **SHARED,
        )  # fmt: skip
        grads = torch.autograd.grad(found.loss, leaves)
        assert (grads[0][absent] == 0).all()
        results.append((*(x.detach() for x in found), *grads))
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(device, kind):
    problem = Problem(device, torch.float32)
    given = problem.given(kind)

    def run(h, w, b):
        return linear_distillation_loss(
            h, w, student_bias=b, target=problem.target, **given, chunk_tokens=7, **SHARED
        )

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        found = function(*problem.student)
        grads = torch.autograd.grad(found.loss, problem.student)
        results.append((*(x.detach() for x in found), *grads))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)


def test_products():
    problem = Problem()
    product = 2 * V * int((problem.target != -100).sum())

    def counted(kind, weights, **options):
        h, w, b = problem.student
        given = problem.given(kind)
        with FlopCounterMode(display=False) as counter:
            linear_distillation_loss(
                h, w, student_bias=b, target=problem.target, **given, weight_hard_loss=weights[0],
                weight_soft_loss=weights[1], **options,
            ).loss.sum().backward()  # fmt: skip
        return counter.get_total_flops()

    assert counted("hidden", (0.5, 0.5)) == product * (3 * D + E)
    assert counted("hidden", (0.5, 0.0)) == product * 3 * D
    for kind in KINDS[1:]:
        assert counted(kind, (0.5, 0.5)) == product * 3 * D
    # Without a reduction, backward computes the logits of both again.
    assert counted("hidden", (0.5, 0.5), reduction="none") == product * (4 * D + 2 * E)
    assert counted("top k", (0.5, 0.5), reduction="none") == product * 4 * D


def test_what_does_not_fit():
    problem = Problem()
    h, w, _ = problem.student
    hidden, weight, bias = problem.teacher
    log_p = torch.log_softmax(torch.randn(N, V), -1)
    ids = torch.zeros(N, 2, dtype=torch.long)
    for words, changes in (
        ("need its weight", {"teacher_weight": None}),
        ("as teacher_log_probs", {"teacher_log_probs": log_p}),
        ("as teacher_log_probs", {"teacher_hidden": None, "teacher_weight": None}),
        ("belong to teacher_log_probs", {"teacher_ids": ids}),
        ("same tokens", {"teacher_hidden": hidden[1:]}),
        ("one label per token", {"target": problem.target[1:]}),
        ("must have the shape of teacher_log_probs",
         {"teacher_hidden": None, "teacher_weight": None, "teacher_log_probs": log_p,
          "teacher_ids": ids}),
        ("teacher_bias belongs",
         {"teacher_hidden": None, "teacher_weight": None, "teacher_log_probs": log_p,
          "teacher_bias": bias}),
        ("a hard loss needs a target", {"target": None}),
        ("must be > 0", {"weight_hard_loss": 0.0, "weight_soft_loss": 0.0}),
        ("weight_hard_loss must be", {"weight_hard_loss": -1.0}),
        ("weight_soft_loss must be", {"weight_soft_loss": math.nan}),
        ('must be "mean", "sum" or "none"', {"reduction": "avg"}),
        ("num_items replaces", {"reduction": "none", "num_items": 3}),
        ("direction must be", {"direction": "both"}),
    ):  # fmt: skip
        given = {"teacher_hidden": hidden, "teacher_weight": weight, "target": problem.target}
        with pytest.raises(ValueError, match=words):
            linear_distillation_loss(h, w, **(given | changes))
    problem.target[1] = V
    with pytest.raises(IndexError, match=rf"Target {V} at position 1"):
        problem.ours("hidden", (0.5, 0.5), "forward")
    problem.target[1] = 0
    found = problem.ours("hidden", (0.5, 0.5), "forward").loss
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        torch.autograd.grad(found, h, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_distillation_loss does not work under"):
        torch.func.grad(
            lambda h: linear_distillation_loss(h, w, hidden, weight, problem.target).loss
        )(h)


PEAK = """
import sys
sys.path.insert(0, "tests/linear")
from pathlib import Path
import torch
from peak_memory import map_large_blocks, resident
from llmloss_ext import linear_distillation_loss
map_large_blocks()
torch.set_num_threads(1)
n, d, v, kind = 1024, 32, 30_000, sys.argv[1]
h, w, b = torch.randn(n, d), torch.randn(v, d), None
h.requires_grad_(), w.requires_grad_()
if kind == "hidden":
    given = {"teacher_hidden": torch.randn(n, 48), "teacher_weight": torch.randn(v, 48)}
else:
    ids = torch.arange(8).expand(n, 8)
    given = {"teacher_log_probs": -torch.rand(n, 8) - 3, "teacher_ids": ids}
for _ in range(2):
    h.grad = w.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    linear_distillation_loss(
        h, w, target=torch.zeros(n, dtype=torch.long), chunk_tokens=128, **given
    ).loss.backward()
    measured = resident("VmHWM") - before
print(measured)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["hidden", "top k"])
def test_peak_memory(kind):
    """That of the student's walk, a chunk of the teacher's logits, and the copies of some rows."""
    from llmloss_ext import plan

    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    planned = plan(1024, 32, 30_000, chunk_tokens=128)
    copies = planned.chunk_bytes * 1.5
    of_teacher = planned.chunk_bytes if kind == "hidden" else 0
    assert int(done.stdout) <= planned.peak_bytes + of_teacher + copies
