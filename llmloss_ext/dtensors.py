"""DTensors: what their placements say is computed on each rank's part.

Over each dimension of the mesh, logits (or hidden states) may be

* sharded on the classes, as a weight is on its rows: vocabulary parallelism, `llmloss_ext.Shard`;
* sharded on the tokens: local losses, a mean over the tokens of all ranks;
* sharded on the tokens beside a weight that is sharded on its rows: sequence parallelism, whose
  tokens are gathered, and whose gradients are reduced and scattered;
* replicated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .results import mapped
from .sequences import Sequences, moved
from .shard import Shard

__all__ = ["call_with_dtensors", "is_dtensor"]

_OF_CLASSES = ("linear_weight", "linear_bias", "weight")
"""The arguments whose first dimension is that of the classes."""
_OF_TOKENS = ("target", "token_weight", "attention_mask", "position_ids", "document_ids")
"""The arguments with something for each token."""


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, or a parameter made of one; imports nothing."""
    kind = type(tensor)  # a small call pays for this
    is_plain = kind is Tensor or kind is Parameter
    return not is_plain and isinstance(tensor, Tensor) and hasattr(tensor, "placements")


class _Layout(NamedTuple):
    """What the placements mean; the numbers are dimensions of the mesh."""

    mesh: Any
    classes: int | None
    """Over which the classes are sharded."""
    tokens: dict[int, int]
    """Over which the tokens are sharded, and along which dimension of the input each."""
    gathered: bool
    """Whether the tokens are sharded over the classes' dimension as well: sequence parallelism."""

    def of_tokens(self) -> list[Any]:
        """The placements of something for each token."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Sharded

        dims = range(self.mesh.ndim)
        return [Sharded(self.tokens[dim]) if dim in self.tokens else Replicate() for dim in dims]


def call_with_dtensors(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a function with the local parts of its DTensors.

    Args:
        function: A function of `llmloss_ext`.
        arguments: By name; at least one is a DTensor.

    Returns:
        DTensors, where the logits or hidden states were DTensors: what there is for each token has
        the placements of the tokens, and a loss is a partial sum over the dimensions of the mesh
        over which the tokens are sharded. Otherwise plain tensors.

    Raises:
        ValueError: The placements are others, or the DTensors are on different meshes.
    """
    given: dict[str, Any] = {name: x for name, x in arguments.items() if is_dtensor(x)}
    meshes = {x.device_mesh for x in given.values()}
    if len(meshes) > 1:
        raise ValueError(f"{', '.join(given)} must be DTensors of one mesh, got {meshes}")
    (mesh,) = meshes
    layout = _layout_of(mesh, arguments, given)
    _check_plain(layout, arguments, given)
    local = arguments | {name: _local(layout, name, x) for name, x in given.items()}
    if layout.classes is not None:
        of = given["linear_weight" if "linear_weight" in given else "input"]
        dim = 0 if "linear_weight" in given else of.dim() - 1
        local["shard"] = _shard_of(of, layout, dim)
        if arguments.get("vocab_size") is None:
            local["vocab_size"] = of.shape[dim]
    items = None
    if layout.tokens:
        _shift_labels(local)
        if _is_mean(function, local) and local.get("num_items") is None:
            local["num_items"] = items = _items_of_all_ranks(layout, local)
    result = function(**local)
    if items is not None:  # a mean of no token is nan, unlike a sum divided by num_items
        result = _times(result, torch.where(items == 0, torch.nan, 1.0))
    if "input" not in given:
        return result
    shape = given["input"].shape
    shape = shape[:1] + shape[2:] if _class_dim(given["input"], arguments) == 1 else shape[:-1]
    return mapped(lambda x: _of_mesh(layout, shape, x), result)


def _times(result: Any, factor: Tensor) -> Any:
    """A loss, or the loss that stands before its statistics."""
    if isinstance(result, Tensor):
        return result * factor.to(result.dtype)
    loss, stats = result
    return _times(loss, factor), stats


def _class_dim(input: Any, arguments: dict[str, Any]) -> int:
    """The dimension of the logits' classes, or of the hidden states' features."""
    is_first = arguments.get("class_dim") == 1
    return 1 if is_first else input.dim() - 1


def _layout_of(mesh: Any, arguments: dict[str, Any], given: dict[str, Any]) -> _Layout:
    """What the placements of the input and of what belongs to the classes mean.

    Raises:
        ValueError: Nothing that can be computed.
    """
    is_linear = "linear_weight" in arguments
    input = given.get("input")
    classes: set[int] = set()
    tokens: dict[int, int] = {}
    of_weight = {
        name: _sharded_dims(name, given[name], {0}) for name in _OF_CLASSES if name in given
    }
    if input is not None:
        last = _class_dim(input, arguments)
        known = set(range(input.dim())) - ({last} if is_linear else set())
        for dim, of_tensor in _sharded_dims("input", input, known).items():
            if of_tensor == last:
                classes.add(dim)
            else:
                tokens[dim] = of_tensor
    if is_linear:
        classes = set(of_weight.get("linear_weight", ()))
    if len(classes) > 1:
        raise ValueError("the classes must be sharded over one dimension of the mesh")
    if classes and is_linear and input is None:
        raise ValueError(
            "linear_weight is sharded, but the hidden states are no DTensor. If it is a parameter "
            "of FSDP2, call this inside the forward of its unit, or pass "
            'weight.full_tensor(grad_placements=[Partial("avg")]); if it is of tensor parallelism, '
            "pass the hidden states as a replicated DTensor."
        )
    apart = [
        name
        for name in _OF_CLASSES
        if arguments.get(name) is not None and set(of_weight.get(name, ())) != classes
    ]
    if apart:
        raise ValueError(f"{', '.join(apart)} must be sharded on the classes like the others")
    of_classes = next(iter(classes), None)
    gathered = of_classes in tokens
    if of_classes is not None:
        tokens.pop(of_classes, None)
    return _Layout(mesh, of_classes, tokens, gathered)


