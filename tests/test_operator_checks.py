"""A direct call of an operator with wrong tensors is an error, and no fault of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmloss_ext.options import MEAN, LogitOptions, LossOptions, pack
from llmloss_ext.statistics import FloatStats, RowStats, asked

ops = torch.ops.llmloss
ROWS, COLUMNS = 4, 9


class Calls:
    """Backward of both operators with all that forward left, and one argument changed."""

    def __init__(self, device: torch.device) -> None:
        self.logits = torch.randn(ROWS, COLUMNS, device=device)
        self.target = torch.arange(ROWS, device=device)
        self.device = device

    def cross_entropy(self, **changed: Any) -> Tensor:
        options = pack(LogitOptions(1.0, 0.0, -100, COLUMNS), LossOptions(reduction=MEAN))
        _, state, denominator = ops.cross_entropy(
            self.logits, self.target, None, None, None, None, *options
        )
        a = {
            "grad_loss": torch.ones((), device=self.device),
            "token_weight": None,
            "state": state,
            "denominator": denominator,
        } | changed
        return ops.cross_entropy_backward(
            a["grad_loss"], self.logits, self.target, None, a["token_weight"], None, *options,
            a["state"], a["denominator"], False,
        )[0]  # fmt: skip

    def token_stats(self, **changed: Any) -> Tensor:
        where = (None, None, *pack(LogitOptions(1.0, 0.0, -100, COLUMNS)))
        wanted = asked(("log_prob", "lse", "entropy"))
        out = RowStats.of(ops.token_stats(self.logits, self.target, *where, wanted))
        a = {
            "log_prob": torch.ones(ROWS, device=self.device),
            "entropy_grad": None,
            "entropy": out.floats.entropy,
            "state": out.state,
        } | changed
        grads = FloatStats(log_prob=a["log_prob"], entropy=a["entropy_grad"])
        stats = out.floats._replace(entropy=a["entropy"])
        return ops.token_stats_backward(
            grads, self.logits, self.target, *where, stats, a["state"], False
        )[0]


WRONG: dict[str, tuple[str, Callable[[torch.device], dict[str, Any]], str]] = {
    "two gradients for four losses": (
        "cross_entropy", lambda d: {"grad_loss": torch.ones(2, device=d)}, "gradient",
    ),
    "no gradient": ("cross_entropy", lambda d: {"grad_loss": torch.ones(0, device=d)}, "gradient"),
    "weights for three tokens": (
        "cross_entropy", lambda d: {"token_weight": torch.ones(3, device=d)}, "token_weight",
    ),
    "a short state": ("cross_entropy", lambda d: {"state": torch.ones(3, 3, device=d)}, "state"),
    "a flat state": ("cross_entropy", lambda d: {"state": torch.ones(12, device=d)}, "state"),
    "a state of another type": (
        "cross_entropy", lambda d: {"state": torch.ones(3, 4, device=d).half()}, "state",
    ),
    "a state whose rows are apart": (
        "cross_entropy", lambda d: {"state": torch.ones(4, 3, device=d).t()}, "state",
    ),
    "half a denominator": (
        "cross_entropy", lambda d: {"denominator": torch.ones(1, device=d)}, "denominator",
    ),
    "a denominator of another type": (
        "cross_entropy", lambda d: {"denominator": torch.ones(2, device=d).double()}, "denom",
    ),
    "three gradients for four rows": (
        "token_stats", lambda d: {"log_prob": torch.ones(3, device=d)}, "gradient",
    ),
    "the state of fewer rows": (
        "token_stats", lambda d: {"state": torch.ones(3, 2, device=d)}, "state",
    ),
    "the entropy of fewer rows": (
        "token_stats", lambda d: {"entropy": torch.ones(2, device=d)}, "entropy",
    ),
    "no entropy for its gradient": (
        "token_stats",
        lambda d: {"entropy": torch.ones(0, device=d), "entropy_grad": torch.ones(4, device=d)},
        "entropy",
    ),
}  # fmt: skip


def test_right_calls_work(device: torch.device) -> None:
    calls = Calls(device)
    assert calls.cross_entropy().shape == calls.token_stats().shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_of_another_size_or_type(name: str, device: torch.device) -> None:
    operator, changes, words = WRONG[name]
    with pytest.raises(RuntimeError, match=words):
        getattr(Calls(device), operator)(**changes(device))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("operator", "changed"),
    [
        ("cross_entropy", {"grad_loss": torch.ones(4)}),
        ("cross_entropy", {"token_weight": torch.ones(4)}),
        ("cross_entropy", {"state": torch.ones(3, 4)}),
        ("cross_entropy", {"denominator": torch.ones(2)}),
        ("token_stats", {"log_prob": torch.ones(4)}),
        ("token_stats", {"state": torch.ones(3, 4)}),
        ("token_stats", {"entropy": torch.ones(4)}),
    ],
)
def test_a_tensor_on_another_device(operator: str, changed: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="on the input's device"):
        getattr(Calls(torch.device("cuda")), operator)(**changed)
