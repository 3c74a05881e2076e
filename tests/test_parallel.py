"""Vocabulary-parallel losses: ranks with some columns each, against the whole in float64.

The functions named ``rank_...`` run on every rank of a group. What they check there fails the test.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import FLOATS, GRADIENT, VALUE, assert_close
from ranks import Ranks
from torch import Tensor

import llmloss_ext
from llmloss_ext import parallel
from llmloss_ext.composite import LogitOptions
from llmloss_ext.shard import Shard, Wanted

ROWS, COLUMNS, D = 11, 37, 16
OPTIONS = {
    "none": {},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "weight": {"weight": True, "label_smoothing": 0.1},
    "token_weight": {"token_weight": True},
    "num_items": {"num_items": 5},
    "ignore_index": {"ignore_index": 2},
    "scale": {"logit_scale": 0.7},
    "all": {
        "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0, "weight": True,
        "token_weight": True, "logit_scale": torch.tensor(1.3),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    every = Ranks(request.param)
    yield every
    every.stop()


@pytest.fixture(scope="module")
def two():
    every = Ranks(2)
    yield every
    every.stop()


class Problem:
    """The same on every rank: whole logits and targets, some of them ignored."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype, **options) -> None:
        torch.manual_seed(len(options))
        self.columns = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
        self.classes = ranks * COLUMNS
        self.logits = (3 * torch.randn(ROWS, self.classes)).to(dtype)
        self.hidden = torch.randn(ROWS, D).to(dtype)
        self.weight = (torch.randn(self.classes, D) / 2).to(dtype)
        self.bias = torch.randn(self.classes).to(dtype)
        self.target = torch.randint(0, self.classes, (ROWS,))
        self.target[3::5] = options.get("ignore_index", -100)
        self.options = dict(options)
        if options.pop("token_weight", False):
            self.options["token_weight"] = torch.rand(ROWS)
        if options.pop("weight", False):
            self.options["weight"] = torch.rand(self.classes)
        scale = options.get("logit_scale")
        self.scale = scale.clone().requires_grad_() if isinstance(scale, Tensor) else None
        if self.scale is not None:
            self.options["logit_scale"] = self.scale

    def mine(self) -> dict:
        """The options of this rank."""
        options = dict(self.options)
        if "weight" in options:
            options["weight"] = options["weight"][self.columns]
        return options

    def exact(self) -> dict:
        """The options in float64, with a scale that has a gradient of its own."""
        options = copy.copy(self.options)
        for name in ("weight", "token_weight"):
            if name in options:
                options[name] = options[name].double()
        if self.scale is not None:
            options["logit_scale"] = self.scale.detach().double().requires_grad_()
        return options


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def same_on_every_rank(tensor: Tensor) -> None:
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.detach())
    for other in every:
        assert torch.equal(other.nan_to_num(77), tensor.nan_to_num(77))


# ------------------------------------------------------------------------------ from logits


