"""Bad input of the linear losses: a clear error of the kind torch users know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmloss_ext import linear_cross_entropy, linear_log_probs, linear_token_stats

from .problem import D, N, V

ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("features", {"linear_weight": torch.randn(V, D + 1)}, ValueError, "a weight (V, D), got"),
    ("rank", {"linear_weight": torch.randn(V)}, ValueError, "a weight (V, D), got"),
    ("dimensions", {"linear_weight": torch.randn(V, 2, D)}, ValueError,
     f"target must have shape ({N}, 2), got"),
    ("dimensions' shift", {"linear_weight": torch.randn(V, 2, D), "shift": 1}, ValueError,
     "return_stats and weight_grad_accumulator need a weight (V, D)"),
    ("empty", {"linear_weight": torch.randn(0, D)}, ValueError, "the weight is empty"),
    ("bias", {"linear_bias": torch.randn(V + 1)}, ValueError, "the bias must have shape"),
    ("target", {"target": torch.zeros(N + 1).long()}, ValueError, "does not fit hidden states"),
    ("class", {"target": torch.full((N,), V)}, IndexError, "out of bounds"),
    ("dtype", {"linear_weight": torch.randn(V, D).bfloat16()}, RuntimeError, "the same dtype"),
    ("integer input", {"input": torch.ones(N, D).long()}, RuntimeError, "expected hidden states"),
    ("chunk", {"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
    ("budget", {"max_chunk_bytes": 100}, ValueError, "at least 512, the logits of one token"),
    ("shift", {"shift": -1}, ValueError, "shift must be an integer >= 0"),
    ("reduction", {"reduction": "avg"}, ValueError, "not a valid value for reduction"),
    ("smoothing", {"label_smoothing": 1.5}, ValueError, "label_smoothing must be between"),
    ("softcap", {"softcap": -1.0}, ValueError, "softcap must be"),
    ("vocab_size", {"vocab_size": V + 1}, ValueError, "vocab_size must be in"),
    ("items", {"num_items": -1}, ValueError, "num_items must be >= 0"),
    ("weight", {"weight": torch.ones(V - 1)}, RuntimeError, "weight tensor should be defined"),
    ("tokens", {"token_weight": torch.ones(N + 1)}, ValueError, "one number per token"),
    ("accumulator", {"weight_grad_accumulator": torch.zeros(V, 3)}, ValueError, "the weight's"),
    ("accumulator dtype",
     {"weight_grad_accumulator": torch.zeros(V, D).half(), "weight_grad_dtype": torch.float32},
     ValueError, "weight_grad_accumulator must be of torch.float32, got torch.float16"),
    ("accumulator strides", {"weight_grad_accumulator": torch.zeros(D, V).t()}, ValueError,
     f"weight_grad_accumulator must be contiguous, got strides (1, {V})"),
    ("complex bias", {"linear_bias": torch.zeros(V).cfloat()}, RuntimeError,
     "linear_bias must be float32, bfloat16, float16 or float64, got torch.complex64"),
    ("integer bias", {"linear_bias": torch.zeros(V).int()}, RuntimeError, "linear_bias must be"),
    ("half a chunk", {"chunk_tokens": 2.5}, TypeError, "chunk_tokens must be an integer, got 2.5"),
    ("half a byte", {"max_chunk_bytes": 1e6}, TypeError, "max_chunk_bytes must be an integer"),
    ("half an index", {"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    ("half a shift", {"shift": 0.5}, TypeError, "shift must be an integer, got 0.5"),
    ("half a class", {"vocab_size": 9.5}, TypeError, "vocab_size must be an integer, got 9.5"),
    ("shorts as targets", {"target": torch.zeros(N).short(), "shift": 1}, RuntimeError,
     "expected class indices of int64, int32 or uint8, got torch.int16"),
    ("probabilities ignored", {"target": torch.rand(N, V), "ignore_index": 3}, RuntimeError,
     "ignore_index is not supported for floating point target"),
    ("options", {"options": {"batch_chunk_size": 3}}, TypeError,
     "options must be a torch.nn.LinearCrossEntropyOptions, got dict"),
    ("gradient dtype", {"weight_grad_dtype": torch.int8}, ValueError, "weight_grad_dtype must be"),
    ("device", {"target": torch.zeros(N, device="meta").long()}, RuntimeError, "same device"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "kind", "words"), ERRORS)
def test_bad_input(name, changes, kind, words):
    arguments = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(V, D),
        "target": torch.zeros(N).long(),
        **changes,
    }
    with pytest.raises(kind) as caught:
        linear_cross_entropy(**arguments)
    assert words in str(caught.value)


def test_token_stats_want_class_indices():
    with pytest.raises(RuntimeError, match="must hold class indices"):
        linear_token_stats(torch.randn(3, D), torch.randn(V, D), torch.rand(3, V))


@pytest.mark.parametrize("bad", [V, -1, 2**31 - 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_out_of_range(bad, reduction, weighted):
    """[apex, quack, flash-attention]: its value and position are named, with class weights too."""
    target = torch.zeros(N).long()
    target[5] = bad
    weight = torch.ones(V) if weighted else None
    hidden, projection = torch.randn(N, D), torch.randn(V, D, requires_grad=True)
    with pytest.raises(IndexError, match=f"Target {bad} at position 5 is out of bounds"):
        linear_cross_entropy(hidden, projection, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("options", [{}, {"drop_ignored": False}, {"shift": 1}])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_token_stats, linear_log_probs])
def test_a_target_out_of_range_is_found_beyond_its_chunk(function, options):
    target = torch.zeros(4, 5).long()
    target[0, :3], target[2, 3] = -100, V + 7
    if "shift" in options:
        target[1, 0] = -5  # no token predicts it
    with pytest.raises(IndexError, match=rf"Target {V + 7} at position \(2, 3\) is out of bounds"):
        function(torch.randn(4, 5, D), torch.randn(V, D), target, chunk_tokens=4, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_target_out_of_range_on_cuda(reduction):
    """No device assert, which would end the process: nan instead."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    target = torch.full((N,), V, device="cuda")
    weight = torch.ones(V, device="cuda")
    hidden, projection = torch.randn(N, D, device="cuda"), torch.randn(V, D, device="cuda")
    loss = linear_cross_entropy(hidden, projection, target, weight=weight, reduction=reduction)
    assert loss.isnan().all()
