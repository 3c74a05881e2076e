"""Choices in the order of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from llmloss_ext.integrations.scoring import TokenScores
from llmloss_ext.metrics import length_normalized_score

from .config import EvalConfig
from .inputs import Question
from .pieces import Piece

SCORES = ("sum", "mean", "normalized")


class _Score(NamedTuple):
    """Of a choice: the sum of log p, and that sum divided by its length to the power of alpha."""

    sum: float
    mean: float
    normalized: float


class RankingTask:
    """The scores of each choice, the best choices, and how many of these are right.

    Attributes:
        kind: The word for it in results.
        pieces: What is scored: the choices of all questions.
    """

    kind = "ranking"

    def __init__(
        self, questions: Sequence[Question], pieces: list[Piece], config: EvalConfig
    ) -> None:
        """``pieces`` are those of all questions, in order."""
        self.pieces = pieces
        self._questions = questions
        self._alpha = config.alpha
        self._scores: list[_Score] = []

    def add(self, pieces: Sequence[Piece], scores: TokenScores) -> None:
        """Adds the scores of a batch of choices."""
        lengths = [piece.scored for piece in pieces]
        for log_probs in torch.split(scores.log_prob.double().cpu(), lengths):
            values = (length_normalized_score(log_probs, a) for a in (0.0, 1.0, self._alpha))
            self._scores.append(_Score(*map(float, values)))

    def state(self) -> dict[str, Any]:
        """The scores as plain values."""
        return {"scores": [list(score) for score in self._scores]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is no number.
            ValueError: A score has more or fewer numbers.
        """
        self._scores = [_Score(*(float(x) for x in score)) for score in state["scores"]]

    def summary(self) -> str:
        """How many choices are scored."""
        accuracy = self._accuracy(list(self._ranked()))
        if not accuracy:
            return f"{len(self._scores):,} choices"
        return f"accuracy {accuracy['sum']:.1%}"

    def result(self) -> dict[str, Any]:
        """The metrics, and the scores of each question."""
        items = list(self._ranked())
        accuracy = self._accuracy(items)
        return {
            "questions": len(items),
            "choices": len(self._scores),
            "alpha": self._alpha,
            **({"labelled": self._labelled(items), "accuracy": accuracy} if accuracy else {}),
            "items": items,
        }

    def _ranked(self) -> Iterator[dict[str, Any]]:
        """The questions whose choices are all scored."""
        begin = 0
        for question in self._questions:
            scores = self._scores[begin : begin + len(question.choices)]
            begin += len(question.choices)
            if len(scores) < len(question.choices):
                return
            of_kind = {name: [getattr(s, name) for s in scores] for name in SCORES}
            tokens = [piece.scored for piece in self.pieces[begin - len(scores) : begin]]
            chosen = {name: _best(values) for name, values in of_kind.items()}
            item = {"line": question.line, "tokens": tokens, **of_kind, "chosen": chosen}
            yield item if question.label is None else item | {"label": question.label}

    @staticmethod
    def _labelled(items: list[dict[str, Any]]) -> int:
        return sum("label" in item for item in items)

    def _accuracy(self, items: list[dict[str, Any]]) -> dict[str, float]:
        """Of each kind of score; empty without a label."""
        labelled = [item for item in items if "label" in item]
        if not labelled:
            return {}
        return {
            name: sum(item["chosen"][name] == item["label"] for item in labelled) / len(labelled)
            for name in SCORES
        }


def _best(scores: list[float]) -> int | None:
    """The first of the largest; a score that is nan is never the best, nor are all of them."""
    known = [i for i, score in enumerate(scores) if not math.isnan(score)]
    return max(known, key=scores.__getitem__, default=None)
