"""What profilers see of a public call."""

from __future__ import annotations

import torch

from llmloss_ext import (
    cross_entropy,
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    nn,
    parallel,
    token_stats,
)

H, W = torch.randn(6, 4), torch.randn(9, 4)
X, Y = torch.randn(2, 3, 9, dtype=torch.bfloat16), torch.randint(0, 9, (2, 3))
CALLS = {
    "llmloss.cross_entropy(N=6, V=9, bfloat16)": lambda: cross_entropy(X, Y),
    "llmloss.cross_entropy(N=2, V=9, float32)": lambda: nn.CrossEntropyLoss()(
        target=Y[:, 0], input=X[:, 0].float()
    ),
    "llmloss.token_stats(N=6, V=9, bfloat16)": lambda: token_stats(X, Y),
    "llmloss.linear_cross_entropy(N=6, D=4, V=9, float32)": lambda: linear_cross_entropy(
        H, W, Y.flatten()
    ),
    "llmloss.linear_token_stats(N=6, D=4, V=9, float32)": lambda: linear_token_stats(
        H, W, Y.flatten()
    ),
    "llmloss.linear_log_probs(N=6, D=4, V=9, float32)": lambda: linear_log_probs(
        input=H, linear_weight=W, target=Y.flatten()
    ),
    "llmloss.linear_kl_div(N=6, D=4, V=9, float32)": lambda: linear_kl_div(H, W, H, W),
}


def ranges(call):
    # acc_events: torch 2.11 warns of what is lost between several cycles, also where there is one.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        call()
    return [e.key for e in profile.key_averages() if e.key.startswith("llmloss.")]


def test_each_public_call_has_one_named_range():
    for name, call in CALLS.items():
        assert ranges(call) == [name]


def test_a_call_that_is_not_profiled_has_none(monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", None)  # it would be called
    for call in CALLS.values():
        call()


def test_what_is_wrapped_keeps_its_name_and_documentation():
    for function in (cross_entropy, linear_kl_div, parallel.cross_entropy):
        assert function.__module__.startswith("llmloss_ext")
        assert "Args:" in function.__doc__
