"""Checkpoints of `llmloss train`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from llmloss_ext.cli import UserError, first_line
from llmloss_ext.integrations.scoring import TokenScores, linear_scores
from llmloss_train import checkpoint, tokens
from llmloss_train.config import resumed
from llmloss_train.model import GPT
from llmloss_train.world import World

from .language_model import LanguageModel, with_dtype


def open_checkpoint(folder: Path, device: torch.device, dtype: str) -> LanguageModel:
    """Opens the output folder of a run, of however many processes.

    Raises:
        UserError: mistral-common is missing, which has the vocabulary, or the checkpoint is
            damaged.
    """
    if importlib.util.find_spec("mistral_common") is None:
        raise UserError(f"{folder} needs mistral_common: pip install 'llmloss_ext[eval]'")
    state = checkpoint.load(folder)
    with checkpoint.reading(folder):
        config = resumed(state["config"], {})
        vocab_size = _vocab_size(folder, state)
        model = GPT(vocab_size, config.seq_len, config.dim, config.layers, config.heads, config.mtp)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        checkpoint.restore(folder, state, {"model": weights}, World())
    model = with_dtype(model, dtype).to(device)

    @torch.no_grad()
    def score(ids: Tensor, target: Tensor) -> TokenScores:
        scores: TokenScores = model(
            ids, lambda hidden, weight: linear_scores(hidden, weight, target)
        )
        return scores

    return LanguageModel(
        name=str(folder),
        module=model,
        score=score,
        encode=tokens.encode,
        separator=tokens.separator(),
        context=config.seq_len,
        vocab_size=vocab_size,
        from_hidden=True,
    )


def _vocab_size(folder: Path, state: dict[str, Any]) -> int:
    """The rows of the embedding."""
    name = "embedding.weight"
    if "parts" not in state:
        return int(state["model"][name].shape[0])
    parts = folder / state["parts"]
    try:
        reader: Any = FileSystemReader(parts)
        return int(reader.read_metadata().state_dict_metadata[f"model.{name}"].size[0])
    except Exception as error:  # a broken file fails anywhere in torch's reader
        raise UserError(f"cannot read the checkpoint {parts}: {first_line(error)}") from error
