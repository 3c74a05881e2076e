"""Other implementations of cross entropy from logits, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Peer:
    """A peer's cross entropy with a mean, or why there is none."""

    name: str
    loss: Loss | None
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


def peers() -> list[Peer]:
    """Each peer, importable or not."""
    found = []
    for name, make in (("liger", _liger), ("quack", _quack)):
        try:
            found.append(Peer(name, make(), overwrites=True))
        except Exception as error:
            # Not only ImportError: a peer may also dislike the versions or the device it finds.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found.append(Peer(name, None, reason))
    return found
