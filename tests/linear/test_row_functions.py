"""Functions of rows of logits from hidden states: against whole logits, and what they cost."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import assert_close
from torch.utils.flop_counter import FlopCounterMode

from llmloss_ext.linear import row_functions
from llmloss_ext.linear.row_functions import Rows, linear_rows, row_function

N, D, V, USED = 13, 4, 9, 8
LARGEST = []


@row_function
def chosen_and_scaled(rows: Rows) -> torch.Tensor:
    """A function with everything: (n, 3)."""
    LARGEST.append(rows.logits.shape[0])
    (ids,), (scale,) = rows.others, rows.shared
    real = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(rows.logits.to(real) * rows.numbers[0], -1)
    return log_p.gather(-1, ids) * scale


def inputs(dtype=torch.double, device="cpu"):
    torch.manual_seed(0)
    sizes = (N, D), (V, D), (V,), ()
    leaves = [torch.randn(size).to(device, dtype).requires_grad_() for size in sizes]
    ids = torch.randint(0, USED, (N, 3), device=device)
    valid = torch.rand(N, device=device) < 0.7
    return leaves, ids, valid


def ours(h, w, b, s, ids, valid, **how):
    return linear_rows(
        chosen_and_scaled, 3, h, w, b, others=[ids], shared=[s], numbers=[0.5], valid=valid,
        vocab_size=USED, **how,
    )  # fmt: skip


def whole(h, w, b, s, ids, valid):
    z = 0.5 * (h @ w.t() + b)[:, :USED]
    rows = torch.log_softmax(z, -1).gather(-1, ids) * s
    return rows if valid is None else torch.where(valid[:, None], rows, 0.0)


WAYS = [
    {"drop_ignored": drop, "chunk_tokens": chunk}
    for drop, chunk in itertools.product((True, False), (None, 5))
]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_values_and_derivatives(device, how):
    leaves, ids, valid = inputs(device=device)
    for some in (None, valid):
        one, other = (f(*leaves, ids, some, **k) for f, k in ((ours, how), (whole, {})))
        assert_close(one, other, 1e-12)
        upstream = torch.randn_like(one)
        for a, b in zip(
            torch.autograd.grad(one, leaves, upstream),
            torch.autograd.grad(other, leaves, upstream),
            strict=True,
        ):
            assert_close(a, b, 1e-12)
    call = functools.partial(ours, ids=ids, valid=valid, **how)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(device, dtype):
    leaves, ids, valid = inputs(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    one, other = ours(*leaves, ids, valid), whole(*exact, ids, valid)
    assert one.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(one, other, tolerance)
    for a, b in zip(
        torch.autograd.grad(one.square().sum(), leaves),
        torch.autograd.grad(other.square().sum(), exact),
        strict=True,
    ):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 3 * tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_logits(device, dtype):
    """Of 16-bit operands: only the gradient of the logits is rounded."""
    leaves, ids, valid = inputs(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    other = whole(*exact, ids, valid)
    wants = torch.autograd.grad(other.square().sum(), exact)
    for how in WAYS:
        one = ours(*leaves, ids, valid, logits_dtype=torch.float32, **how)
        assert_close(one, other, 1e-5)
        for a, b in zip(torch.autograd.grad(one.square().sum(), leaves), wants, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() < 2e-2 * b.norm()
    assert (ours(*leaves, ids, valid) - other).detach().abs().max() > 1e-4


def test_the_operators_are_what_they_say(device):
    leaves, ids, valid = inputs(torch.float32, device)
    h, w, b, s = (x.detach() for x in leaves)
    function = chosen_and_scaled.__name__
    given = row_functions.Given(
        h, w, b, [ids], [s], valid, function, [0.5], 3, USED, [7, 0, 0], False, False
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(row_functions._rows, tuple(given), test_utils=tests)
    upstream = torch.randn(N, 3, device=device)
    for needs in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            row_functions._rows_backward, (upstream, needs, *given), test_utils=tests
        )


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_takes_no_part_spoils_nothing(drop, value):
    """Rows that are not valid, rows without a gradient from above, and padded classes."""
    leaves, ids, valid = inputs()
    above = torch.randn(N, 3).double()
    above[3] = 0
    valid[3] = True
    results = []
    for spoil in (False, True):
        h, w, b, s = (x.detach().clone() for x in leaves)
        wrong = ids.clone()
        if spoil:
            h[~valid], w[USED:], b[USED:] = value, value, value
            wrong[~valid] = 10**9
        fresh = [x.requires_grad_() for x in (h, w, b, s)]
        rows = ours(*fresh, wrong, valid, drop_ignored=drop)
        results.append([rows, *torch.autograd.grad(rows, fresh, above)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[1][1][~valid] == 0).all()
    assert (results[1][1][3] == 0).all()
    assert (results[1][2][USED:] == 0).all()


def test_only_some_rows_are_there_at_a_time(monkeypatch):
    leaves, ids, _ = inputs()
    monkeypatch.setattr(row_functions, "_LEAST_ELEMENTS", 1)
    LARGEST.clear()
    rows = ours(*leaves, ids, None, chunk_tokens=8)
    assert max(LARGEST) == 1
    rows.sum().backward()
    assert max(LARGEST) == 1
    monkeypatch.undo()
    LARGEST.clear()
    ours(*leaves, ids, None, chunk_tokens=8)
    assert LARGEST == [8, 5]


def test_frozen_inputs_get_nothing():
    leaves, ids, valid = inputs()
    for frozen in range(4):
        fresh = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(leaves)]
        ours(*fresh, ids, valid).sum().backward()
        assert [x.grad is None for x in fresh] == [i == frozen for i in range(4)]


def test_products():
    leaves, ids, valid = inputs()
    product = 2 * N * D * USED
    for kept, some in ((N, None), (int(valid.sum()), valid)):
        with FlopCounterMode(display=False) as counter:
            ours(*leaves, ids, some).sum().backward()
        assert counter.get_total_flops() == 4 * product * kept // N


def test_transforms_and_compilers():
    leaves, ids, valid = inputs()

    def total(h, w, b, s):
        return ours(h, w, b, s, ids, valid).square().sum()

    wanted = torch.autograd.grad(whole(*leaves, ids, valid).square().sum(), leaves)
    for found in (
        torch.func.grad(total, (0, 1, 2, 3))(*leaves),
        torch.autograd.grad(
            torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves), leaves
        ),
    ):
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, 1e-12)
    each = torch.func.vmap(lambda h: ours(h, *leaves[1:], ids, valid))
    batch = torch.stack([leaves[0], 2 * leaves[0]])
    assert_close(each(batch)[1], whole(2 * leaves[0], *leaves[1:], ids, valid), 1e-12)


def test_autocast():
    leaves, ids, valid = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = ours(*leaves, ids, valid)
    assert_close(rows, whole(*leaves, ids, valid), 3e-2)
    rows.sum().backward()
    assert leaves[1].grad.dtype == torch.float32


def test_what_does_not_fit():
    (h, w, b, s), ids, valid = inputs()
    with pytest.raises(ValueError, match="expected hidden states"):
        ours(h, w[:, :2], b, s, ids, valid)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        ours(h, w, b, s, ids, valid, chunk_tokens=0)
