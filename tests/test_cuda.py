"""What only a CUDA device can show; the other tests run there too, as device cuda."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, GRADIENT, VALUE, Passed, assert_close
from torch import Tensor

from llmloss_ext import cross_entropy, losses, token_stats

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, columns, device="cuda").mul_(3).to(dtype)
    return logits, torch.randint(0, columns, (rows,), device="cuda")


def step(logits: Tensor, target: Tensor, inplace: bool = False, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    # In place needs logits that are no leaf: the gradient passes through to one.
    loss = cross_entropy(leaf * 1 if inplace else leaf, target, inplace=inplace, **options)
    loss.backward()
    return loss.detach(), leaf.grad


# ids: bench/gpu.sh chooses by them.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"),
    # A warp a row; a block; clusters of 1 to 16 and beyond; few rows; rows of odd length.
    [(300, 61), (64, 9001), (64, 32000), (40, 50257), (40, 128256), (8, 262144), (1, 262144),
     (3, 1_500_001)],
)  # fmt: skip
def test_every_plan(dtype: torch.dtype, inplace: bool, rows: int, columns: int) -> None:
    logits, target = make(rows, columns, dtype)
    target[rows // 2] = -100 if rows > 1 else target[0]
    loss, grad = step(logits, target, inplace)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target)
    expected.backward()
    assert_close(loss, expected.detach(), VALUE[dtype])
    # Relative to the largest entry: a mean's gradients are as small as 1 / N.
    scale = max(1, int((target != -100).sum()))
    assert_close(grad.double() * scale, exact.grad * scale, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    """Few rows are split over blocks, many are not; fused in place or not."""
    for columns in (50257, 128256):
        logits, target = make(300, columns, dtype)
        all_rows = token_stats(logits, target, with_rank=True)
        _, grads = step(logits, target, reduction="sum")
        _, fused = step(logits, target, inplace=True, reduction="sum")
        assert torch.equal(grads, fused)
        for row in (0, 151, 299):
            one = slice(row, row + 1)
            alone = token_stats(logits[one].clone(), target[one], with_rank=True)
            for a, b in zip(alone, all_rows, strict=True):
                if a is not None:
                    assert torch.equal(a, b[one])
            _, grad = step(logits[one], target[one], reduction="sum")
            assert torch.equal(grad[0], grads[row])


def test_a_cuda_graph_can_be_replayed() -> None:
    logits, target = make(64, 32000, torch.bfloat16)
    static = logits.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            static.grad = None
            cross_entropy(static, target, label_smoothing=0.1).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static.grad = None
    with torch.cuda.graph(graph):
        loss = cross_entropy(static, target, label_smoothing=0.1)
        loss.backward()
    for _ in range(2):
        fresh, _ = make(64, 32000, torch.bfloat16)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        expected, grad = step(fresh, target, label_smoothing=0.1)
        assert torch.equal(loss, expected)
        assert torch.equal(static.grad, grad)


FIRST_CALL = """
import torch
from llmloss_ext import cross_entropy, token_stats

