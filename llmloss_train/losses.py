"""The losses behind one interface: hidden states and the projection's weight in, a scalar out.

For each, projection and loss are timed together, forward and backward. Given DTensors, they return
what this process has of the result.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import llmloss_ext
from llmloss_ext.cli import UserError

from .config import TrainConfig
from .parallel import local, whole
from .windows import IGNORED


class Objective(NamedTuple):
    """The terms of a token's loss besides -log p.

    The library offers each term by itself. To combine them, this class does what any user can do:
    it writes the loss as a differentiable expression over the token statistics.
    """

    label_smoothing: float = 0.0
    """In [0, 1]."""
    z_loss: float = 0.0
    """Factor of lse^2, at least 0."""
    focal_gamma: float = 0.0
    """Exponent of 1 - p, the factor of the cross entropy, at least 0."""
    confidence_penalty: float = 0.0
    """Factor of -entropy, at least 0."""

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """The settings of the same names."""
        return cls(*(getattr(config, name) for name in cls._fields))

    def cross_entropy_options(self) -> dict[str, Any]:
        """The terms that are options of the library's cross entropy."""
        options = self._asdict()
        del options["confidence_penalty"]
        return options

    def difficulty(self, log_prob: Tensor) -> Tensor:
        """(1 - p)^focal_gamma; where p is 1, also of ignored tokens, without a gradient."""
        least = torch.finfo(log_prob.dtype).tiny
        return (-torch.expm1(log_prob)).clamp_min(least).pow(self.focal_gamma)

    def rows(self, stats: llmloss_ext.TokenStats) -> Tensor:
        """The loss of each token in nats; 0 where it is ignored."""
        loss = (self.label_smoothing - 1) * stats.log_prob
        if self.label_smoothing:
            loss = loss - self.label_smoothing * stats.mean_log_prob
        if self.focal_gamma:
            loss = loss * self.difficulty(stats.log_prob)
        if self.z_loss:
            loss = loss + self.z_loss * stats.lse.square()
        return loss - self.confidence_penalty * stats.entropy


class TokenScores(NamedTuple):
    """How well each token was predicted. Shaped like the targets; undefined at ignored tokens."""

    log_prob: Tensor
    """log p_target in nats."""
    rank: Tensor
    """The number of logits greater than the target's: 0 is a correct prediction."""


class TokenLoss(Protocol):
    """Computes the loss of tokens, and their scores, from hidden states."""

    clock: LossClock
    objective: Objective

    def train(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor, with_scores: bool
    ) -> tuple[Tensor, TokenScores | None]:
        """Computes the loss, and on request the scores.

        Args:
            hidden: (B, S, D).
            weight: The head's (V, D).
            targets: (B, S), IGNORED where a token has no target.
            num_items: The divisor of the sum over tokens, 0-d on their device: the number of valid
                tokens in all micro-batches of the step, so that accumulation is exact.
            with_scores: Whether to return the scores as well.
        """
        ...

    def score(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenScores:
        """Computes the scores alone, for validation. Call it under `torch.no_grad`."""
        ...


class LossClock:
    """Sums the time between `start` and `stop`, by CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Starts at zero."""
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[torch.cuda.Event] = []

    def start(self, *_: object) -> None:
        """Begins an interval. Takes any arguments, so that it can be a hook."""
        if self._cuda:
            self._record()
        else:
            self._started = time.perf_counter()

    def stop(self, *_: object) -> None:
        """Ends the interval."""
        if self._cuda:
            self._record()
        else:
            self._seconds += time.perf_counter() - self._started

    def watch_backward(self, hidden: Tensor, loss: Tensor) -> None:
        """Times the backward pass of a loss, down to the gradient of the hidden states."""
        if hidden.requires_grad:
            hidden.register_hook(self.stop)  # type: ignore[no-untyped-call]
            loss.register_hook(self.start)  # type: ignore[no-untyped-call]

    def take(self) -> float:
        """Returns the seconds since the last call. Waits for the device."""
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            self._seconds += sum(start.elapsed_time(stop) for start, stop in pairs) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)


