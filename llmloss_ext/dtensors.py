"""DTensors: logits or a weight whose classes are sharded are what `llmloss_ext.Shard` describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .shard import Shard

__all__ = ["call_with_dtensors", "is_dtensor"]

_CLASSES = {"input": -1, "linear_weight": 0, "linear_bias": 0, "weight": 0}
"""The dimension of the classes, of the arguments that have one; hidden states have none."""


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, or a parameter made of one; imports nothing."""
    kind = type(tensor)  # a small call pays for this
    is_plain = kind is Tensor or kind is Parameter
    return not is_plain and isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def call_with_dtensors(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a function with the local parts of its DTensors.

    Logits sharded on the classes, or hidden states that are replicated beside a weight sharded on
    its rows, are vocabulary-parallel. Replicated ones are local.

    Args:
        function: A function of `llmloss_ext`.
        arguments: By name; at least one is a DTensor.

    Returns:
        Replicated DTensors, where the logits or hidden states were DTensors; else plain tensors.

    Raises:
        ValueError: The placements are others, or the DTensors are on different meshes.
    """
    from torch.distributed.tensor import DTensor, Replicate

    given: dict[str, Any] = {name: x for name, x in arguments.items() if is_dtensor(x)}
    meshes = {x.device_mesh for x in given.values()}
    if len(meshes) > 1:
        raise ValueError(f"{', '.join(given)} must be DTensors of one mesh, got {meshes}")
    (mesh,) = meshes
    is_linear = "linear_weight" in arguments
    sharded = {name: _sharded_dim(name, x, is_linear) for name, x in given.items()}
    of_classes = {dim for dim in sharded.values() if dim is not None}
    if len(of_classes) > 1:
        raise ValueError("the classes must be sharded over one dimension of the mesh")
    local = {name: x.to_local() for name, x in given.items()}
    if of_classes and mesh.size() > 1:
        (dim,) = of_classes
        _check_beside(arguments, given, sharded, is_linear)
        of = given["linear_weight" if is_linear else "input"]
        local["shard"] = _shard_of(of, mesh, dim, 0 if is_linear else of.dim() - 1)
        if arguments.get("vocab_size") is None:
            local["vocab_size"] = of.shape[0 if is_linear else -1]
    result = function(**arguments | local)
    if "input" not in given:
        return result
    replicated = [Replicate()] * mesh.ndim

    def everywhere(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        return DTensor.from_local(tensor, mesh, replicated, run_check=False)

    if isinstance(result, Tensor):
        return everywhere(result)
    return type(result)(*(everywhere(x) for x in result))


def _sharded_dim(name: str, tensor: Any, is_linear: bool) -> int | None:
    """The dimension of the mesh over which the classes are sharded; None: they are not."""
    found = None
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or tensor.device_mesh.size(dim) == 1:
            continue
        classes = _CLASSES.get(name)
        if name == "input" and is_linear:
            classes = None
        is_of_classes = classes is not None and placement.is_shard(classes % tensor.dim())
        if not is_of_classes or found is not None:
            raise ValueError(
                f"{name} has the placements {tensor.placements}: only the classes may be sharded, "
                "over one dimension of the mesh. For tokens that are sharded, call the function "
                "with to_local() and the num_items of all ranks."
            )
        found = dim
    return found


def _check_beside(
    arguments: dict[str, Any], given: dict[str, Any], sharded: dict[str, Any], is_linear: bool
) -> None:
    """Raises a ValueError if what belongs to the classes is not sharded as they are."""
    if is_linear and "input" not in given:
        raise ValueError(
            "linear_weight is sharded, but the hidden states are no DTensor. If it is a parameter "
            "of FSDP2, call this inside the forward of its unit, or pass "
            'weight.full_tensor(grad_placements=[Partial("avg")]); if it is of tensor parallelism, '
            "pass the hidden states as a replicated DTensor."
        )
    names = [
        n for n in _CLASSES if arguments.get(n) is not None and not (n == "input" and is_linear)
    ]
    apart = [name for name in names if sharded.get(name) is None]
    if apart:
        raise ValueError(f"{', '.join(apart)} must be sharded on the classes like the others")


def _shard_of(tensor: Any, mesh: Any, mesh_dim: int, dim: int) -> Shard:
    """This rank's classes: DTensor gives the last ranks fewer, or none."""
    size, ranks = tensor.shape[dim], mesh.size(mesh_dim)
    most = -(-size // ranks)
    return Shard(mesh.get_group(mesh_dim), vocab_start=most * mesh.get_local_rank(mesh_dim))