torch.manual_seed(0)
x = torch.randn(40, 128256, device="cuda").bfloat16()
target = torch.randint(0, 128256, (40,), device="cuda")
leaf, held = (x.clone().requires_grad_() for _ in range(2))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = cross_entropy(leaf, target, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(loss, leaf)
    in_place = cross_entropy(held * 1, target, inplace=True)
    (over,) = torch.autograd.grad(in_place, held)
    stats = token_stats(x, target)
graph.replay()
again = x.clone().requires_grad_()
expected = cross_entropy(again, target, label_smoothing=0.1)
assert torch.equal(loss, expected)
assert torch.equal(grad, torch.autograd.grad(expected, again)[0])
plain = cross_entropy(again, target)
assert torch.equal(in_place, plain)
assert torch.equal(over, torch.autograd.grad(plain, again)[0])
assert torch.equal(stats.entropy, token_stats(x, target).entropy)
print("replayed")
"""


def test_the_first_call_of_a_process_can_be_captured() -> None:
    """No kernel is loaded yet, and nothing is known of the device."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "replayed\n"


def replayed(run: Callable[[Tensor, Tensor], tuple[Tensor, ...]], logits: Tensor) -> None:
    """A captured call gives, for new logits, what the same call gives at once."""
    target = torch.randint(0, logits.shape[1], logits.shape[:1], device="cuda")
    static = logits.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static.clone(), target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(static * 1, target)
    for _ in range(2):
        fresh = torch.randn_like(logits)
        static.copy_(fresh)
        graph.replay()
        for result, expected in zip(results, run(fresh.clone(), target), strict=True):
            assert torch.equal(result, expected)


# Clusters of four and of sixteen blocks, and a row that the whole device splits.
@pytest.mark.parametrize(("rows", "columns"), [(64, 128256), (1, 262144), (1, 3_000_000)])
def test_in_place_in_a_cuda_graph(rows: int, columns: int) -> None:
    def run(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        anchor = torch.zeros((), device="cuda", requires_grad=True)
        loss = cross_entropy(Passed.apply(logits, anchor), target, inplace=True)
        loss.backward()
        return loss.detach(), logits

    replayed(run, torch.randn(rows, columns, device="cuda").bfloat16())


@pytest.mark.parametrize(("rows", "columns"), [(64, 32000), (1, 262144)])
def test_statistics_in_a_cuda_graph(rows: int, columns: int) -> None:
    def run(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.requires_grad_()
        stats = token_stats(leaf, target, with_rank=True)
        (grad,) = torch.autograd.grad((stats.log_prob + stats.entropy).sum(), leaf)
        return stats.log_prob.detach(), stats.entropy.detach(), stats.rank, grad

    replayed(run, torch.randn(rows, columns, device="cuda"))


def test_another_stream() -> None:
    logits, target = make(256, 32000)
    expected, expected_grad = step(logits, target)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # What the default stream would not wait for.
        torch.cuda._sleep(50_000_000)
        late = logits * 1
        loss, grad = step(late, target)
    stream.synchronize()
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of being a prototype, after the mode is set
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_policy_losses_do_not_wait_for_the_device(loss_type: str) -> None:
    x, old = (-torch.rand(4, 9, device="cuda").requires_grad_() for _ in range(2))
    mask = torch.ones(4, 9, device="cuda").bool()
    advantages = losses.group_advantages(x.detach().sum(-1), 2)
    result = losses.grpo_loss(
        x, old, advantages, mask, loss_type=loss_type, reference_log_probs=old, beta=0.1,
        entropy=x.exp(), entropy_coef=0.1, off_policy_mask_threshold=0.1,
        entropy_mask=losses.high_entropy_mask(x.exp(), mask, 0.5), num_items=4, entropy_items=4,
        importance_sampling_ratio=losses.rollout_weights(old, x, mask),
    )  # fmt: skip
    result.loss.backward()
    returns = losses.gae(x, old, mask).returns
    losses.value_loss(x, losses.masked_whiten(old, mask), returns, mask).loss.backward()


@pytest.mark.usefixtures("_no_waiting")
def test_nothing_waits_for_the_device() -> None:
    logits, target = make(64, 32000)
    for options in ({}, {"reduction": "none"}, {"z_loss": 1e-4, "label_smoothing": 0.1}):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, target, **options)
        loss.backward(torch.ones_like(loss))
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf * 1, target, inplace=True).backward()
    stats = token_stats(leaf, target, with_rank=True)
    (stats.log_prob + stats.entropy).sum().backward()


def test_a_target_out_of_range_is_nan_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make(6, 1000)
    target[2], target[4] = 1000, -7
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none")
    assert torch.equal(loss.isnan(), torch.tensor([0, 0, 1, 0, 1, 0], device="cuda").bool())
    loss[[0, 1, 3, 5]].sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[[2, 4]] == 0).all()
    assert leaf.grad.isfinite().all()
    monkeypatch.setenv("LLMLOSS_CHECK_TARGETS", "1")
    with pytest.raises(IndexError, match="Target 1000 at position 2 is out of bounds"):
        cross_entropy(logits, target)


# torch begins with an empty graph of its own, and records the warning of it, unless it is an error.
# One that lacked our kernels would leave the values of the batch before.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_compiled_with_cuda_graphs() -> None:
    compiled = torch.compile(
        lambda x, y: cross_entropy(x, y, label_smoothing=0.1), mode="reduce-overhead"
    )
    for _ in range(4):
        logits, target = make(64, 32000)
        leaf = logits.clone().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(leaf, target).clone()
        loss.backward()
        expected, grad = step(logits, target, label_smoothing=0.1)
        assert_close(loss.detach(), expected, VALUE[torch.float32])
        assert leaf.grad is not None
        assert_close(leaf.grad, grad, GRADIENT[torch.float32])


def test_more_than_32_bits_of_elements() -> None:
    rows, columns = 33_000, 131_072
    need = 2 * 2 * rows * columns + (2 << 30)
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of free device memory")
    logits = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    last, target = make(8, columns, torch.bfloat16)
    logits[-8:] = last
    targets = torch.zeros(rows, dtype=torch.long, device="cuda")
    targets[-8:] = target
    expected = token_stats(last, target)
    assert torch.equal(token_stats(logits, targets).log_prob[-8:], expected.log_prob)
    _, expected_grad = step(last, target, reduction="sum")
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(leaf, targets, reduction="sum"), leaf)
    assert torch.equal(grad[-8:], expected_grad)
    del leaf, grad
    logits = logits.detach()
    anchor = torch.zeros((), device="cuda", requires_grad=True)
    cross_entropy(Passed.apply(logits, anchor), targets, inplace=True, reduction="sum").backward()
    assert torch.equal(logits[-8:], expected_grad)
    del logits
    torch.cuda.empty_cache()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used() -> None:
    logits, target = make(64, 5000)
    expected, grad = step(logits, target)
    with torch.cuda.device(0):
        loss, other = step(logits.to("cuda:1"), target.to("cuda:1"))
    assert torch.equal(loss.cpu(), expected.cpu())
    assert torch.equal(other.cpu(), grad.cpu())
