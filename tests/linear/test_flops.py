"""FLOPs that torch's counter sees: those of the products, as they run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmloss_ext import linear_cross_entropy, linear_kl_div, linear_log_probs, linear_token_stats

N, D, V = 48, 16, 96
PRODUCT = 2 * N * D * V


def tensors(hidden=True, weight=True):
    torch.manual_seed(0)
    target = torch.randint(0, V, (N,))
    leaves = torch.randn(N, D, requires_grad=hidden), torch.randn(V, D, requires_grad=weight)
    return (*leaves, target)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def backward(loss):
    return counted(lambda: loss().backward())


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_loss_has_three_products_and_four_where_logits_are_recomputed(chunk_tokens):
    h, w, y = tensors()
    plain = backward(lambda: torch.nn.functional.cross_entropy(h @ w.t(), y))
    assert plain == 3 * PRODUCT
    how = {"chunk_tokens": chunk_tokens}
    assert backward(lambda: linear_cross_entropy(h, w, y, **how)) == 3 * PRODUCT
    beside = backward(lambda: linear_cross_entropy(h, w, y, return_stats=True, **how)[0])
    assert beside == 3 * PRODUCT
    rows = backward(lambda: linear_cross_entropy(h, w, y, reduction="none", **how).sum())
    assert rows == 4 * PRODUCT
    assert backward(lambda: linear_log_probs(h, w, y, **how).sum()) == 4 * PRODUCT
    assert backward(lambda: linear_token_stats(h, w, y, **how).entropy.sum()) == 4 * PRODUCT
    main = torch.zeros(V, D)
    accumulated = backward(lambda: linear_cross_entropy(h, w, y, weight_grad_accumulator=main))
    assert accumulated == 4 * PRODUCT


@pytest.mark.parametrize(("hidden", "weight"), [(True, False), (False, True)])
def test_frozen_operands_cost_nothing(hidden, weight):
    h, w, y = tensors(hidden, weight)
    assert backward(lambda: linear_cross_entropy(h, w, y)) == 2 * PRODUCT
    assert backward(lambda: linear_log_probs(h, w, y).sum()) == 3 * PRODUCT
    with torch.no_grad():
        assert counted(lambda: linear_cross_entropy(h, w, y)) == PRODUCT


def test_dropped_tokens_and_padded_classes_are_not_counted():
    h, w, y = tensors()
    y[: N // 2] = -100
    assert backward(lambda: linear_cross_entropy(h, w, y)) == 3 * PRODUCT // 2
    assert backward(lambda: linear_cross_entropy(h, w, y, drop_ignored=False)) == 3 * PRODUCT
    assert backward(lambda: linear_log_probs(h, w, y).sum()) == 4 * PRODUCT // 2
    # Nor, in backward, tokens of which no statistic is used.
    used = backward(lambda: linear_log_probs(h, w, y)[: 3 * N // 4].sum())
    assert used == PRODUCT // 2 + 3 * PRODUCT // 4
    y = y.clamp(max=V // 2 - 1)
    assert backward(lambda: linear_cross_entropy(h, w, y, vocab_size=V // 2)) == 3 * PRODUCT // 4


def test_a_divergence_has_the_teachers_product_too():
    h, w, y = tensors()
    teacher = torch.randn(N, 2 * D), torch.randn(V, 2 * D)
    assert backward(lambda: linear_kl_div(h, w, *teacher)) == (3 + 2) * PRODUCT
    y[: N // 2] = -100
    assert backward(lambda: linear_kl_div(h, w, *teacher, target=y)) == (3 + 2) * PRODUCT // 2


def test_fake_tensors_count_every_token():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        h, w, y = tensors()
        assert backward(lambda: linear_cross_entropy(h, w, y)) == 3 * PRODUCT


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_compiled(reduction):
    h, w, y = tensors()
    y[: N // 2] = -100

    def loss(h, w, y):
        return linear_cross_entropy(h, w, y, reduction=reduction).sum()

    compiled = torch.compile(loss)
    compiled(h, w, y).backward()
    # Where a dispatch mode looks on, torch runs what it has compiled eagerly.
    products = 3 if reduction == "mean" else 4
    assert backward(lambda: compiled(h, w, y)) == products * PRODUCT // 2