def _sharded_dims(name: str, tensor: Any, known: set[int]) -> dict[int, int]:
    """Over which dimensions of the mesh a tensor is sharded, and along which of its own each.

    Raises:
        ValueError: Along one that is not ``known``, or it is partial.
    """
    found = {}
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or tensor.device_mesh.size(dim) == 1:
            continue
        own = next((d for d in known if placement.is_shard(d)), None)
        if own is None:
            raise ValueError(
                f"{name} has the placements {tensor.placements}: only the classes and the tokens "
                "may be sharded"
            )
        found[dim] = own
    return found


def _check_plain(layout: _Layout, arguments: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises a ValueError if a plain tensor has to be of each rank's own tokens, or may not be."""
    if not layout.tokens:
        return
    names = (*_OF_TOKENS, *_OF_CLASSES, "logit_scale")
    plain = [n for n in names if isinstance(arguments.get(n), Tensor) and n not in given]
    if plain:
        raise ValueError(
            f"the tokens are sharded, so {', '.join(plain)} must be a DTensor of the same mesh"
        )
    last = given["target"].dim() - 1
    sequences = [n for n in ("shift", *Sequences._fields) if arguments.get(n) not in (None, 0)]
    if arguments.get("cu_seqlens") is not None or (sequences and last in layout.tokens.values()):
        raise ValueError(
            f"{', '.join(sequences)}: sequences are spread over the ranks, so their labels have to "
            "be shifted before they are"
        )


def _local(layout: _Layout, name: str, tensor: Any) -> Tensor:
    """This rank's part, whose gradient has the placements of the whole's."""
    from torch.distributed.tensor import Partial, Replicate

    placements = list(tensor.placements)
    if name == "input":
        if layout.gathered and layout.classes is not None:
            placements[layout.classes] = Replicate()
            tensor = tensor.redistribute(placements=placements)
            placements[layout.classes] = Partial()
        return tensor.to_local(grad_placements=placements)
    if name in _OF_TOKENS:
        return tensor.redistribute(placements=layout.of_tokens()).to_local()
    if any(placement.is_partial() for placement in placements):  # a number of items
        placements = [Replicate()] * len(placements)
        tensor = tensor.redistribute(placements=placements)
    for dim in layout.tokens:  # each rank has the gradient of its tokens
        placements[dim] = Partial()
    return tensor.to_local(grad_placements=placements)


def _shard_of(tensor: Any, layout: _Layout, dim: int) -> Shard:
    """This rank's classes: DTensor gives the last ranks fewer, or none."""
    assert layout.classes is not None
    size, ranks = tensor.shape[dim], layout.mesh.size(layout.classes)
    start = -(-size // ranks) * layout.mesh.get_local_rank(layout.classes)
    group = layout.mesh.get_group(layout.classes)
    return Shard(group, vocab_start=start, sum_input_grad=not layout.gathered)


def _shift_labels(local: dict[str, Any]) -> None:
    """Leaves targets and weights of what each position predicts, which can be counted."""
    shift = local.pop("shift", 0)
    sequences = Sequences(*(local.pop(name, None) for name in Sequences._fields))
    if shift or sequences.given:
        local["target"] = sequences.targets(local["target"], shift, _ignore_index(local))
        if local.get("token_weight") is not None:
            local["token_weight"] = moved(local["token_weight"], shift, 0.0)


def _ignore_index(local: dict[str, Any]) -> int:
    given = local.get("ignore_index")
    return -100 if given is None else given


def _is_mean(function: Callable[..., Any], local: dict[str, Any]) -> bool:
    if "num_items" not in inspect.signature(function).parameters:
        return False
    average, reduce = local.get("size_average"), local.get("reduce")
    if average is not None or reduce is not None:
        return bool(torch.nn._reduction.legacy_get_string(average, reduce, False) == "mean")
    return bool(local.get("reduction", "mean") == "mean")


def _items_of_all_ranks(layout: _Layout, local: dict[str, Any]) -> Tensor:
    """What a mean divides by, 0-d.

    Raises:
        ValueError: A mean of class weights or probabilities, which is not one over a number.
    """
    target, token_weight = local["target"], local.get("token_weight")
    if local.get("weight") is not None or target.is_floating_point():
        raise ValueError(
            "the tokens are sharded: a mean with class weights or of probabilities needs num_items"
        )
    counted = (target != _ignore_index(local)).double()
    if token_weight is not None:
        counted = torch.where(counted > 0, token_weight.detach().double(), 0.0)
    items = counted.sum()
    for dim in layout.tokens:
        torch.distributed.all_reduce(items, group=layout.mesh.get_group(dim))
    return items


def _of_mesh(layout: _Layout, shape: torch.Size, tensor: Tensor) -> Any:
    """A result as a DTensor; what there is for each token has the shape ``shape``."""
    from torch.distributed.tensor import DTensor, Partial

    placements = layout.of_tokens()
    if tensor.dim():
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            tensor, layout.mesh, placements, run_check=False, shape=shape, stride=stride
        )
    for dim in layout.tokens:
        placements[dim] = Partial()
    return DTensor.from_local(tensor, layout.mesh, placements, run_check=False)
