"""Opens the model that a word on the command line names."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from llmloss_ext.cli import UserError

from .language_model import LanguageModel

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def open_model(name: str, device: torch.device, dtype: str) -> LanguageModel:
    """Opens a model.

    Args:
        name: A folder of transformers, the output folder or checkpoint of ``llmloss train``, or
            ``module:factory``.
        device: Where it is put.
        dtype: Of `config.DTYPES`.

    Raises:
        UserError: It is none of these, or cannot be opened.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").exists():
        from .pretrained import open_pretrained

        return open_pretrained(name, device, dtype)
    from llmloss_train.checkpoint import NAME

    if path.is_dir() and (path / NAME).exists():
        from .trained import open_checkpoint

        return open_checkpoint(path, device, dtype)
    if path.is_file() and path.name == NAME:
        from .trained import open_checkpoint

        return open_checkpoint(path.parent, device, dtype)
    if path.exists():
        raise UserError(
            f"{name} is no model: a folder must hold a config.json (of transformers) or a {NAME} "
            "(of llmloss train)"
        )
    if _FACTORY.fullmatch(name):
        from .factory import open_factory

        return open_factory(name, device, dtype)
    raise UserError(
        f"there is no model {name}: name a folder of transformers, one of llmloss train, or "
        "module:factory"
    )
