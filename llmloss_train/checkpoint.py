"""Checkpoints, from which a run continues bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmloss_ext.cli import UserError

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
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails anywhere in torch's reader
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the checkpoint {path}: {reason}") from error
    if state.get("format") != _FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of llmloss")
    return state
