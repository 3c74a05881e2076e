"""Megatron-Core: its losses by this library, with its tensor and sequence parallelism.

A model that computes its loss without its logits, and one that makes them as before::

    use_linear_cross_entropy(model)  # a GPTModel, before it is wrapped
    use_cross_entropy(model)

The functions beneath take the arguments of Megatron's own. Theirs do not ignore any label: a
``loss_mask`` multiplies the losses afterwards. Here labels of -100 have the loss 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import cross_entropy
from ..linear import linear_cross_entropy as _linear_cross_entropy
from ..shard import Shard
from .output_layer import replaced_forward
from .versions import check_version

__all__ = [
    "fused_vocab_parallel_cross_entropy",
    "linear_cross_entropy",
    "stop_cross_entropy",
    "use_cross_entropy",
    "use_linear_cross_entropy",
    "vocab_parallel_cross_entropy",
]

_VERSION = "0.16"
_REPLACED = ("_postprocess", "compute_language_model_loss")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: Any = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    sequence_parallel: bool = False,
    *,
    label_smoothing: float = 0.0,
    gradient_accumulation_fusion: bool = False,
    **options: Any,
) -> Tensor:
    """``megatron.core.fusions.fused_linear_cross_entropy.linear_cross_entropy``, on any device.

    Args:
        hidden: (N, D) or (S, B, D), the same on every rank of the group. With
            ``sequence_parallel``, this rank's equal part of the first dimension.
        weight: (V / ranks, D): this rank's rows, in the order of the ranks.
        labels: (N) or (S, B), all of them on every rank.
        tp_group: The ranks that share the vocabulary; None: this one has all of it.
        reduction: As in `llmloss_ext.linear_cross_entropy`, and so the next.
        ignore_index: Labels with this value are ignored.
        sequence_parallel: Whether the hidden states are gathered here, and their gradient
            scattered.
        label_smoothing: Megatron's: shared by the V - 1 classes that are not the label.
        gradient_accumulation_fusion: Whether the weight's gradient is added to its ``main_grad``,
            as Megatron's layers do under this name.
        options: Other options of `llmloss_ext.linear_cross_entropy`.

    Returns:
        The loss, 0-d float32; (N) or (S * B) for ``reduction="none"``.

    Raises:
        ValueError: As `llmloss_ext.linear_cross_entropy`; or a ``main_grad`` of Megatron-FSDP.
    """
    ranks = _size(tp_group)
    if sequence_parallel and ranks > 1:
        hidden = _GatherTokens.apply(hidden, tp_group)  # type: ignore[no-untyped-call]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if ranks > 1:
        options["shard"] = Shard(tp_group, sum_input_grad=not sequence_parallel)
    if gradient_accumulation_fusion and weight.requires_grad:
        main_grad = _main_grad(weight)
        weight = _IntoMainGrad.apply(weight)  # type: ignore[no-untyped-call]
        options["weight_grad_accumulator"] = main_grad
    return _linear_cross_entropy(
        hidden,
        weight,
        labels.reshape(-1),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=_smoothing(label_smoothing, weight.shape[0] * ranks),
        **options,
    )


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    *,
    tp_group: Any = None,
    **options: Any,
) -> Tensor:
    """``megatron.core.tensor_parallel.vocab_parallel_cross_entropy``.

    Its label smoothing is that of one rank however many there are; Megatron's own takes each rank's
    classes for all, so that with several ranks its losses differ from one to the other.

    Args:
        vocab_parallel_logits: (S, B, V / ranks).
        target: (S, B).
        label_smoothing: In [0, 1 - 1 / V]: shared by the V - 1 classes that are not the target.
        tp_group: The ranks that share the vocabulary; None: Megatron's tensor-parallel group.
        options: Other options of `llmloss_ext.cross_entropy`.

    Returns:
        (S, B), float32.

    Raises:
        ValueError: As `llmloss_ext.cross_entropy`.
    """
    if tp_group is None:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        tp_group = get_tensor_model_parallel_group()
    ranks = _size(tp_group)
    return cross_entropy(
        vocab_parallel_logits,
        target,
        reduction="none",
        class_dim=-1,
        label_smoothing=_smoothing(label_smoothing, vocab_parallel_logits.shape[-1] * ranks),
        shard=Shard(tp_group) if ranks > 1 else None,
        **options,
    )


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any
) -> Tensor:
    """``megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy``.

    Unlike Megatron's, it does not round the gradient of float32 logits to bfloat16.

    Args:
        vocab_parallel_logits: (S, B, V / ranks).
        target: (S, B).
        tp_group: The ranks that share the vocabulary.

    Returns:
        (S, B), float32.
    """
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group)


def use_cross_entropy(model: Any, **options: Any) -> None:
    """Makes a model compute its losses from its logits by `vocab_parallel_cross_entropy`.

    Args:
        model: A ``LanguageModule`` such as ``GPTModel``, not wrapped.
        options: Of `vocab_parallel_cross_entropy`: its ``label_smoothing``, ``z_loss`` and more.
            ``inplace=True`` saves a copy of the logits where nothing else reads them.

    Raises:
        RuntimeError: The installed Megatron-Core is not a known version.
        ValueError: The model is something else.
    """
    check_version("megatron-core", _VERSION)
    if not callable(getattr(model, "compute_language_model_loss", None)):
        raise ValueError(f"{type(model).__name__} has no compute_language_model_loss")
    stop_cross_entropy(model)
    options.setdefault("tp_group", model.pg_collection.tp)

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        rows = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), **options)
        return rows.t().contiguous()

    model.compute_language_model_loss = loss


def use_linear_cross_entropy(model: Any, **options: Any) -> None:
    """Makes a model compute its losses, also of multi-token prediction, without the logits.

    In a call with labels, the output layer returns the hidden states that it is given, whose loss
    is then `linear_cross_entropy`. Other calls do not change.

    Args:
        model: A ``GPTModel``, not wrapped, on its last pipeline stage.
        options: Of `linear_cross_entropy`: its ``label_smoothing``, ``z_loss``,
            ``max_chunk_bytes`` and more. What the output layer says
            (``gradient_accumulation_fusion``, ``sequence_parallel``) is read from it.

    Raises:
        RuntimeError: The installed Megatron-Core is not a known version.
        ValueError: The model is something else, or its output layer cannot be replaced.
    """
    check_version("megatron-core", _VERSION)
    if not hasattr(model, "_postprocess") or not hasattr(model, "output_layer"):
        raise ValueError(
            f"use_linear_cross_entropy needs a GPTModel on its last pipeline stage, got "
            f"{type(model).__name__}; use_cross_entropy takes others"
        )
    layer = model.output_layer
    if type(layer).__name__ != "ColumnParallelLinear" or layer.bias is not None:
        raise ValueError(
            "use_linear_cross_entropy needs an output layer that is a ColumnParallelLinear without "
            f"bias, got {layer!r}"
        )
    if layer.gather_output or model.config.defer_embedding_wgrad_compute:
        raise ValueError(
            "use_linear_cross_entropy makes no logits: it works neither with gathered ones "
            "(parallel_output=False) nor with defer_embedding_wgrad_compute"
        )
    stop_cross_entropy(model)

    def postprocess(**arguments: Any) -> Any:
        """As the model's, which is called with names only."""
        own = type(model)._postprocess
        if arguments["labels"] is None:
            return own(model, **arguments)
        deferred = _Deferred(layer, options)
        model.compute_language_model_loss = deferred.loss
        try:
            with replaced_forward(layer, deferred.forward):
                return own(model, **arguments)
        finally:
            del model.compute_language_model_loss

    model._postprocess = postprocess


