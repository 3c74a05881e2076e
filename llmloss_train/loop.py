"""The training run: steps, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmloss_ext.losses import CombinedLoss, combined_loss
from llmloss_ext.metrics import perplexity
from llmloss_ext.training import LossMonitor, count_items

from . import checkpoint, memory
from .auxiliary import Auxiliary
from .config import TrainConfig
from .losses import Objective, TokenScores, create_loss
from .model import GPT, parameter_count
from .parallel import clip_gradients, divide, of_one_kind
from .report import Metrics
from .stopping import stop_requests
from .tokens import TokenText
from .windows import IGNORED, Order, Windows, split
from .world import World

_WEIGHT_DECAY = 0.1
_BETAS = (0.9, 0.95)
_WARM_UP = 0.1  # share of the steps
_FINAL_RATE = 0.1  # share of the peak rate
_LEAST_FACTOR = 1 / 64  # spikes lower the rate to this share of the schedule at most


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM: the run stopped between two steps, and its checkpoint is written."""


@dataclass
class Totals:
    """Totals for the closing table."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_seconds: float = 0.0


class Run:
    """One training run, new or resumed: this process's part of it."""

    def __init__(
        self,
        config: TrainConfig,
        text: TokenText,
        folder: Path,
        state: dict[str, Any] | None,
        device: torch.device,
        world: World,
    ) -> None:
        """Prepares the model and, if ``state`` is given, restores it.

        Args:
            config: The settings.
            text: The tokens.
            folder: Where checkpoints and metrics go; it is made last, once all else is right.
            state: The result of `checkpoint.load`, to resume a run.
            device: That of this process.
            world: The processes of the run.

        Raises:
            UserError: The text is too short, the memory too small, the checkpoint damaged, the
                folder not to be written, or the processes too many.
        """
        self.config, self.folder = config, folder
        self.device, self.world = device, world
        self.key = text.key
        self.training, self.validation = split(text.ids, config.seq_len, text.separator)
        self.order = Order(len(self.training), config.seed)
        torch.manual_seed(config.seed)
        size = (text.vocab_size, config.seq_len, config.dim, config.layers)
        extras = (config.mtp, config.adversarial > 0)
        least = _least_bytes(config, parameter_count(*size, *extras))
        memory.require(self.device, least // world.size, world.local_size)  # at the least, a share
        self.model = GPT(*size, config.heads, *extras).to(self.device)
        self.layout = divide(self.model, config, world, self.device)
        self.loss = create_loss(config.loss, self.device, Objective.of(config))
        self.auxiliary = Auxiliary(config, self.model, self.layout, text.separator)
        self.monitor = LossMonitor(config.spike_threshold)
        self.rate_factor = 1.0  # lowered at spikes
        self.optimiser = torch.optim.AdamW(
            of_one_kind(self.model.parameter_groups(_WEIGHT_DECAY)),
            lr=config.lr,
            betas=_BETAS,
            fused=True,
        )
        self.step = self.position = 0
        self.totals = Totals()
        if state is not None:
            with checkpoint.reading(folder):
                self._restore(state)
        resume_at = None if state is None else self.step
        self.metrics = Metrics(None if world.rank else folder, resume_at)

    def describe(self) -> str:
        """Describes the model, its training and the processes in one line."""
        return self.config.describe() + (
            f", {self.world.size} processes ({self.config.parallel})" if self.world.size > 1 else ""
        )

    def train(self, show: Callable[[dict[str, Any]], None]) -> None:
        """Trains until ``config.steps``; each metrics record is also passed to ``show``.

        Raises:
            Interrupted: After Ctrl-C or SIGTERM; the checkpoint is written first.
        """
        try:
            if self.world.of_first(not self.metrics.records):
                self._record(self._validate(), show)
            with stop_requests() as stopped:
                while self.step < self.config.steps:
                    self._advance(show)
                    if self.world.any(stopped()):
                        self.save()
                        raise Interrupted
        finally:
            self.metrics.close()

    def _advance(self, show: Callable[[dict[str, Any]], None]) -> None:
        """Runs one step, and then the logging, validation and checkpoint that are due."""
        record = self._train_step()
        if record is not None:
            self._record(record, show)
        if self._due(self.config.eval_every):
            self._record(self._validate(), show)
        if self._due(self.config.save_every):
            self.save()

    def save(self) -> Path:
        """Writes a checkpoint; every process calls it."""
        return checkpoint.save(
            self.folder,
            {
                "config": self.config.to_dict(),
                "text_key": self.key,
                "step": self.step,
                "position": self.position,
                "random": torch.get_rng_state(),
                "totals": vars(self.totals),
                "monitor": self.monitor.state_dict(),
                "rate_factor": self.rate_factor,
            },
            checkpoint.tensors_of(self.model, self.optimiser),
            self.world,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        tensors = checkpoint.tensors_of(self.model, self.optimiser)
        checkpoint.restore(self.folder, state, tensors, self.world)
        torch.set_rng_state(state["random"])
        self.step, self.position = state["step"], state["position"]
        self.totals = Totals(**state["totals"])
        self.monitor.load_state_dict(state["monitor"])
        self.monitor.spike_threshold = self.config.spike_threshold
        self.rate_factor = state["rate_factor"]

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _record(self, record: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        self.metrics.add(record)
        show(record)

    def _rate(self) -> float:
        """Linear warm-up, then a cosine down to a tenth of the peak."""
        warm_up = max(1, round(_WARM_UP * self.config.steps))
        if self.step < warm_up:
            return self.config.lr * (self.step + 1) / warm_up
        done = (self.step - warm_up) / max(1, self.config.steps - warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.config.lr * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which matrix products have the dtype of the settings."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype))

    def batch(self, windows: Windows, indices: list[int]) -> tuple[Tensor, Tensor]:
        """This process's part of some windows, on its device: token ids and targets (B, S)."""
        return self._part(*windows.batch(indices))

    def _part(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.layout.rows(len(inputs))
        return inputs[rows].to(self.device), targets[rows].to(self.device)

    def _train_step(self) -> dict[str, Any] | None:
        """Runs one optimiser step over all micro-batches; returns a record if one is due."""
        config, started = self.config, time.perf_counter()
        step = []
        for _ in range(config.accumulate):
            step.append(self.training.batch(self.order.take(self.position, config.batch_size)))
            self.position += config.batch_size
        batches = [self._part(*micro_batch) for micro_batch in step]
        items = count_items((t for _, t in batches), IGNORED, group=self.layout.group)
        num_items = self.layout.divisor(items)
        last = self.step + 1
        logs = last % config.log_every == 0 or last == config.steps
        losses = torch.zeros(2 + len(self.auxiliary.weights), device=self.device)
        scores = []
        self.auxiliary.begin_step(step)
        for number, (inputs, targets) in enumerate(batches):
            use = partial(self._losses, number, targets, num_items, logs)
            with self.layout.micro_batch(number + 1 == len(batches)):
                with self.autocast():
                    combined, score = self.layout.forward(inputs, use)
                combined.total.backward()
            losses += torch.stack([combined.total.detach(), *combined.terms.values()])
            if score is not None:
                scores.append((score, targets))
        norm = clip_gradients(self.model.parameters(), config.clip)
        means = self.world.mean([*losses.tolist(), *_hits(scores)])
        watched, loss, *terms = means[: len(losses)]
        spike, skipped = self._react(watched, float(norm))
        rate = self._rate() * self.rate_factor
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if not skipped:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        loss_seconds = self.loss.clock.take()
        seconds = time.perf_counter() - started
        tokens = max(int(items), 1)
        self.totals.steps += 1
        self.totals.tokens += tokens
        self.totals.seconds += seconds
        self.totals.loss_seconds += loss_seconds
        if not (logs or spike or skipped):
            return None
        return {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "perplexity": perplexity(loss),
            **_accuracies(*means[len(losses) :]),
            "lr": rate,
            "grad_norm": float(norm),
            "tokens_per_second": tokens / seconds,
            "loss_seconds": loss_seconds,
            **({"spike": config.on_spike} if spike else {}),
            **({"skipped": True} if skipped else {}),
            **dict(zip(self.auxiliary.weights, terms, strict=True)),
        }

    def _losses(
        self,
        micro_batch: int,
        targets: Tensor,
        num_items: Tensor,
        with_scores: bool,
        hidden: Tensor,
        weight: Tensor,
    ) -> tuple[CombinedLoss, TokenScores | None]:
        """The loss of a micro-batch and its terms, the language model's first; and the scores."""
        loss, scores = self.loss.train(hidden, weight, targets, num_items, with_scores)
        combined = combined_loss(
            {"lm": loss, **self.auxiliary.terms(micro_batch, hidden)},
            {"lm": 1.0, **self.auxiliary.weights},
        )
        return combined, scores

    def _react(self, loss: float, norm: float) -> tuple[bool, bool]:
        """Decides whether the step is a spike and whether to skip it; may lower the rate.

        Args:
            loss: The weighted sum of the step's terms.
            norm: The norm of its gradient.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        reaction = self.config.on_spike
        jumps = reaction != "off" and self.monitor.check_spike(loss)
        spike = jumps or (reaction != "off" and not finite)
        if spike and reaction == "lower":
            self.rate_factor = max(self.rate_factor / 2, _LEAST_FACTOR)
        # A step that is not finite would destroy the weights: skip it whatever the reaction.
        return spike, not finite or (spike and reaction == "skip")

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Loss and accuracies over the whole held-out text, each token counted once."""
        size, scores = self.config.batch_size, []
        for start in range(0, len(self.validation), size):
            indices = list(range(start, min(start + size, len(self.validation))))
            inputs, targets = self.batch(self.validation, indices)
            with self.autocast():
                score = self.layout.forward(inputs, partial(self._scores, targets))
            scores.append((score, targets))
        self.loss.clock.take()
        log_prob = sum(float(s.log_prob[t != IGNORED].double().sum()) for s, t in scores)
        log_prob, *hits = self.world.mean([log_prob, *_hits(scores)])
        count = hits[-1]
        loss = -log_prob / count if count else math.nan
        return {
            "kind": "validation",
            "step": self.step,
            "loss": loss,
            "perplexity": perplexity(loss),
            **_accuracies(*hits),
        }

    def _scores(self, targets: Tensor, hidden: Tensor, weight: Tensor) -> TokenScores:
        return self.loss.score(hidden, weight, targets)


def _least_bytes(config: TrainConfig, parameters: int) -> int:
    """What a step takes at the least."""
    micro_batch = config.batch_size * config.seq_len
    # Weights, gradients and the two moments; ten activations a block, if of two bytes; the tokens.
    return (
        16 * parameters
        + 20 * config.layers * config.dim * micro_batch
        + 16 * config.accumulate * micro_batch
    )


def _hits(scores: list[tuple[TokenScores, Tensor]]) -> tuple[int, int, int]:
    """How many valid tokens have a target that ranks first, or among the first five; how many."""
    parts = [score.rank[targets != IGNORED] for score, targets in scores]
    ranks = torch.cat(parts) if parts else torch.empty(0)
    return int((ranks == 0).sum()), int((ranks < 5).sum()), len(ranks)


def _accuracies(first: float, first_five: float, count: float) -> dict[str, float]:
    """The results of `_hits` as fractions; nan without a token."""
    return {
        "accuracy": first / count if count else math.nan,
        "top5_accuracy": first_five / count if count else math.nan,
    }
