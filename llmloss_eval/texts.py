"""What is counted over the tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmloss_ext.integrations.scoring import TokenScores
from llmloss_ext.metrics import ReliabilityBins, perplexity

from .config import EvalConfig
from .pieces import Piece


class TextTask:
    """Sums over tokens, from which all metrics follow.

    Attributes:
        kind: The word for it in results.
        pieces: What is scored.
    """

    kind = "text"

    def __init__(self, pieces: list[Piece], text_bytes: int, config: EvalConfig) -> None:
        """Starts without tokens."""
        self.pieces = pieces
        self._bytes = text_bytes
        self._tokens = 0
        self._nats = 0.0
        self._hits = dict.fromkeys(config.top_k, 0)
        self._bins = ReliabilityBins(config.bins)

    def add(self, _pieces: Sequence[Piece], scores: TokenScores) -> None:
        """Adds the tokens of a batch."""
        self._tokens += len(scores.rank)
        self._nats -= float(scores.log_prob.double().sum())
        for k in self._hits:
            self._hits[k] += int((scores.rank < k).sum())
        self._bins.update(scores.confidence, scores.rank == 0)

    def state(self) -> dict[str, Any]:
        """The sums as plain values, to which JSON gives back all bits."""
        return {
            "tokens": self._tokens,
            "nats": self._nats,
            "hits": list(self._hits.values()),
            "bins": self._bins.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is no number.
            ValueError: There are more or fewer of them.
        """
        self._tokens, self._nats = int(state["tokens"]), float(state["nats"])
        self._hits = {k: int(n) for k, n in zip(self._hits, state["hits"], strict=True)}
        self._bins.load_state_dict(state["bins"])

    def summary(self) -> str:
        """The metrics so far, in a few words."""
        return f"perplexity {perplexity(self._loss()):,.2f}"

    def result(self) -> dict[str, Any]:
        """The metrics."""
        reliability = self._bins.compute()
        rows = zip(*(x.tolist() for x in reliability), strict=True)
        return {
            "tokens": self._tokens,
            "bytes": self._bytes,
            "nats": self._nats,
            "loss": self._loss(),
            "perplexity": perplexity(self._loss()),
            "bits_per_byte": self._nats / math.log(2) / self._bytes,
            "top_k_accuracy": {str(k): hits / self._tokens for k, hits in self._hits.items()},
            "expected_calibration_error": float(self._bins.expected_calibration_error()),
            "reliability": [
                {"tokens": n, "confidence": confidence, "accuracy": accuracy}
                for n, confidence, accuracy in rows
            ],
        }

    def _loss(self) -> float:
        return self._nats / self._tokens if self._tokens else math.nan
