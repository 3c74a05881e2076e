"""Checkpoints, from which a run continues bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmloss_ext.cli import UserError, first_line

from .files import replace_file, writing

NAME = "checkpoint.pt"
_FORMAT = 2


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Writes the state of a run atomically.

    Args:
        folder: The run's output folder.
        state: Plain values and tensors.

    Returns:
        The file.

    Raises:
        UserError: The file cannot be written; an earlier checkpoint is kept.
    """
    path = folder / NAME
    with writing(path):
        replace_file(path, lambda file: torch.save({"format": _FORMAT} | state, file))
    return path


def load(folder: Path) -> dict[str, Any]:
    """Reads what `save` wrote.

    Raises:
        UserError: There is no checkpoint, or it cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails anywhere in torch's reader
        raise UserError(f"cannot read the checkpoint {path}: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of llmloss")
    return state


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns a failure to use what `load` returned into a `UserError` that names the file."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the checkpoint {folder / NAME} is damaged: {reason}") from error
