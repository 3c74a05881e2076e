"""The loop: batches of pieces, which can be stopped between two of them and continued there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmloss_ext.cli import UserError, first_line
from llmloss_ext.integrations.scoring import TokenScores
from llmloss_train.stopping import stop_requests

from .language_model import LanguageModel
from .partial import Partial
from .pieces import Piece, batch_of

_SECONDS_BETWEEN_SAVES = 10.0


class Task(Protocol):
    """What is made of the scores."""

    kind: str
    pieces: list[Piece]

    def add(self, pieces: Sequence[Piece], scores: TokenScores) -> None:
        """Adds the scores of a batch."""

    def state(self) -> dict[str, Any]:
        """What has been added, as plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state."""

    def summary(self) -> str:
        """The result so far, in a few words."""

    def result(self) -> dict[str, Any]:
        """The result, as plain values."""


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM: the evaluation stopped between two batches."""

    def __init__(self, done: int) -> None:
        """After so many pieces."""
        super().__init__(done)
        self.done = done


def resumed_at(task: Task, partial: Partial, *, discard_others: bool) -> int:
    """Restores the task from the partial sums, and returns how many pieces these hold.

    Raises:
        UserError: They are damaged, or of other inputs, and may not be discarded.
    """
    saved = partial.load(discard_others=discard_others)
    if saved is None:
        return 0
    try:
        done = int(saved["done"])
        if not 0 <= done <= len(task.pieces):
            raise ValueError(done)
        task.restore(saved["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise partial.refusal("is damaged") from error
    return done


def evaluate(
    model: LanguageModel,
    task: Task,
    batch_size: int,
    device: torch.device,
    done: int,
    partial: Partial | None,
    show: Callable[[int], None],
) -> None:
    """Scores the pieces that are left.

    Args:
        model: It scores them.
        task: It gets the scores.
        batch_size: Pieces at a time.
        device: The model's.
        done: How many pieces are scored already: a whole number of batches.
        partial: Where the sums are kept; None: nowhere.
        show: Called with the number of pieces that are scored.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM; the partial sums are written first.
        UserError: The model fails, or the sums cannot be written.
    """
    saved_at = time.monotonic()

    def save() -> None:
        if partial is not None:
            partial.save({"done": done, "task": task.state()})

    with stop_requests() as stopped:
        while done < len(task.pieces):
            pieces = task.pieces[done : done + batch_size]
            task.add(pieces, _scores(model, pieces, device))
            done += len(pieces)
            show(done)
            if stopped() and done < len(task.pieces):
                save()
                raise Interrupted(done)
            if time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES:
                save()
                saved_at = time.monotonic()


def require_causal(model: LanguageModel, ids: Tensor) -> None:
    """Raises a `UserError` if a token changes how one before it is predicted.

    Args:
        model: It scores the tokens twice.
        ids: Some token ids (S,) on the model's device.
    """
    if len(ids) < 3:
        return
    inputs = ids[:-1].unsqueeze(0)
    targets = torch.full_like(inputs, -100)
    targets[:, :-1] = inputs[:, 1:]
    targets[:, -2] = -100  # whose target is the token that changes
    other = inputs.clone()
    other[:, -1] = (other[:, -1] + 1) % model.vocab_size
    one, two = (_called(model, x, targets).log_prob for x in (inputs, other))
    if not torch.allclose(one, two, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(
            f"{model.name} is no causal language model in evaluation mode: its predictions "
            "depend on later tokens, or on chance"
        )


def _scores(model: LanguageModel, pieces: Sequence[Piece], device: torch.device) -> TokenScores:
    return _called(model, *batch_of(pieces, device))


def _called(model: LanguageModel, ids: Tensor, targets: Tensor) -> TokenScores:
    size = f"{len(ids)} x {ids.shape[1] + 1}"  # the last token is predicted, and not read
    try:
        return model.score(ids, targets)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"not enough memory for {size} tokens: lower --batch-size or --window"
        ) from error
    except Exception as error:  # of the user's code
        raise UserError(
            f"{model.name} fails on {size} tokens: {type(error).__name__}: {first_line(error)}"
        ) from error