class _LossOfLogits(TokenLoss):
    """The base of the losses that compute logits: the projection and the timing."""

    def __init__(self, device: torch.device, objective: Objective) -> None:
        self.clock = LossClock(device)
        self.objective = objective

    def train(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor, with_scores: bool
    ) -> tuple[Tensor, TokenScores | None]:
        self.clock.start()
        logits = self._project(hidden, weight)
        self.clock.stop()
        scores = None
        if with_scores:  # before the loss, which may overwrite the logits
            with torch.no_grad():
                scores = self._scores(logits, targets)
        self.clock.start()
        loss = local(self._loss(logits, targets, num_items))
        self.clock.stop()
        self.clock.watch_backward(hidden, loss)
        return loss, scores

    def score(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenScores:
        return self._scores(self._project(hidden, weight), targets)

    def _project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    @abstractmethod
    def _loss(self, logits: Tensor, targets: Tensor, num_items: Tensor) -> Tensor: ...

    @abstractmethod
    def _scores(self, logits: Tensor, targets: Tensor) -> TokenScores: ...


class LinearLoss(TokenLoss):
    """llmloss_ext from hidden states: the logits are never in memory."""

    def __init__(self, device: torch.device, objective: Objective) -> None:
        """Checks that this build has kernels for the device.

        Raises:
            UserError: This build has no kernels for the device.
        """
        _require_kernels(device)
        self.clock = LossClock(device)
        self.objective = objective
        self._cross_entropy = llmloss_ext.linear_cross_entropy
        self._token_stats = llmloss_ext.linear_token_stats

    def train(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor, with_scores: bool
    ) -> tuple[Tensor, TokenScores | None]:
        """Computes the gradients too; backward only scales and returns them."""
        self.clock.start()
        if self.objective.confidence_penalty:
            stats = self._token_stats(
                hidden, weight, targets, ignore_index=IGNORED, with_rank=with_scores
            )
            loss = self.objective.rows(stats).sum() / num_items
        else:
            loss, stats = self._cross_entropy(
                hidden,
                weight,
                targets,
                ignore_index=IGNORED,
                num_items=num_items,
                return_stats=("log_prob", "rank") if with_scores else (),
                **self.objective.cross_entropy_options(),
            )
        loss = local(loss)
        self.clock.stop()
        self.clock.watch_backward(hidden, loss)
        return loss, _scores_of(stats) if with_scores else None

    def score(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenScores:
        """Takes the scores from the token statistics."""
        return _scores_of(
            self._token_stats(hidden, weight, targets, ignore_index=IGNORED, with_rank=True)
        )


def _scores_of(stats: llmloss_ext.TokenStats) -> TokenScores:
    assert stats.rank is not None  # asked for
    return TokenScores(local(stats.log_prob.detach()), local(stats.rank))


def _require_kernels(device: torch.device) -> None:
    try:
        target = torch.zeros(1, dtype=torch.int64, device=device)
        llmloss_ext.cross_entropy(torch.zeros(1, 2, device=device), target)
    except NotImplementedError as error:
        raise UserError(
            f"this build of llmloss_ext has no kernels for device {device.type}: use "
            "--loss torch or --device cpu"
        ) from error


class LogitsLoss(_LossOfLogits):
    """llmloss_ext from logits, which the gradient overwrites."""

    def __init__(self, device: torch.device, objective: Objective) -> None:
        """Checks that this build has kernels for the device.

        Raises:
            UserError: This build has no kernels for the device.
        """
        super().__init__(device, objective)
        _require_kernels(device)
        self._cross_entropy = llmloss_ext.cross_entropy
        self._token_stats = llmloss_ext.token_stats

    def _loss(self, logits: Tensor, targets: Tensor, num_items: Tensor) -> Tensor:
        if self.objective.confidence_penalty:
            stats = self._token_stats(logits, targets, ignore_index=IGNORED)
            return self.objective.rows(stats).sum() / num_items
        return self._cross_entropy(
            logits,
            targets,
            ignore_index=IGNORED,
            num_items=num_items,
            **self.objective.cross_entropy_options(),
            inplace=True,
        )

    def _scores(self, logits: Tensor, targets: Tensor) -> TokenScores:
        return _scores_of(self._token_stats(logits, targets, ignore_index=IGNORED, with_rank=True))


class TorchLoss(_LossOfLogits):
    """torch's own loss, for comparison. It takes whole rows, so a sharded weight is gathered."""

    def _project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(local(hidden), whole(weight))

    def _loss(self, logits: Tensor, targets: Tensor, num_items: Tensor) -> Tensor:
        rows, labels = logits.flatten(0, 1), targets.flatten()
        smoothing, z_loss, gamma, penalty = self.objective
        total = F.cross_entropy(
            rows, labels, ignore_index=IGNORED, reduction="none" if gamma else "sum",
            label_smoothing=smoothing,
        )  # fmt: skip
        if gamma:
            nll = F.cross_entropy(rows, labels, ignore_index=IGNORED, reduction="none")
            total = (total * self.objective.difficulty(-nll)).sum()
        if z_loss:
            total = total + z_loss * torch.logsumexp(rows, -1)[labels != IGNORED].square().sum()
        if penalty:
            log_p = torch.log_softmax(rows, -1)[labels != IGNORED]
            total = total + penalty * (log_p.exp() * log_p).sum()
        return total / num_items

    def _scores(self, logits: Tensor, targets: Tensor) -> TokenScores:
        rows, labels = logits.flatten(0, 1), targets.flatten()
        loss = F.cross_entropy(rows, labels, ignore_index=IGNORED, reduction="none")
        target_logit = rows.gather(1, labels.clamp(min=0).unsqueeze(1))
        rank = (rows > target_logit).sum(1)
        return TokenScores(-loss.view_as(targets), rank.view_as(targets))


def create_loss(kind: str, device: torch.device, objective: Objective) -> TokenLoss:
    """Makes the loss called ``kind``, one of `llmloss_train.config.LOSSES`."""
    kinds: dict[str, Callable[[torch.device, Objective], TokenLoss]] = {
        "linear": LinearLoss,
        "logits": LogitsLoss,
        "torch": TorchLoss,
    }
    return kinds[kind](device, objective)
