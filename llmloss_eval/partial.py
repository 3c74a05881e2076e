"""What an evaluation that was stopped has counted, beside the file where its result will be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from llmloss_ext.cli import UserError
from llmloss_train.files import replace_file, writing

from .config import EvalConfig
from .language_model import LanguageModel, digest_of
from .pieces import Piece

_FORMAT = 1


class Partial:
    """A file that holds the sums so far: whole at each moment, and of these inputs only."""

    def __init__(self, out: Path, key: str) -> None:
        """Of the result ``out``."""
        self.path = self.path_beside(out)
        self._key = key

    @staticmethod
    def path_beside(out: Path) -> Path:
        """The file that belongs to the result ``out``."""
        return out.with_name(f"{out.name}.partial")

    def load(self, *, discard_others: bool) -> dict[str, Any] | None:
        """The sums of the same inputs; None if there are none.

        Args:
            discard_others: Whether a file that is damaged, or of other inputs, may be replaced.

        Raises:
            UserError: It may not be.
        """
        if not self.path.exists():
            return None
        try:
            content: Any = json.loads(self.path.read_bytes())
            if content["format"] == _FORMAT and content["key"] == self._key:
                state: dict[str, Any] = content["state"]
                return state
            why = "is of another model, input or setting"
        except (OSError, ValueError, KeyError, TypeError):
            why = "is damaged"
        if discard_others:
            return None
        raise self.refusal(why)

    def refusal(self, why: str) -> UserError:
        """What a file that is not continued is told with."""
        return UserError(f"{self.path} {why}: discard it with --overwrite, or name another --out")

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file.

        Raises:
            UserError: It cannot be written; the earlier one is kept.
        """
        content = json.dumps({"format": _FORMAT, "key": self._key, "state": state}).encode()
        with writing(self.path):
            replace_file(self.path, lambda file: file.write(content))

    def remove(self) -> None:
        """Removes it, once the result is there."""
        with writing(self.path):
            self.path.unlink(missing_ok=True)


def key_of(
    model: LanguageModel, pieces: Iterable[Piece], config: EvalConfig, labels: Iterable[Any]
) -> str:
    """A hash of all that decides the result: model, weights, tokens, settings, labels."""
    digest = hashlib.sha256(digest_of(model.module).encode())
    # The name, as well: two functions may make other models of the same weights.
    digest.update(json.dumps([model.name, config.to_dict(), list(labels)]).encode())
    for ids, first in pieces:
        digest.update(f"{first}:{_listed(ids)}".encode())
    return digest.hexdigest()


def _listed(ids: Tensor) -> str:
    return ",".join(map(str, ids.tolist()))
