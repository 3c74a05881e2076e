"""Other implementations of cross entropy, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Peer:
    """A peer's cross entropy with a mean, or why there is none."""

    name: str
    loss: Any  # a Loss or LinearLoss, or None
    reason: str = ""
    overwrites: bool = False  # the logits, by their gradient


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, target: liger_cross_entropy(logits, target)


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits, target: cross_entropy(
        logits, target, reduction="mean", inplace_backward=True
    )


def _liger_linear() -> LinearLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, target: liger_fused_linear_cross_entropy(hidden, weight, target)


def _cce() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target)


def peers() -> list[Peer]:
    """The peers from logits, importable or not."""
    return _found({"liger": _liger, "quack": _quack}, overwrites=True)


def linear_peers() -> list[Peer]:
    """The peers from hidden states, importable or not."""
    return _found({"liger": _liger_linear, "cce": _cce}, overwrites=False)


def _found(makers: dict[str, Callable[[], Any]], overwrites: bool) -> list[Peer]:
    found = []
    for name, make in makers.items():
        try:
            found.append(Peer(name, make(), overwrites=overwrites))
        except Exception as error:
            # Not only ImportError: a peer may also dislike the versions or the device it finds.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found.append(Peer(name, None, reason))
    return found
