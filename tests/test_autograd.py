"""What autograd does with the losses besides a plain backward."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch._vmap_internals import _vmap

from llmloss_ext import cross_entropy, linear_cross_entropy, linear_log_probs, token_stats

N, D, V = 7, 6, 11
WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(N) % V
LOSSES = {
    "mean": lambda h: linear_cross_entropy(h, WEIGHT, TARGET),
    "rows": lambda h: linear_cross_entropy(h, WEIGHT, TARGET, reduction="none"),
    "log_probs": lambda h: linear_log_probs(h, WEIGHT, TARGET),
    "dense": lambda h: cross_entropy(F.linear(h, WEIGHT), TARGET, label_smoothing=0.1),
    "dense rows": lambda h: cross_entropy(F.linear(h, WEIGHT), TARGET, reduction="none"),
    "entropy": lambda h: token_stats(F.linear(h, WEIGHT), TARGET).entropy,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_a_backward_is_freed_with_its_graph(name):
    """At once, and not when the collector runs: a skipped step must not keep its gradients."""
    gc.collect()
    gc.disable()
    try:
        hidden = torch.randn(N, D, requires_grad=True) * 1
        seen = weakref.ref(hidden)
        loss = LOSSES[name](hidden)
        del hidden, loss
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LOSSES)
def test_vectorised_jacobians(name):
    hidden = torch.randn(N, D)
    rows = torch.autograd.functional.jacobian(LOSSES[name], hidden)
    vectorised = torch.autograd.functional.jacobian(LOSSES[name], hidden, vectorize=True)
    assert_close(vectorised, rows, 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_vectorised_backward_in_a_thread_of_its_own(name):
    """As on a CUDA device: that thread is in no vmap, whatever its gradients are of."""
    hidden = torch.randn(N, D, requires_grad=True)
    loss = LOSSES[name](hidden)
    upstream = torch.randn(3, *loss.shape)
    with ThreadPoolExecutor(1) as pool:

        def gradient(v):
            done = pool.submit(torch.autograd.grad, loss, hidden, v, retain_graph=True)
            return done.result()[0]

        together = _vmap(gradient)(upstream)
        assert_close(together, torch.stack([gradient(v) for v in upstream]), 1e-6)


def test_several_gradients_at_once():
    logits = torch.randn(N, V, requires_grad=True)
    stats = token_stats(logits, TARGET)
    upstream = torch.randn(3, N)
    (together,) = torch.autograd.grad(
        (stats.log_prob, stats.entropy), logits, (upstream, upstream.flip(0)),
        is_grads_batched=True, retain_graph=True,
    )  # fmt: skip
    for one, other, grad in zip(upstream, upstream.flip(0), together, strict=True):
        (alone,) = torch.autograd.grad(
            (stats.log_prob, stats.entropy), logits, (one, other), retain_graph=True
        )
        assert_close(grad, alone, 1e-6)


def test_soft_targets_under_autocast():
    """Logits of a lower precision than the targets, which autocast makes."""
    layer, x = torch.nn.Linear(D, V), torch.randn(N, D)
    target = torch.rand(N, V).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        assert logits.dtype == torch.bfloat16
        assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target), 2e-2)
    with pytest.raises(RuntimeError, match="of the input's dtype"):
        cross_entropy(logits, target)
