"""Checkpoints, from which a run continues: bit for bit, or divided in another way within rounding.

One process writes one file. Several write their parts of the tensors into a folder beside it, by
torch.distributed.checkpoint, and then the file, which names that folder. So there is one whole
checkpoint at each moment, and any number of processes continues from either kind.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from llmloss_ext.cli import UserError, first_line

from .files import replace_file, writing
from .world import World

NAME = "checkpoint.pt"
_PARTS = "checkpoint-parts-"
_FORMAT = 3


def save(folder: Path, state: dict[str, Any], tensors: dict[str, Any], world: World) -> Path:
    """Writes the state of a run atomically; every process calls it.

    Args:
        folder: The run's output folder.
        state: Plain values and tensors, the same in every process.
        tensors: The result of `tensors_of`.
        world: The processes.

    Returns:
        The file.

    Raises:
        UserError: Something cannot be written; an earlier checkpoint is kept.
    """
    path, parts = folder / NAME, ""
    if world.is_joined:
        parts = f"{_PARTS}{world.of_first(_next_number(folder))}"
        with writing(folder / parts), _raising_the_cause():
            dcp.save(tensors, checkpoint_id=folder / parts)  # type: ignore[attr-defined]
    if world.rank == 0:
        content = {"format": _FORMAT} | state | ({"parts": parts} if parts else tensors)
        with writing(path):
            replace_file(path, lambda file: torch.save(content, file))
        for earlier in folder.glob(f"{_PARTS}*"):
            if earlier.name != parts:
                shutil.rmtree(earlier, ignore_errors=True)
    return path


def load(folder: Path) -> dict[str, Any]:
    """Reads the file that `save` wrote.

    Raises:
        UserError: There is no checkpoint, or it cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {first_line(error)}") from error
    except Exception as error:  # a broken file fails anywhere in torch's reader
        # Not in torch's words, which advise to let the file run code.
        kind = type(error).__name__
        raise UserError(
            f"cannot read the checkpoint {path}: it is damaged, or no checkpoint ({kind})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of llmloss")
    return state


def tensors_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The weights and the optimiser's moments by name, themselves and not copies.

    The names are the same however the model is divided; what is spread over the processes is a
    DTensor. An optimiser that has made no step gets its moments here, of 0.
    """
    weights, moments = get_state_dict(model, optimiser)
    once = [name for name, _ in model.named_parameters()]  # tied weights have two names
    states: Any = moments["state"]
    return {
        "model": {name: weights[name] for name in once},
        "optimiser": {f"{name}.{key}": x for name in once for key, x in states[name].items()},
    }


@torch.no_grad()
def restore(
    folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]], world: World
) -> None:
    """Reads tensors in place, however they were and are spread; every process calls it.

    Args:
        folder: The run's output folder.
        state: The result of `load`.
        tensors: The result of `tensors_of`.
        world: The processes.

    Raises:
        UserError: The processes' parts cannot be read.
        ValueError: A tensor is missing or has another shape.
        KeyError: All tensors are missing.
    """
    if "parts" in state:
        parts = folder / state["parts"]
        try:
            with _raising_the_cause(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process reads what several have written
                how = {"checkpoint_id": parts, "no_dist": not world.is_joined}
                dcp.load(tensors, **how)  # type: ignore[attr-defined]
        except Exception as error:
            raise UserError(f"cannot read the checkpoint {parts}: {first_line(error)}") from error
        return
    for kind, places in tensors.items():
        for name, place in places.items():
            saved = state[kind].get(name)
            if saved is None or saved.shape != place.shape:
                found = "nothing" if saved is None else tuple(saved.shape)
                raise ValueError(f"{kind} {name}: expected {tuple(place.shape)}, found {found}")
            if isinstance(place, DTensor):  # from what each process has read by itself
                saved = distribute_tensor(
                    saved, place.device_mesh, place.placements, src_data_rank=None
                )
            place.copy_(saved)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns a failure to use what `load` returned into a `UserError` that names the file."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the checkpoint {folder / NAME} is damaged: {reason}") from error


@contextmanager
def _raising_the_cause() -> Iterator[None]:
    """Raises what went wrong in some process, of which torch makes a BaseException of its own."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def _next_number(folder: Path) -> int:
    """Of a folder that no checkpoint names."""
    numbers = [p.name.removeprefix(_PARTS) for p in folder.glob(f"{_PARTS}*")]
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=0)
