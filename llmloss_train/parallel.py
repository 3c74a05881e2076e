"""How a model and its batches are divided over the processes of a run: ``--parallel``.

Each layout gives the losses and the gradients of one process. Where each rank has some of a batch,
its losses are divided by the number of tokens of all ranks, so that it does not matter how unevenly
the valid ones fall on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llmloss_ext.cli import UserError

from .config import TrainConfig
from .model import GPT
from .world import World


class Layout:
    """One process has the whole model and whole batches.

    Attributes:
        forward: What to call instead of the model, with the arguments of `GPT.forward`.
        parts: The number of parts that a batch is cut into, one a rank; gradients are averaged over
            them.
        group: The ranks that have them; None if there is one part.
    """

    def __init__(self, model: GPT) -> None:
        """Divides nothing."""
        self.forward: nn.Module = model
        self.parts = 1
        self.group: Any = None

    def rows(self, count: int) -> slice:
        """Which of ``count`` sequences are this rank's."""
        return slice(count)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order, with a gradient."""
        return rows

    def divisor(self, items: Tensor) -> Tensor:
        """What a rank divides its sum over tokens by, given the number of tokens of all ranks.

        The average over the ranks divides by their number again. Without tokens the gradient is 0,
        not 0 / 0.
        """
        items = items.clamp_min(1)
        return items if self.parts == 1 else items.double() / self.parts

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """The context of forward and backward of a micro-batch, the last of its step or not."""
        return nullcontext()


class _DividedBatches(Layout):
    """Each rank has some sequences of a batch."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, device: str) -> None:
        super().__init__(model)
        if config.batch_size % world.size:
            raise UserError(
                f"--batch-size {config.batch_size} is not divisible by the {world.size} processes "
                f"of --parallel {config.parallel}"
            )
        self._world = world
        self.mesh = init_device_mesh(device, (world.size,), mesh_dim_names=("batch",))
        self.parts, self.group = world.size, self.mesh.get_group()

    def rows(self, count: int) -> slice:
        rank, size = self._world.rank, self._world.size
        return slice(count * rank // size, count * (rank + 1) // size)

    def gather(self, rows: Tensor) -> Tensor:
        of_all = DTensor.from_local(rows, self.mesh, [Shard(0)])
        return of_all.full_tensor(grad_placements=[Partial()])


class DataParallel(_DividedBatches):
    """DistributedDataParallel: each rank has the whole model."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, device: str) -> None:
        """Wraps the model."""
        super().__init__(model, config, world, device)
        self._replica = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            # The closing comparison of the losses predicts one token only.
            find_unused_parameters=config.mtp > 0,
        )
        self.forward = self._replica

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """The ranks exchange their gradients once a step."""
        return nullcontext() if is_last else self._replica.no_sync()


class FullySharded(_DividedBatches):
    """FSDP2: each rank keeps a part of each weight, and has it whole where it is used.

    The root unit holds the tied weight of embedding and head, so it is whole in `GPT.forward`.
    """

    def __init__(self, model: GPT, config: TrainConfig, world: World, device: str) -> None:
        """Shards the weights in place."""
        super().__init__(model, config, world, device)
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=self.mesh)


class TensorParallel(Layout):
    """Vocabulary-parallel embedding and head, split feed-forward layers; the rest is replicated.

    All ranks see the same batches. The last norm returns a DTensor: beside the head's, which is
    sharded on the classes, it tells the losses that they are vocabulary-parallel.
    """

    def __init__(self, model: GPT, config: TrainConfig, world: World, device: str) -> None:
        """Shards the weights in place, and ties embedding and head again."""
        super().__init__(model)
        if 4 * config.dim % world.size:
            raise UserError(
                f"4 x --dim {config.dim} is not divisible by the {world.size} processes of "
                "--parallel tp"
            )
        mesh = init_device_mesh(device, (world.size,), mesh_dim_names=("vocabulary",))
        everywhere = Replicate()
        as_dtensor = PrepareModuleOutput(
            output_layouts=everywhere, desired_output_layouts=everywhere, use_local_output=False
        )
        plan = {
            "embedding": RowwiseParallel(input_layouts=everywhere),
            "blocks.*.up": ColwiseParallel(),
            "blocks.*.down": RowwiseParallel(),
            "norm": as_dtensor,
            "further.*": PrepareModuleInput(
                input_layouts=everywhere, desired_input_layouts=everywhere, use_local_output=True
            ),
            "further.*.block.up": ColwiseParallel(),
            "further.*.block.down": RowwiseParallel(),
            "further.*.norm": as_dtensor,
        }
        parallelize_module(model, mesh, plan)
        model.head.weight = model.embedding.weight


_LAYOUTS = {"ddp": DataParallel, "fsdp": FullySharded, "tp": TensorParallel}


def divide(model: GPT, config: TrainConfig, world: World, device: torch.device) -> Layout:
    """Divides a model as ``config.parallel`` says, in place.

    Args:
        model: The same on every rank, on ``device``.
        config: The settings of the run.
        world: Its processes.
        device: That of this process.

    Raises:
        UserError: The processes cannot share a batch or the model evenly.
    """
    if config.parallel == "none":
        return Layout(model)
    return _LAYOUTS[config.parallel](model, config, world, device.type)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a DTensor; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, from every rank; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_one_kind(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups whose "params" are all DTensors, or none: fused steps do not take both."""
    return [group | {"params": kind} for group in groups for kind in _kinds(group["params"])]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """What torch's `clip_grad_norm_` does, of DTensors and of plain tensors together.

    Returns:
        The norm of all gradients before, 0-d: the same on every rank.
    """
    kinds = _kinds(p for p in parameters if p.grad is not None)
    norms = [whole(get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def _kinds(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Plain parameters and DTensors, without an empty list."""
    both: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        both[isinstance(parameter, DTensor)].append(parameter)
    return [kind for kind in both if kind]
