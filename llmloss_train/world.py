"""The processes of a run: which one this is, what they tell each other, and how they end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llmloss_ext.cli import INTERRUPTED, UserError, first_line, open_device

_FAILURES = "llmloss/failures"
"""The key under which the processes count those that have failed."""


@dataclass(frozen=True)
class World:
    """This process among those of its run: by default, the only one.

    Attributes:
        rank: Its number. The first, 0, prints and writes for all.
        size: The number of processes.
        local_rank: Its number on this machine, and that of its GPU.
        local_size: The number of processes on this machine.
        is_joined: Whether there is a process group, be it of one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    is_joined: bool = False

    def open_device(self, name: str) -> torch.device:
        """The device of this process.

        Args:
            name: The option ``--device``. "cuda" is another GPU in each process of a machine.

        Raises:
            UserError: The device cannot be used, or the name gives all processes one GPU.
        """
        if self.is_joined and name.startswith("cuda:"):
            raise UserError(f"--device {name} is one GPU for all processes: say --device cuda")
        if self.is_joined and name == "cuda":
            name = f"cuda:{self.local_rank}"
        device = open_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over the processes of each value, in float64; the same on all of them."""
        if not self.is_joined:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [x / self.size for x in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it holds in some process."""
        return self.mean([flag])[0] > 0

    def of_first(self, value: int) -> int:
        """The first process's value."""
        if not self.is_joined:
            return value
        told = torch.tensor(value)
        dist.broadcast(told, 0)
        return int(told)

    def require_same(self, value: object, message: str) -> None:
        """Raises a `UserError` if ``value`` differs between the processes."""
        if self.is_joined:
            every: list[object] = [None] * self.size
            dist.all_gather_object(every, value)
            if any(other != every[0] for other in every):
                raise UserError(message)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process runs the block, then all others do: they find what it has cached."""
        if self.rank:
            dist.barrier()
        yield
        if self.is_joined and not self.rank:
            dist.barrier()


@contextmanager
def joined(parallel: str) -> Iterator[World]:
    """Joins the processes that torchrun has started, for as long as the block runs.

    Only the first one's stdout is seen. Whichever fails first says why; the others, which its end
    makes fail as well, end silently. torchrun ends those that go on.

    Args:
        parallel: The option ``--parallel``.

    Raises:
        UserError: ``parallel`` and the number of processes do not fit, or another process has
            ended.
        SystemExit: Another process has said why the run ends.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        if parallel != "none":
            raise UserError(
                f"--parallel {parallel} needs several processes: torchrun --nproc-per-node 2 "
                f"-m llmloss_ext train --parallel {parallel}"
            )
        yield World()
        return
    store, rank, size = next(rendezvous("env://"))
    # NCCL between GPUs; what the processes tell each other beside that stays on the host.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    local_rank, local_size = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        if parallel == "none" and size > 1:
            raise UserError(f"there are {size} processes: say what they share by --parallel")
        with _unheard() if rank else nullcontext():
            yield World(rank, size, local_rank, local_size, is_joined=True)
        dist.barrier()  # torchrun ends all when the first one ends with an error
    except KeyboardInterrupt:
        if rank:
            raise SystemExit(INTERRUPTED) from None
        raise
    except Exception as error:
        if not _is_first_failure(store):
            raise SystemExit(1) from error
        if _is_loss(error):
            raise UserError(f"another process of this run has ended: {_brief(error)}") from error
        raise
    dist.destroy_process_group()


@contextmanager
def _unheard() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _is_first_failure(store: Any) -> bool:
    try:
        return store.add(_FAILURES, 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        return True


def _is_loss(error: Exception) -> bool:
    """Whether a collective failed because another process has ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _brief(error: Exception) -> str:
    """What gloo says, without its source line and its advice."""
    return re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]
