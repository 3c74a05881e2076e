"""A model's output layer, whatever is wrapped around it: sharding, adapters, trained copies.

Its ``forward`` can be replaced for the length of one call. Whatever hooks gather the weight (FSDP,
ZeRO-3) still run around that, and see an output that needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtensors import is_dtensor

__all__ = [
    "Weights",
    "beside",
    "columns_of",
    "layer_of",
    "replaced_forward",
    "weights_of",
    "whole",
]

_TENSOR_PARALLEL = "transformers.distributed.tensor_parallel"
"""Where the forwards come from that transformers gives a layer whose weight it shards."""


class Weights(NamedTuple):
    """Of the projection that a layer computes now."""

    weight: Tensor
    bias: Tensor | None


def layer_of(head: Any) -> Any:
    """The module under wrappers that computes the logits.

    Raises:
        ValueError: It is not one whose weights are known.
    """
    layer = head
    while True:
        kind = type(layer).__name__
        if kind == "FullyShardedDataParallel":
            layer = layer.module
        elif kind == "ModulesToSaveWrapper":  # PEFT: a copy of the layer is trained
            is_plain = layer.disable_adapters or not layer.active_adapters
            name = "" if is_plain else layer.active_adapters[0]
            layer = layer.original_module if is_plain else layer.modules_to_save[name]
        else:
            break
    _check(layer)
    return layer


def weights_of(layer: Any) -> Weights:
    """The weight (V, D) and the bias (V) of a layer, with its adapters.

    A LoRA adapter's product is added to the weight: for the length of the step there is one more
    tensor of the weight's size, and its gradient.
    """
    if not _is_lora(layer):
        return Weights(layer.weight, layer.bias)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    for name in () if layer.disable_adapters or layer.merged else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        weight = weight + (scale * (b.weight @ a.weight)).to(weight.dtype)
        if b.bias is not None:
            added = (scale * b.bias).to(weight.dtype)
            bias = added if bias is None else bias + added
    return Weights(weight, bias)


def beside(hidden: Tensor, weight: Tensor) -> Tensor:
    """The hidden states as a DTensor where the weight is one: they are the same on every rank."""
    hidden = hidden.to(weight.device)
    if not is_dtensor(weight) or is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor: of a DTensor, all of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def columns_of(layer: Any) -> int:
    """The number of its logits, also where a wrapper has taken the weight away."""
    plain = layer.base_layer if _is_lora(layer) else layer
    columns: int = plain.out_features
    return columns


def _is_lora(layer: Any) -> bool:
    """Whether it adds the product of two linear layers; AdaLoRA's parameters are three factors."""
    layers = isinstance(getattr(layer, "lora_A", None), torch.nn.ModuleDict)
    return layers and all(hasattr(layer, name) for name in ("base_layer", "lora_B", "scaling"))


def _check(layer: Any) -> None:
    """Raises a ValueError that names why the weights of a layer are not known."""
    plain = layer.base_layer if _is_lora(layer) else layer
    kind = type(plain)
    if not isinstance(plain, torch.nn.Linear) or kind.forward is not torch.nn.Linear.forward:
        raise ValueError(
            "use_linear_cross_entropy needs an output layer that is a plain torch.nn.Linear, or "
            f"one with a LoRA adapter, got {kind.__module__}.{kind.__qualname__}"
        )
    for module in (layer, plain):
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__module__", "") != _TENSOR_PARALLEL:
            raise ValueError(
                "use_linear_cross_entropy: the output layer's forward was replaced (as hooks of "
                f"accelerate do), by {own!r}"
            )
    if not _is_lora(layer):
        return
    for name in layer.active_adapters:
        if name in getattr(layer, "lora_variant", {}):
            raise ValueError(
                f"use_linear_cross_entropy: the adapter {name!r} of the output layer is a variant "
                "of LoRA (DoRA or another), whose weight is not known; leave the layer out of it"
            )
        dropout = layer.lora_dropout[name] if name in layer.lora_dropout else None  # noqa: SIM401 (no dict)
        if isinstance(dropout, torch.nn.Dropout) and dropout.p > 0:
            raise ValueError(
                f"use_linear_cross_entropy: the adapter {name!r} of the output layer has a "
                "lora_dropout, which no weight expresses; set it to 0"
            )


_MISSES_FORWARD = torch.__version__ < "2.13"  # a version, not its letters
"""Whether torch's compiler misses a forward that is replaced in what it compiles: 2.11 does."""


@contextmanager
def replaced_forward(layer: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, calls of the layer run ``forward`` between their hooks."""
    own = vars(layer).get("forward")  # where another library has replaced it for good
    if own is None and _MISSES_FORWARD and torch.compiler.is_compiling():
        # As the first hook instead: what the layer computed before it is no part of the graph.
        hooks = layer._forward_hooks
        layer._forward_hooks = {-1: lambda _layer, inputs, _output: forward(*inputs), **hooks}
        try:
            yield
        finally:
            layer._forward_hooks = hooks
        return
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            vars(layer).pop("forward", None)
        else:
            layer.forward = own
