"""Causal language models of Hugging Face's transformers, trained with the losses of this library.

From logits, which the model then computes as ever::

    model.loss_function = causal_lm_loss

Straight from hidden states, so that a training step never holds the logits::

    use_linear_cross_entropy(model)
    model(input_ids=input_ids, labels=labels).loss.backward()

Both understand the number of items that `transformers.Trainer` passes with each micro-batch.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext.functional import cross_entropy
from llmloss_ext.linear import linear_cross_entropy

__all__ = ["causal_lm_loss", "stop_linear_cross_entropy", "use_linear_cross_entropy"]

_PATCH = "_llmloss_linear_cross_entropy"
_OTHERWISE = (
    "use_linear_cross_entropy: this model makes its logits otherwise than by its output layer, a "
    "scale and a softcap of its base model's hidden states; use causal_lm_loss"
)
# Options of the losses that a model's call does not decide.
_DECIDED = {"input", "target", "reduction", "num_items", "ignore_index"}
_FROM_LOGITS = inspect.signature(cross_entropy).parameters.keys() - _DECIDED
_FROM_HIDDEN = inspect.signature(linear_cross_entropy).parameters.keys() - _DECIDED
_FROM_HIDDEN -= {"linear_weight", "linear_bias", "shift", "options"}


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A model's ``loss_function``: that of transformers without a float32 copy of the logits.

    With other options by `functools.partial`, e.g. ``partial(causal_lm_loss, z_loss=1e-4)``.

    Args:
        logits: (B, S, V).
        labels: (B, S); the logits at position i predict the label at i + 1.
        vocab_size: V.
        num_items_in_batch: Replaces the denominator of the mean.
        ignore_index: Labels that take no part.
        shift_labels: (B, S), shifted already: the logits at i predict the label at i.
        options: Of `llmloss_ext.cross_entropy`, but for what is above. A model passes more, which
            is not looked at.

    Returns:
        The loss, 0-d float32.

    Raises:
        ValueError: Neither labels nor shift_labels; and as `llmloss_ext.cross_entropy`.
    """
    return cross_entropy(
        logits.reshape(-1, vocab_size),
        _shifted(labels, shift_labels, ignore_index).reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        num_items=_items(num_items_in_batch, logits),
        **{name: options[name] for name in _FROM_LOGITS & options.keys()},
    )


def use_linear_cross_entropy(model: Any, **options: Any) -> None:
    """Lets a causal language model compute its training loss straight from hidden states.

    While ``model.training``, a call with labels computes the logits of one token per sequence only,
    and returns those; its ``loss_function`` is `llmloss_ext.linear_cross_entropy` of all hidden
    states. What a model adds to its loss (a router's balance) it still adds. Evaluation, generation
    and calls without labels are as they were.

    A final softcap or scale of the logits is taken from the model's config, and the first call
    compares what it makes of them with the model's own logits.

    Args:
        model: A ``...ForCausalLM``, whose output layer is a `torch.nn.Linear`, whose ``forward``
            takes ``logits_to_keep``, and which calls its ``loss_function``. Before it is wrapped
            (PEFT, DistributedDataParallel, torch.compile); `torch.nn.DataParallel` is refused.
        options: Of `llmloss_ext.linear_cross_entropy`: label_smoothing, z_loss, max_chunk_bytes ...

    Raises:
        ValueError: A model that is none of that, or an option that there is not; and in the first
            call, a model whose logits are something else yet.
    """
    kind = type(model)
    _check_head(model.get_output_embeddings())
    if "logits_to_keep" not in inspect.signature(kind.forward).parameters:
        raise ValueError(f"{kind.__name__}.forward takes no logits_to_keep")
    if model.base_model is model:
        raise ValueError(f"{kind.__name__} has no base model that ends in hidden states")
    if getattr(model.config, "z_loss_coefficient", 0):
        raise ValueError(f"{kind.__name__} makes a z-loss of its logits; use causal_lm_loss")
    unknown = options.keys() - _FROM_HIDDEN
    if unknown:
        raise ValueError(
            f"use_linear_cross_entropy has no option {', '.join(sorted(unknown))}; a model's calls "
            "say what is ignored, and how many items there are"
        )
    if "loss_function" not in inspect.unwrap(kind.forward).__code__.co_names:
        raise ValueError(f"{kind.__name__} does not call its loss_function; use causal_lm_loss")
    stop_linear_cross_entropy(model)
    setattr(model, _PATCH, _Patch(model, _logit_options(model.config) | options))


def stop_linear_cross_entropy(model: Any) -> None:
    """Undoes `use_linear_cross_entropy`, if it was done."""
    patch = getattr(model, _PATCH, None)
    if patch is not None:
        patch.remove(model)
        delattr(model, _PATCH)