def rank_cross_entropy(rank, ranks, dtype, option, reduction, inplace):
    if option == "num_items" and reduction != "mean":
        return
    p = Problem(rank, ranks, dtype, **OPTIONS[option])
    shard, whole, exact = leaf(p.logits[:, p.columns]), leaf(p.logits.double()), p.exact()
    upstream = torch.rand(ROWS) if reduction == "none" else torch.tensor(0.3)
    given = shard * 1 if inplace else shard
    loss = parallel.cross_entropy(given, p.target, reduction=reduction, inplace=inplace, **p.mine())
    expected = llmloss_ext.cross_entropy(whole, p.target, reduction=reduction, **exact)
    loss.backward(upstream.to(loss.dtype))
    expected.backward(upstream.double())
    same_on_every_rank(loss)
    assert_close(loss.detach(), expected.detach(), VALUE[dtype])
    assert_close(shard.grad, whole.grad[:, p.columns], GRADIENT[dtype])
    if p.scale is not None:
        same_on_every_rank(p.scale.grad)
        assert_close(p.scale.grad, exact["logit_scale"].grad, 1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(ranks, option, reduction):
    ranks.run(rank_cross_entropy, torch.float32, option, reduction, False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inplace", [False, True])
def test_dtypes(two, dtype, inplace):
    two.run(rank_cross_entropy, dtype, "all", "mean", inplace)
    two.run(rank_cross_entropy, dtype, "none", "mean", inplace)


def rank_token_stats(rank, ranks, dtype, shape):
    p = Problem(rank, ranks, dtype)
    logits = p.logits.repeat(2, 1).view(*shape, -1)
    target = p.target.repeat(2).view(shape)
    shard, whole = leaf(logits[..., p.columns]), leaf(logits.double())
    stats = parallel.token_stats(shard, target, with_rank=True)
    expected = llmloss_ext.token_stats(whole, target, with_rank=True)
    upstream = torch.randn(4, *shape)
    for name, got, want in zip(stats._fields, stats, expected, strict=True):
        same_on_every_rank(got)
        if name in ("argmax", "rank"):
            assert torch.equal(got, want), name
        else:
            assert_close(got.detach(), want.detach(), VALUE[dtype])
    sum(((u * s).sum() for u, s in zip(upstream, stats[:4], strict=True))).backward()
    sum(((u * s).sum() for u, s in zip(upstream, expected[:4], strict=True))).backward()
    assert_close(shard.grad, whole.grad[..., p.columns], 4 * GRADIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_token_stats(ranks, dtype):
    ranks.run(rank_token_stats, dtype, (2 * ROWS,))
    ranks.run(rank_token_stats, dtype, (2, ROWS))


def rank_rank_of_scaled(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    for scale in (-0.5, 0.0, torch.tensor(-2.0), torch.tensor(0.1)):
        options = {"logit_scale": scale, "softcap": 9.0, "with_rank": True}
        stats = parallel.token_stats(p.logits[:, p.columns], p.target, **options)
        expected = llmloss_ext.token_stats(p.logits, p.target, **options)
        assert torch.equal(stats.rank, expected.rank)
        assert torch.equal(stats.argmax, expected.argmax)


def test_ranks_and_argmax_follow_the_scale(two):
    two.run(rank_rank_of_scaled)


def rank_padding(rank, ranks, classes):
    """Columns that stand for no class hold anything, and another rank's class is none of them."""
    p = Problem(rank, ranks, torch.float32)
    whole = leaf(p.logits[:, :classes].double())
    target = torch.arange(ROWS) % classes
    target[-1] = classes - 1
    logits = p.logits.clone()
    logits[:, classes:] = torch.tensor([1e6, torch.inf, torch.nan]).repeat(p.classes)[
        : p.classes - classes
    ]
    shard = leaf(logits[:, p.columns])
    options = {"label_smoothing": 0.3, "z_loss": 1e-3}
    loss = parallel.cross_entropy(shard, target, vocab_size=classes, **options)
    expected = llmloss_ext.cross_entropy(whole, target, **options)
    loss.backward()
    expected.backward()
    assert_close(loss.detach(), expected.detach(), 2e-6)
    padded = F.pad(whole.grad, (0, p.classes - classes))
    assert_close(shard.grad, padded[:, p.columns], 2e-6)
    used = max(min(classes - rank * COLUMNS, COLUMNS), 0)
    assert not shard.grad[:, used:].any()
    stats = parallel.token_stats(shard, target, vocab_size=classes, with_rank=True)
    expected = llmloss_ext.token_stats(whole, target, with_rank=True)
    assert torch.equal(stats.rank, expected.rank)
    assert torch.equal(stats.argmax, expected.argmax)
    weight = leaf(p.weight[p.columns])
    linear = parallel.linear_cross_entropy(p.hidden, weight, target, vocab_size=classes)
    linear.backward()
    assert not weight.grad[used:].any()
    assert_close(linear.detach(), F.cross_entropy(p.hidden @ p.weight[:classes].T, target), 1e-5)


@pytest.mark.parametrize("classes", [2 * COLUMNS - 3, COLUMNS, COLUMNS - 5, 1])
def test_padding(two, classes):
    """Also where a rank has nothing but padding [CCE 59, Megatron 737, 7464]."""
    two.run(rank_padding, classes)


def rank_uneven(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    bounds = [0, 5, p.classes - 9, p.classes][: ranks + 1]
    bounds[-1] = p.classes
    mine = slice(bounds[rank], bounds[rank + 1])
    where = {"vocab_start": mine.start, "vocab_size": p.classes}
    shard, whole = leaf(p.logits[:, mine]), leaf(p.logits)
    options = {"label_smoothing": 0.1}
    loss = parallel.cross_entropy(shard, p.target, **where, **options)
    expected = llmloss_ext.cross_entropy(whole, p.target, **options)
    loss.backward()
    expected.backward()
    assert_close(loss.detach(), expected.detach(), 2e-6)
    assert_close(shard.grad, whole.grad[:, mine], 2e-6)
    linear = parallel.linear_cross_entropy(
        p.hidden, p.weight[mine], p.target, max_chunk_bytes=2000, **where
    )
    assert_close(linear, llmloss_ext.linear_cross_entropy(p.hidden, p.weight, p.target), 1e-5)
    # A class that no rank has, or two: nobody computes a wrong loss in silence.
    for shift, owners in ((1, 0), (-1, 2)):
        target = torch.full((ROWS,), bounds[1] - (owners == 2))
        start = mine.start + shift * (rank == 1)
        with pytest.raises(ValueError, match="do not cover the vocabulary once"):
            parallel.cross_entropy(shard, target, vocab_start=start, vocab_size=p.classes)
    # Nor where no target shows it: the columns are counted.
    here = {"vocab_start": max(mine.start - 4, 0), "vocab_size": p.classes - 4}
    zeros = torch.zeros(ROWS, dtype=torch.int64)
    parallel.cross_entropy(shard, zeros, vocab_start=mine.start, vocab_size=p.classes)
    with pytest.raises(ValueError, match=f"columns are not {p.classes - 4} classes"):
        parallel.cross_entropy(shard, zeros, **here)


def test_uneven_shards(ranks):
    ranks.run(rank_uneven)


def rank_hard_numbers(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    mine = p.columns

    def check(logits, target=p.target, tolerance=2e-6):
        got = parallel.token_stats(logits[:, mine], target, with_rank=True)
        want = llmloss_ext.token_stats(logits.double(), target, with_rank=True)
        for name, one, other in zip(got._fields, got, want, strict=True):
            assert_close(one, other, tolerance), name
        shard, whole = leaf(logits[:, mine]), leaf(logits.double())
        parallel.cross_entropy(shard, target, reduction="sum").backward()
        llmloss_ext.cross_entropy(whole, target, reduction="sum").backward()
        assert_close(shard.grad, whole.grad[:, mine], tolerance)

    # A common offset costs no digits: quarters at 2^13 are exact.
    quarters = (p.logits * 4).round() / 4
    check(quarters + 8192)
    check(quarters - 8192)
    # One rank's logits far above the others'.
    far = p.logits.clone()
    far[:, COLUMNS : 2 * COLUMNS] += 300
    check(far)
    # Confident: the target's gradient keeps its digits.
    sure = torch.zeros(ROWS, p.classes)
    sure[torch.arange(ROWS), p.target.clamp_min(0)] = torch.linspace(10, 18, ROWS)
    check(sure)
    # Without -inf nothing is masked; with it, a rank may have no logit at all.
    masked = p.logits.clone()
    masked[:, COLUMNS:] = -torch.inf
    check(masked, p.target.clamp_max(COLUMNS - 1))
    lost = parallel.cross_entropy(masked[:, mine], torch.full((ROWS,), COLUMNS), reduction="none")
    assert lost.isposinf().all()
    # nan and +inf spoil their row and no other.
    spoilt = p.logits.clone()
    spoilt[0, 0], spoilt[1, -1] = torch.nan, torch.inf
    got = parallel.token_stats(spoilt[:, mine], p.target, with_rank=True)
    want = llmloss_ext.token_stats(p.logits, p.target, with_rank=True)
    assert got.log_prob[:2].isnan().all()
    assert got.rank[:2].tolist() == [p.classes] * 2
    assert got.argmax[:2].tolist() == [-1, -1]
    assert torch.equal(got.rank[2:], want.rank[2:])
    assert_close(got.lse[2:], want.lse[2:], 2e-6)
    # No token: nan as in torch, 0 with num_items, and nobody waits.
    nothing = torch.full((ROWS,), -100)
    shard = leaf(p.logits[:, mine])
    assert parallel.cross_entropy(shard, nothing).isnan()
    loss = parallel.cross_entropy(shard, nothing, num_items=3)
    loss.backward()
    assert loss == 0
    assert not shard.grad.any()
    assert parallel.cross_entropy(shard[:0], nothing[:0], reduction="sum") == 0


def test_hard_numbers(ranks):
    ranks.run(rank_hard_numbers)


def rank_bits(rank, ranks):
    """A row's statistics have the same bits alone and in any batch, and in every call."""
    p = Problem(rank, ranks, torch.float32)
    shard = p.logits[:, p.columns]
    target = p.target.clamp_min(0)
    whole = parallel.token_stats(shard, target)
    for row in range(ROWS):
        alone = parallel.token_stats(shard[row : row + 1], target[row : row + 1])
        for one, many in zip(alone[:4], whole[:4], strict=True):
            assert torch.equal(one[0], many[row])
    # Slices of (B, S, V) are read in place.
    sequences = torch.randn(3, 8, COLUMNS)
    labels = torch.randint(0, p.classes, (3, 7))
    sliced = parallel.token_stats(sequences[:, :-1], labels)
    copied = parallel.token_stats(sequences[:, :-1].contiguous(), labels)
    assert torch.equal(sliced.lse, copied.lse)
    # As many positions as columns: classes are last all the same.
    square = torch.randn(2, COLUMNS, COLUMNS)
    labels = torch.randint(0, p.classes, (2, COLUMNS))
    stats = parallel.token_stats(square, labels)
    assert torch.equal(stats.lse[1], parallel.token_stats(square[1], labels[1]).lse)


def test_bits(two):
    two.run(rank_bits)


def rank_inplace(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    shard = leaf(p.logits[:, p.columns])
    given = shard * 1
    memory = given.data_ptr()
    loss = parallel.cross_entropy(given, p.target, inplace=True)
    (grad,) = torch.autograd.grad(loss, given, retain_graph=True)
    assert grad.data_ptr() == memory
    with pytest.raises(RuntimeError, match=r"a second time|modified by an inplace"):
        torch.autograd.grad(loss, given)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        parallel.cross_entropy(shard, p.target, inplace=True)
    # Not in place, a second backward gives the same.
    loss = parallel.cross_entropy(shard, p.target)
    first, second = (torch.autograd.grad(loss, shard, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_close(grad, first, 1e-7)


def test_inplace(two):
    two.run(rank_inplace)


# ----------------------------------------------------------------------- from hidden states


def rank_linear(rank, ranks, dtype, option, reduction, how):
    if option == "num_items" and reduction != "mean":
        return
    p = Problem(rank, ranks, dtype, **OPTIONS[option])
    exact = p.exact()
    mine = [leaf(p.hidden), leaf(p.weight[p.columns]), leaf(p.bias[p.columns])]
    whole = [leaf(t.double()) for t in (p.hidden, p.weight, p.bias)]
    upstream = torch.rand(ROWS) if reduction == "none" else torch.tensor(0.3)
    options = p.mine() | {"chunk_tokens": 4, "drop_ignored": how == "drop"}
    accumulator = torch.ones_like(mine[1]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    if how == "accumulator":
        options["weight_grad_accumulator"] = accumulator
    loss = parallel.linear_cross_entropy(
        mine[0], mine[1], p.target, linear_bias=mine[2], reduction=reduction,
        sum_input_grad=how != "part", **options,
    )  # fmt: skip
    expected = llmloss_ext.linear_cross_entropy(
        whole[0], whole[1], p.target, linear_bias=whole[2], reduction=reduction, **exact
    )
    loss.backward(upstream.to(loss.dtype))
    expected.backward(upstream.double())
    same_on_every_rank(loss)
    rounded = dtype in (torch.bfloat16, torch.float16)
    assert_close(loss.detach(), expected.detach(), 2e-2 if rounded else 4 * VALUE[dtype])
    grads = [t.grad for t in mine]
    if how == "accumulator":
        assert grads[1] is None
        grads[1] = accumulator - 1
    if how == "part":
        dist.all_reduce(grads[0])
    same_on_every_rank(grads[0])
    tolerance = 3e-2 if rounded else 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(grads[0], whole[0].grad, tolerance)
    assert_close(grads[1], whole[1].grad[p.columns], tolerance)
    assert_close(grads[2], whole[2].grad[p.columns], tolerance)
    if p.scale is not None:
        assert_close(p.scale.grad, exact["logit_scale"].grad, 1e-1 if rounded else 1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear(ranks, option, reduction):
    ranks.run(rank_linear, torch.float32, option, reduction, "drop")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", ["keep", "accumulator", "part"])
def test_linear_dtypes(two, dtype, how):
    if dtype == torch.float16 and how == "accumulator":
        pytest.skip("the same as the others'")
    two.run(rank_linear, dtype, "all", "mean", how)


def rank_linear_stats(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    hidden = p.hidden.repeat(2, 1, 1)
    target = p.target.repeat(2, 1)
    mine, weight = leaf(hidden), leaf(p.weight[p.columns])
    whole = [leaf(hidden.double()), leaf(p.weight.double())]
    options = {"shift": 1, "with_rank": True, "chunk_tokens": 5}
    stats = parallel.linear_token_stats(mine, weight, target, **options)
    expected = llmloss_ext.linear_token_stats(*whole, target, **options)
    assert torch.equal(stats.rank, expected.rank)
    assert torch.equal(stats.argmax, expected.argmax)
    upstream = torch.randn(4, *target.shape)
    for got, want in zip(stats[:4], expected[:4], strict=True):
        assert_close(got.detach(), want.detach(), 1e-5)
    sum(((u * s).sum() for u, s in zip(upstream, stats[:4], strict=True))).backward()
    sum(((u * s).sum() for u, s in zip(upstream, expected[:4], strict=True))).backward()
    assert_close(mine.grad, whole[0].grad, 1e-5)
    assert_close(weight.grad, whole[1].grad[p.columns], 1e-5)
    # What is frozen costs nothing and gets nothing; without gradients there is one product.
    loss = parallel.linear_cross_entropy(p.hidden, weight, p.target)
    loss.backward()
    with torch.no_grad():
        assert parallel.linear_cross_entropy(mine[0], weight, p.target) == loss
    with torch.inference_mode():
        assert parallel.linear_cross_entropy(mine[0], weight, p.target) == loss


def test_linear_stats(ranks):
    ranks.run(rank_linear_stats)


def rank_autocast(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    hidden, weight = leaf(p.hidden), leaf(p.weight[p.columns])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = parallel.linear_cross_entropy(hidden, weight, p.target)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = llmloss_ext.linear_cross_entropy(p.hidden, p.weight, p.target)
    assert_close(loss.detach(), expected, 1e-4)
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32

    @torch.compile(backend="eager")
    def step(hidden):
        return parallel.linear_cross_entropy(hidden * 1, weight, p.target) * 2

    compiled = step(hidden)
    compiled.backward()
    assert_close(compiled.detach(), 2 * F.cross_entropy(p.hidden @ p.weight.T, p.target), 1e-5)


def test_autocast_and_compile(two):
    two.run(rank_autocast)


def rank_uneven_and_padded(rank, ranks):
    """All that depends on a rank's share of the classes, and gradients of everything."""
    p = Problem(rank, ranks, torch.float32)
    classes = p.classes - 3  # the last rank has padding
    bounds = [0, 5, p.classes - 9, p.classes][: ranks + 1]
    bounds[-1] = p.classes
    mine = slice(bounds[rank], bounds[rank + 1])
    where = {"vocab_start": mine.start, "vocab_size": classes}
    target = p.target.clamp_max(classes - 1)
    class_weight = torch.rand(p.classes)
    hidden, weight, bias = leaf(p.hidden), leaf(p.weight[mine]), leaf(p.bias[mine])
    whole = [leaf(t.double()) for t in (p.hidden, p.weight[:classes], p.bias[:classes])]
    tokens, exact_tokens = torch.rand(ROWS).requires_grad_(), None
    exact_tokens = leaf(tokens.double())
    options = {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 8.0}
    for reduction in ("mean", "sum", "none"):
        for learned in (False, True):
            given = tokens if learned else tokens.detach()
            exact = exact_tokens if learned else exact_tokens.detach()
            loss = parallel.linear_cross_entropy(
                hidden, weight, target, linear_bias=bias, weight=class_weight[mine],
                token_weight=given, reduction=reduction, max_chunk_bytes=2000, **where, **options,
            ).sum()  # fmt: skip
            expected = llmloss_ext.linear_cross_entropy(
                whole[0], whole[1], target, linear_bias=whole[2], token_weight=exact,
                weight=class_weight[:classes].double(), reduction=reduction, **options,
            ).sum()  # fmt: skip
            assert_close(loss.detach(), expected.detach(), 1e-5)
            asked = (hidden, weight, bias, *((tokens,) if learned else ()))
            wanted = (*whole, *((exact_tokens,) if learned else ()))
            grads = torch.autograd.grad(loss, asked, retain_graph=True)
            again = torch.autograd.grad(loss, asked)  # repeats the exchange on every rank
            others = torch.autograd.grad(expected, wanted)
            used = min(classes, mine.stop) - mine.start
            for i, (one, two_, other) in enumerate(zip(grads, again, others, strict=True)):
                if i in (1, 2):
                    assert not one[used:].any()
                    one, two_, other = one[:used], two_[:used], other[mine.start : mine.stop]
                assert_close(one, other, 1e-5)
                assert torch.equal(one, two_)


def test_uneven_and_padded(ranks):
    ranks.run(rank_uneven_and_padded)


def rank_other_inputs(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    weight = leaf(p.weight[p.columns])
    loss = parallel.linear_cross_entropy(p.hidden, weight, p.target)
    # int32 targets, and an ignore_index that is none.
    narrow = torch.where(p.target < 0, 0, p.target).int()
    wide = torch.where(p.target < 0, 0, p.target)
    for ignored in (0, 2**40):
        one = parallel.linear_cross_entropy(p.hidden, weight, narrow, ignore_index=ignored)
        two_ = parallel.linear_cross_entropy(p.hidden, weight, wide, ignore_index=ignored)
        assert torch.equal(one, two_)
        shard = p.logits[:, p.columns]
        one = parallel.cross_entropy(shard, narrow, ignore_index=ignored)
        assert torch.equal(one, parallel.cross_entropy(shard, wide, ignore_index=ignored))
    # No token at all.
    none = parallel.linear_cross_entropy(p.hidden[:0], weight, p.target[:0], reduction="sum")
    none.backward()
    assert none == 0
    assert not weight.grad.any()
    # Whatever weight an ignored token has.
    tokens = torch.where(p.target < 0, torch.nan, 1.0)
    assert torch.equal(
        parallel.linear_cross_entropy(p.hidden, weight, p.target, token_weight=tokens), loss
    )
    shard = p.logits[:, p.columns]
    assert torch.equal(
        parallel.cross_entropy(shard, p.target, token_weight=tokens),
        parallel.cross_entropy(shard, p.target),
    )
    # What statistics say in one number.
    log_probs = parallel.linear_log_probs(p.hidden, weight, p.target, chunk_tokens=3)
    assert_close(
        log_probs, llmloss_ext.linear_log_probs(p.hidden, p.weight, p.target).double(), 1e-5
    )
    # A checkpointed loss is computed again in backward, by all ranks.
    hidden = leaf(p.hidden)
    again = torch.utils.checkpoint.checkpoint(
        lambda x: parallel.linear_cross_entropy(x, weight, p.target, chunk_tokens=4),
        hidden, use_reentrant=False,
    )  # fmt: skip
    again.backward()
    whole = leaf(p.hidden)
    llmloss_ext.linear_cross_entropy(whole, p.weight, p.target).backward()
    assert_close(hidden.grad, whole.grad, 1e-5)
    # A group whose ranks are not the world's first.
    last_two = dist.new_group([ranks - 2, ranks - 1])
    if rank >= ranks - 2:
        here = slice((rank - ranks + 2) * COLUMNS, (rank - ranks + 3) * COLUMNS)
        target = p.target % (2 * COLUMNS)
        found = parallel.cross_entropy(p.logits[:, here], target, group=last_two)
        assert_close(found, F.cross_entropy(p.logits[:, : 2 * COLUMNS], target), 2e-6)


def test_other_inputs(ranks):
    ranks.run(rank_other_inputs)


def rank_every_option_of_statistics(rank, ranks):
    """Each alone, so that none can be ignored unnoticed."""
    p = Problem(rank, ranks, torch.float32)
    class_weight, scale = torch.rand(p.classes), torch.tensor(0.6)
    target = p.target.clone()
    target[0] = 2
    options = {
        "weight": ({"weight": class_weight[p.columns]}, {"weight": class_weight}),
        "ignore_index": ({"ignore_index": 2}, {"ignore_index": 2}),
        "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
        "logit_scale": ({"logit_scale": scale}, {"logit_scale": scale}),
        "vocab_size": ({"vocab_size": p.classes - 5}, {"vocab_size": p.classes - 5}),
        "with_rank": ({"with_rank": True}, {"with_rank": True}),
    }
    linear = {
        "linear_bias": ({"linear_bias": p.bias[p.columns]}, {"linear_bias": p.bias}),
        "shift": ({"shift": 2}, {"shift": 2}),
    }
    for name, (mine, whole) in (options | linear).items():
        labels = target.clamp_max(p.classes - 6) if name == "vocab_size" else target
        labels = torch.where(labels < 0, 0, labels) if name == "ignore_index" else labels
        found, wanted, plain = [], [], []
        if name in options:
            found += parallel.token_stats(p.logits[:, p.columns], labels, **mine)
            wanted += llmloss_ext.token_stats(p.logits, labels, **whole)
            plain += llmloss_ext.token_stats(p.logits, labels)
        found += parallel.linear_token_stats(p.hidden, p.weight[p.columns], labels, **mine)
        wanted += llmloss_ext.linear_token_stats(p.hidden, p.weight, labels, **whole)
        plain += llmloss_ext.linear_token_stats(p.hidden, p.weight, labels)
        if name not in ("weight", "with_rank"):
            where = (p.hidden, p.weight[p.columns], labels)
            found.append(parallel.linear_log_probs(*where, **mine))
            wanted.append(llmloss_ext.linear_log_probs(p.hidden, p.weight, labels, **whole))
            plain.append(llmloss_ext.linear_log_probs(p.hidden, p.weight, labels))
        if name not in ("weight", "with_rank"):
            found.append(parallel.linear_cross_entropy(*where, **mine))
            wanted.append(llmloss_ext.linear_cross_entropy(p.hidden, p.weight, labels, **whole))
            plain.append(llmloss_ext.linear_cross_entropy(p.hidden, p.weight, labels))
        differs = 0
        for one, other, without in zip(found, wanted, plain, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                assert_close(one, other, 1e-5)
                differs += without is None or not torch.equal(without, other)
        assert differs, name


def test_every_option_of_statistics(ranks):
    ranks.run(rank_every_option_of_statistics)


def rank_how_the_tokens_are_walked_through(rank, ranks):
    p = Problem(rank, ranks, torch.bfloat16)
    seen = []
    statistics = Shard.statistics

    def watched(self, logits, *others):
        seen.append(len(logits))
        return statistics(self, logits, *others)

    Shard.statistics = watched
    try:
        for run in (
            parallel.linear_cross_entropy,
            parallel.linear_token_stats,
            parallel.linear_log_probs,
        ):
            valid = int((p.target >= 0).sum())
            for options, rows in (
                ({"chunk_tokens": 4, "drop_ignored": False}, ROWS),
                ({"max_chunk_bytes": 4 * 128, "drop_ignored": False}, ROWS),
                ({"chunk_tokens": 4, "drop_ignored": True}, valid),
                ({"chunk_tokens": 4}, valid),
            ):
                seen.clear()
                run(p.hidden, p.weight[p.columns], p.target, **options)
                assert sum(seen) == rows
                assert len(seen) == 3
                assert max(seen) <= 4
            # The sums over chunks in 16 bits, or not; and the hidden states' gradient in parts.
            grads = []
            for options in ({}, {"weight_grad_dtype": torch.bfloat16}, {"sum_input_grad": False}):
                hidden, weight = leaf(p.hidden), leaf(p.weight[p.columns])
                out = run(hidden, weight, p.target, chunk_tokens=2, **options)
                (out.lse if isinstance(out, tuple) else out).sum().backward()
                grads.append((hidden.grad, weight.grad))
            assert not torch.equal(grads[0][1], grads[1][1])
            assert_close(grads[0][1], grads[1][1], 5e-2)
            assert not torch.equal(grads[0][0], grads[2][0])
            dist.all_reduce(grads[2][0])
            assert torch.equal(grads[0][0], grads[2][0])
    finally:
        Shard.statistics = statistics


def test_how_the_tokens_are_walked_through(two):
    two.run(rank_how_the_tokens_are_walked_through)


# ------------------------------------------------------------------------------- bad input


def rank_errors(rank, ranks):
    p = Problem(rank, ranks, torch.float32)
    shard = leaf(p.logits[:, p.columns])
    target = p.target.clone()
    target[2] = p.classes
    with pytest.raises(
        IndexError, match=rf"Target {p.classes} at position 2 .* \[0, {p.classes}\)"
    ):
        parallel.cross_entropy(shard, target)
    with pytest.raises(IndexError, match="position 2"):
        parallel.linear_cross_entropy(p.hidden, p.weight[p.columns], target)
    with pytest.raises(IndexError, match=rf"\[0, {COLUMNS + 1}\)"):
        parallel.cross_entropy(shard, p.target * 0 + COLUMNS + 1, vocab_size=COLUMNS + 1)
    with pytest.raises(ValueError, match="vocab_start needs vocab_size"):
        parallel.cross_entropy(shard, p.target, vocab_start=0)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, "):
        parallel.cross_entropy(shard, p.target, vocab_size=p.classes + 1)
    with pytest.raises(ValueError, match="vocab_start >= 0"):
        parallel.cross_entropy(shard, p.target, vocab_start=-1, vocab_size=9)
    with pytest.raises(ValueError, match="at least one column"):
        parallel.cross_entropy(shard[:, :0], p.target)
    with pytest.raises(ValueError, match="classes last"):
        parallel.cross_entropy(shard.view(1, ROWS, -1), p.target)
    with pytest.raises(RuntimeError, match="not probabilities"):
        parallel.cross_entropy(shard, torch.rand_like(shard))
    with pytest.raises(RuntimeError, match="all 37 classes"):
        parallel.cross_entropy(shard, p.target, weight=torch.rand(p.classes))
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda x: parallel.cross_entropy(x, p.target))(shard.detach())
    for loss in (
        parallel.cross_entropy(shard, p.target),
        parallel.linear_cross_entropy(shard[:, :D], p.weight[p.columns], p.target),
        parallel.linear_token_stats(shard[:, :D], p.weight[p.columns], p.target).lse.sum(),
    ):
        with pytest.raises(RuntimeError, match="first-order gradients only"):
            torch.autograd.grad(loss, shard, create_graph=True)
    # A group of one has all columns; who is not in it is told so.
    alone = dist.new_group([0])
    if rank == 0:
        loss = parallel.cross_entropy(p.logits, p.target, group=alone)
        assert_close(loss, F.cross_entropy(p.logits, p.target), 2e-6)
    else:
        with pytest.raises(RuntimeError, match="not in the group"):
            parallel.cross_entropy(p.logits, p.target, group=alone)


def test_errors(two):
    two.run(rank_errors)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallel.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))


# ---------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_division_merges_to_the_whole(device, dtype):
    """Without processes: parts of any sizes, one of which may have no logit."""
    logits = (5 * torch.randn(8, 60, dtype=torch.float64)).to(dtype).to(device)
    logits[2, 20:50] = -torch.inf
    logits[7, 3] = torch.nan
    target = torch.tensor([0, 59, 55, 20, 40, -100, 19, 30], device=device)
    whole = llmloss_ext.token_stats(logits, target, with_rank=True)
    for bounds in ([0, 60], [0, 20, 60], [0, 1, 20, 50, 60], [0, 13, 14, 59, 60]):
        said = []
        for begin, end in itertools.pairwise(bounds):
            shard = Shard(None, 1, begin, end - begin, 60)
            column, owned = shard.localise(target, -100)
            options = LogitOptions(1.0, 0.0, -100, 60)
            wanted = Wanted(True, True, True)
            said.append(
                shard._say(logits[:, begin:end], column, owned, None, None, options, wanted)
            )
        *stats, argmax, _, owners = torch.ops.llmloss.merge_shards(
            torch.stack(said), target, -100, 60
        )
        assert owners.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
        assert torch.equal(argmax, whole.argmax)
        for one, other in zip(stats, whole[:4], strict=True):
            assert_close(one, other, 1e-13 if dtype == torch.float64 else 1e-6)


def test_the_merge_refuses_what_it_cannot_read(device):
    said = torch.zeros(2, 9, 3, device=device)
    target = torch.arange(3, device=device)
    merge = torch.ops.llmloss.merge_shards
    for wrong in (said[:, :8], said[0], said.transpose(1, 2), said.bfloat16()):
        with pytest.raises(RuntimeError, match=r"ranks, 9, rows"):
            merge(wrong, target, -100, 9)
    for wrong in (target[:2], target.float(), target.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="expected 3 contiguous"):
            merge(said, wrong, -100, 9)


def test_a_target_elsewhere_is_nothing_but_missing(device):
    """The kernels' part of it: statistics and gradient of a row whose target is no column."""
    logits = torch.randn(3, 300, device=device)
    target = torch.tensor([-1, 5, -100], device=device)
    options = (None, None, 1.0, 0.0, -100, 300)
    stats = torch.ops.llmloss.token_stats(logits, target, *options, True, True, True, 900)
    known = torch.ops.llmloss.token_stats(
        logits, target.where(target != -1, 7), *options, True, True, True, 900
    )
    for i in (1, 2, 3, 4, 6):
        assert torch.equal(stats[i], known[i])
    ones = torch.ones(3, device=device)
    _, _, entropy, _, _, _, state = stats
    grad, _ = torch.ops.llmloss.token_stats_backward(
        ones, None, None, None, logits, target, *options, entropy, state, False, 900
    )
    p = logits.double().softmax(-1)
    assert_close(grad[0], -p[0], 1e-6)
    assert_close(grad[1], F.one_hot(target[1:2], 300)[0] - p[1], 1e-6)
    assert not grad[2].any()
    if logits.device.type == "cpu":  # -1 is no target unless the columns are said to be a shard's
        with pytest.raises(IndexError, match="Target -1"):
            torch.ops.llmloss.token_stats(logits, target, *options, True, True, True)
