"""The loss monitor, and what micro-batches are divided by."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from helpers import assert_close
from losses.problem import D, V
from properties import SETTINGS, hypothesis, st

import llmloss_ext
from llmloss_ext import cross_entropy
from llmloss_ext.training import LossMonitor, accumulate_gradients, count_items


def warmed_up(*, noise: float = 0.1, **options) -> LossMonitor:
    monitor = LossMonitor(**options)
    generator = torch.Generator().manual_seed(0)
    for value in (3 + noise * torch.randn(50, generator=generator)).tolist():
        monitor.history.append(value)
    return monitor


def test_the_first_ten_are_no_spikes():
    monitor = LossMonitor()
    assert not any(monitor.check_spike(x) for x in (1, 100, 1, 1000, 1, 1, 1, 1, 1, 10_000))
    assert len(monitor.history) == 10


def test_a_jump_is_a_spike_and_does_not_enter_the_history():
    monitor = warmed_up()
    before = list(monitor.history)
    assert monitor.check_spike(3.5)
    assert list(monitor.history) == before
    assert not monitor.check_spike(3.05)
    assert not monitor.check_spike(0.1)  # better is never a spike
    mean = sum(before) / 50
    std = math.sqrt(sum((x - mean) ** 2 for x in before) / 50)
    fresh = warmed_up()
    assert fresh.limit() == pytest.approx(mean + 2 * std)
    assert warmed_up(spike_threshold=3.0).limit() == pytest.approx(mean + 3 * std)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_what_is_not_finite_is_always_a_spike(loss):
    for monitor in (LossMonitor(), warmed_up()):
        count = len(monitor.history)
        assert monitor.check_spike(loss)
        assert len(monitor.history) == count


def test_a_flat_history_needs_a_real_jump():
    monitor = warmed_up(noise=0.0)
    assert not monitor.check_spike(3.0 + 1e-12)
    assert monitor.check_spike(3.1)


def test_a_flat_history_of_zero_needs_a_real_jump_too():
    monitor = warmed_up(noise=0.0)
    monitor.history.clear()
    monitor.history.extend([0.0] * 20)
    assert not monitor.check_spike(1e-9)
    assert monitor.check_spike(0.1)


def test_a_history_that_is_not_flat_is_ruled_by_its_deviation():
    """Its deviation is far above rounding, and far below a thousandth of the mean."""
    monitor = LossMonitor()
    monitor.history.extend([3 - 1e-6, 3 + 1e-6] * 10)
    assert monitor.limit() == pytest.approx(3 + 2e-6, abs=1e-9)
    assert monitor.check_spike(3 + 1e-4)


@pytest.mark.parametrize("size", [1e308, -1e308, 1e-320])
def test_histories_at_the_ends_of_float64(size):
    monitor = LossMonitor()
    for _ in range(12):
        assert not monitor.check_spike(size)
    assert monitor.limit() > size or size == 1e-320
    monitor.history.extend([1e308, -1e308] * 6)
    assert monitor.limit() == math.inf or monitor.limit() > 1e308


def test_the_history_is_limited_and_can_be_resumed():
    monitor = LossMonitor(history_size=20)
    for i in range(50):
        monitor.check_spike(50 - i)
    assert list(monitor.history) == list(range(20, 0, -1))
    state = json.loads(json.dumps(monitor.state_dict()))
    again = LossMonitor()
    again.load_state_dict(state)
    assert again.history == monitor.history
    assert again.history.maxlen == 20
    assert again.limit() == monitor.limit()


@pytest.mark.parametrize("options", [{"spike_threshold": 0.0}, {"spike_threshold": math.nan},
                                     {"history_size": 9}])  # fmt: skip
def test_bad_settings(options):
    with pytest.raises(ValueError):
        LossMonitor(**options)


def test_count_items(device):
    targets = [torch.tensor(t, device=device) for t in ([1, -100, 2], [-100], [3])]
    assert count_items(targets) == 3
    assert count_items(targets, 3) == 4
    with pytest.raises(ValueError, match="at least one micro-batch"):
        count_items([])
    with pytest.raises(ValueError, match="at least one micro-batch"):
        accumulate_gradients(lambda batch, items: batch, [])


def rank_count(rank, ranks):
    targets = [torch.tensor([1, -100]), torch.tensor([2])][: rank + 1]
    assert count_items(targets) == rank + 1
    assert count_items(targets, group=torch.distributed.group.WORLD) == 3


def test_count_items_over_ranks(two):
    two.run(rank_count)


def test_count_items_of_shifted_and_weighted_targets(device):
    """The denominators of the losses that take these options."""
    from llmloss_ext import linear_cross_entropy

    hidden = torch.randn(2, 5, 4, device=device)
    head = torch.randn(7, 4, device=device)
    targets = torch.tensor([[1, 2, -100, 3, 4], [5, -100, -100, -100, 6]], device=device)
    weights = torch.rand(2, 5, device=device)
    assert count_items([targets], shift=1) == 4
    for options in ({}, {"shift": 1}, {"weights": [weights]}, {"weights": [weights], "shift": 1}):
        arguments = {"shift": options.get("shift", 0)}
        if "weights" in options:
            arguments["token_weight"] = weights
        mean = linear_cross_entropy(hidden, head, targets, **arguments)
        items = count_items([targets], **options)
        again = linear_cross_entropy(hidden, head, targets, **arguments, num_items=items)
        torch.testing.assert_close(again, mean)
    for wrong in ({"shift": -1}, {"weights": []}, {"weights": [weights[:1]]},
                  {"weights": [weights[:, 1:]], "shift": 1}):  # fmt: skip
        with pytest.raises(ValueError):
            count_items([targets], **wrong)


def rank_accumulate(rank, ranks):
    """DistributedDataParallel over unequal micro-batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 9).double()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 9, (20,))
    y[1:9] = -100
    loss = cross_entropy(model(x), y)
    (expected,) = torch.autograd.grad(loss, model.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    mine = ((0, 3), (3, 12)) if rank == 0 else ((12, 13), (13, 20))
    total = accumulate_gradients(
        lambda batch, items: cross_entropy(parallel(batch[0]), batch[1], num_items=items),
        [((x[a:b], y[a:b]), y[a:b]) for a, b in mine],
        group=torch.distributed.group.WORLD,
    )
    assert float(total) == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(model.weight.grad, expected)


def test_ranks_with_unequal_tokens_equal_the_large_batch(two):
    two.run(rank_accumulate)


@SETTINGS
@hypothesis.given(
    st.integers(0, 10_000), st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1,
                                     max_size=6), st.sampled_from(["logits", "hidden"])
)  # fmt: skip
def test_micro_batches_equal_the_large_batch(seed, parts, kind):
    """However many, however long, and however many of each one's tokens are ignored."""
    from llmloss_ext.training import accumulate_gradients

    torch.manual_seed(seed)
    model = torch.nn.Linear(D, V, bias=False).double()
    other = copy.deepcopy(model)
    sizes = [size for size, _ in parts]
    x, y = torch.randn(sum(sizes), D).double(), torch.randint(0, V, (sum(sizes),))
    ignored = torch.cat([torch.rand(size) < share for size, share in parts])
    y[ignored] = -100
    micro = [((a, b), b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]

    def loss(model, x, y, items=None):
        if kind == "logits":
            return cross_entropy(model(x), y, num_items=items)
        return llmloss_ext.linear_cross_entropy(x, model.weight, y, num_items=items)

    total = accumulate_gradients(lambda batch, items: loss(model, *batch, items), micro)
    if ignored.all():
        assert total == 0
        assert (model.weight.grad == 0).all()
        return
    whole = loss(other, x, y)
    whole.backward()
    assert_close(total, whole.detach(), 1e-10)
    assert_close(model.weight.grad, other.weight.grad, 1e-10)