class _Patch:
    """A model's forward and loss_function, and between the two the hidden states of a call.

    It keeps no model, and what it puts there are methods: a copy of a model has a copy of it.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._options = options
        self._is_checked = self._is_awaited = False
        self._head: torch.nn.Linear | None = None
        self._hidden: Tensor | None = None
        own = vars(model)
        self._before = {name: own[name] for name in ("forward", "_loss_function") if name in own}
        self._otherwise = model.loss_function
        self._handles = [
            model.register_forward_pre_hook(_refuse_replicas),
            model.base_model.register_forward_hook(self.after_base),
        ]

        @functools.wraps(type(model).forward)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            patch = getattr(model, _PATCH, None)
            if patch is None:  # stopped, but somebody has wrapped this meanwhile
                return type(model).forward(model, *args, **kwargs)
            return patch.call(model, args, kwargs)

        self._forward = forward
        model.forward = types.MethodType(forward, model)
        model.loss_function = self.loss

    def remove(self, model: Any) -> None:
        """Puts back what was there, but for what somebody else has put there since."""
        for handle in self._handles:
            handle.remove()
        ours = {"forward": types.MethodType(self._forward, model), "_loss_function": self.loss}
        for name, mine in ours.items():
            if vars(model).get(name) == mine:
                delattr(model, name)
                if name in self._before:
                    setattr(model, name, self._before[name])

    def call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward, with the last token's logits only if it is to compute a loss."""
        kind = type(model)
        inner = self._before.get("forward") or functools.partial(kind.forward, model)
        names = list(inspect.signature(kind.forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        if not model.training or given.get("labels") is None:
            return inner(*args, **kwargs)
        self._is_awaited, self._head = True, model.get_output_embeddings()
        try:
            return inner(**given | {"logits_to_keep": 1})
        finally:
            self._is_awaited, self._head, self._hidden = False, None, None

    def after_base(self, _base: Any, _args: Any, output: Any) -> None:
        """Keeps the hidden states of the call."""
        if self._is_awaited:
            self._hidden = output[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The model's loss_function: of the hidden states; where that was not asked for, as ever.

        Run eagerly by torch.compile: what was kept of the call is no graph's.
        """
        hidden, head = self._hidden, self._head
        if not self._is_awaited or head is None:
            told = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self._otherwise(
                logits, labels, vocab_size, shift_labels=shift_labels, **told, **others
            )
        if hidden is None:
            raise ValueError(_OTHERWISE)
        _check_head(head)
        if not self._is_checked:
            self._is_checked = self._check(head, hidden, logits)
        hidden = hidden.to(head.weight.device)
        return linear_cross_entropy(
            hidden,
            head.weight,
            _shifted(labels, shift_labels, ignore_index).to(hidden.device),
            linear_bias=head.bias,
            num_items=_items(num_items_in_batch, hidden),
            ignore_index=ignore_index,
            **self._options,
        )

    def _check(self, head: torch.nn.Linear, hidden: Tensor, logits: Tensor) -> bool:
        """Whether the loss is of the logits that the model would have computed; if it can be said.

        Raises:
            ValueError: It is not.
        """
        with torch.no_grad():
            last = hidden[:, -1:].to(head.weight.device, head.weight.dtype)
            ours = F.linear(last, head.weight, head.bias).float()
            ours = ours * self._options["logit_scale"]
            if cap := self._options.get("softcap"):
                ours = cap * torch.tanh(ours / cap)
            size = ours.abs().max()
            if ours.shape == logits.shape:
                if not size.isfinite():
                    return False
                if ((ours - logits.float()).abs() <= 2e-2 * size).all():
                    return True
        raise ValueError(_OTHERWISE)


def _refuse_replicas(model: Any, _args: Any) -> None:
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            "use_linear_cross_entropy does not work under torch.nn.DataParallel, whose threads "
            "share the model's attributes; use DistributedDataParallel"
        )


def _check_head(head: Any) -> None:
    """Raises a ValueError unless the output layer is its weight and bias, and nothing else."""
    if (
        not isinstance(head, torch.nn.Linear)
        or type(head).forward is not torch.nn.Linear.forward
        or head._forward_hooks
        or head._forward_pre_hooks
    ):
        raise ValueError(
            "use_linear_cross_entropy needs a model whose output layer is a plain torch.nn.Linear, "
            f"got {type(head).__name__}"
        )


def _logit_options(config: Any) -> dict[str, float]:
    """What a config says is done to the logits: Gemma's softcap, Cohere's and Granite's scale."""
    text = config.get_text_config()
    options = {}
    if getattr(text, "final_logit_softcapping", None):
        options["softcap"] = float(text.final_logit_softcapping)
    scale = getattr(text, "logit_scale", None) or 1.0
    options["logit_scale"] = float(scale) / float(getattr(text, "logits_scaling", None) or 1.0)
    return options


def _shifted(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("a causal language model's loss needs labels or shift_labels")
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _items(items: int | Tensor | None, like: Tensor) -> int | Tensor | None:
    """The number of items on the device of the loss."""
    return items.to(like.device) if isinstance(items, Tensor) else items