def stop_cross_entropy(model: Any) -> None:
    """Undoes `use_cross_entropy` and `use_linear_cross_entropy`."""
    for name in _REPLACED:
        vars(model).pop(name, None)


class _Deferred:
    """An output layer's product, left to the loss that follows it."""

    def __init__(self, layer: Any, options: dict[str, Any]) -> None:
        self._layer, self._options = layer, options
        self._weight: Tensor | None = None
        self._hidden: Tensor | None = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: Any = None
    ) -> Any:
        """The output layer's: (hidden states instead of logits, no bias)."""
        if runtime_gather_output:
            raise ValueError("use_linear_cross_entropy makes no logits that could be gathered")
        self._hidden, self._weight = input_, self._layer.weight if weight is None else weight
        return input_, None

    def loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The model's compute_language_model_loss: (B, S) from labels (B, S)."""
        if self._weight is None or logits is not self._hidden:
            raise ValueError(
                "use_linear_cross_entropy: the model changes its logits before the loss; use "
                "use_cross_entropy"
            )
        layer, by_position = self._layer, labels.t()
        rows = linear_cross_entropy(
            logits,
            self._weight,
            by_position,
            layer.tp_group,
            "none",
            sequence_parallel=layer.sequence_parallel,
            gradient_accumulation_fusion=layer.gradient_accumulation_fusion,
            **self._options,
        )
        return rows.view(by_position.shape).t().contiguous()


class _GatherTokens(torch.autograd.Function):
    """Every rank's tokens; in backward, the sum of the ranks' gradients of this rank's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ranks, (tokens, *others) = dist.get_world_size(group), hidden.shape
        every = hidden.new_empty(ranks * tokens, *others)
        dist.all_gather_into_tensor(every, hidden.contiguous(), group=group)
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tokens, *others = grad.shape
        mine = grad.new_empty(tokens // dist.get_world_size(ctx.group), *others)
        dist.reduce_scatter_tensor(mine, grad.contiguous(), group=ctx.group)
        return mine, None


class _IntoMainGrad(torch.autograd.Function):
    """A weight whose gradient is in its ``main_grad`` by the time that autograd arrives here.

    Megatron's DistributedDataParallel hangs its communication on the weight's AccumulateGrad: it
    wants to see some gradient there, and by ``grad_added_to_main_grad`` that it is not one.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor | None) -> Tensor | None:
        weight = ctx.weight
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        # A weight that is also the embedding's gets the embedding's gradient on top.
        is_shared = getattr(weight, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if is_shared else torch.empty_like(weight)


def _main_grad(weight: Any) -> Tensor:
    if hasattr(weight, "__fsdp_param__"):
        raise ValueError("gradient_accumulation_fusion does not know Megatron-FSDP's main_grad")
    main_grad: Tensor = weight.main_grad
    return main_grad


def _size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _smoothing(label_smoothing: float, classes: int) -> float:
    """This library's label smoothing, shared by all classes, that is Megatron's."""
    return label_smoothing * classes / (classes - 1) if label_smoothing else 0.0
