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

_PATCH = "_llmloss_patch"


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
    **_: Any,
) -> Tensor:
    """A model's ``loss_function``: that of transformers without a float32 copy of the logits.

    Other options by `functools.partial`, e.g. ``partial(causal_lm_loss, z_loss=1e-4)``.

    Args:
        logits: (B, S, V).
        labels: (B, S); the logits at position i predict the label at i + 1.
        vocab_size: V.
        num_items_in_batch: Replaces the denominator of the mean.
        ignore_index: Labels that take no part.
        shift_labels: (B, S), shifted already: the logits at i predict the label at i.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        inplace: Writes the gradient over the logits, which are then of no use to the caller.

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
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        inplace=inplace,
    )


def use_linear_cross_entropy(model: Any, **options: Any) -> None:
    """Lets a causal language model compute its training loss straight from hidden states.

    While ``model.training``, a call with labels computes the logits of one token per sequence only,
    for ``logits``; the loss is `llmloss_ext.linear_cross_entropy` of all hidden states. Evaluation
    and calls without labels are as they were. A final softcap or scale of the model's logits is
    taken from its config, and the first call compares what it makes of them with the model's own.

    Args:
        model: A ``...ForCausalLM``, whose output layer is a `torch.nn.Linear` and whose ``forward``
            takes ``logits_to_keep``.
        options: Of `llmloss_ext.linear_cross_entropy`: label_smoothing, z_loss, max_chunk_bytes ...

    Raises:
        ValueError: A model without such an output layer or argument, or an option that there is
            not; and in the first call, a model whose logits are something else yet.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            "use_linear_cross_entropy needs a model whose output layer is a torch.nn.Linear, got "
            f"{type(head).__name__}"
        )
    kind = type(model)
    if "logits_to_keep" not in inspect.signature(kind.forward).parameters:
        raise ValueError(f"{kind.__name__}.forward takes no logits_to_keep")
    unknown = set(options) - set(inspect.signature(linear_cross_entropy).parameters)
    if unknown:
        raise ValueError(f"linear_cross_entropy has no option {', '.join(sorted(unknown))}")
    stop_linear_cross_entropy(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, _PATCH).forward(self, *args, **kwargs)

    setattr(model, _PATCH, _Patch(_logit_options(model.config) | options))
    # As a method, so that copies of the model are bound to themselves.
    model.forward = types.MethodType(forward, model)


def stop_linear_cross_entropy(model: Any) -> None:
    """Undoes `use_linear_cross_entropy`, if it was done."""
    if hasattr(model, _PATCH):
        delattr(model, _PATCH)
        del model.forward


class _Patch:
    """What stands in the place of a model's forward."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._is_checked = False

    def forward(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(model)
        given = _by_name(kind.forward, model, *args, **kwargs)
        labels, shift_labels = given.get("labels"), given.get("shift_labels")
        if not model.training or (labels is None and shift_labels is None):
            return kind.forward(model, *args, **kwargs)
        for name in ("labels", "shift_labels"):
            given.pop(name, None)
        items = given.pop("num_items_in_batch", None)
        as_tuple = given.pop("return_dict", None) is False
        seen: list[Tensor] = []
        hook = model.base_model.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output[0])
        )
        try:
            output = kind.forward(model, **given | {"logits_to_keep": 1, "return_dict": True})
        finally:
            hook.remove()
        head, hidden = model.get_output_embeddings(), seen[-1]
        if not self._is_checked:
            self._check(head, hidden, output.logits)
            self._is_checked = True
        ignore_index = self._options.get("ignore_index")
        loss = linear_cross_entropy(
            hidden,
            head.weight,
            _shifted(labels, shift_labels, -100 if ignore_index is None else ignore_index).to(
                hidden.device
            ),
            linear_bias=head.bias,
            num_items=_items(items, hidden),
            **self._options,
        )
        auxiliary = getattr(output, "aux_loss", None)  # a mixture's balance of its experts
        if auxiliary is not None:
            loss = loss + model.router_aux_loss_coef * auxiliary.to(loss)
        output = type(output)(**dict(output.items()) | {"loss": loss})  # in the order of its fields
        return output.to_tuple() if as_tuple else output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check(self, head: torch.nn.Linear, hidden: Tensor, logits: Tensor) -> None:
        """Whether the loss is of the logits that the model would have computed."""
        with torch.no_grad():
            ours = head(hidden[:, -1:]).float() * self._options.get("logit_scale", 1.0)
            if cap := self._options.get("softcap"):
                ours = cap * torch.tanh(ours / cap)
            if ours.shape == logits.shape and torch.allclose(
                ours, logits.float(), rtol=2e-2, atol=2e-2 * float(ours.abs().max())
            ):
                return
        raise ValueError(
            "use_linear_cross_entropy: this model makes its logits of its hidden states otherwise "
            "than by its output layer, a scale and a softcap; use causal_lm_loss"
        )


def _by_name(function: Any, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call but for the model, all by name."""
    signature = inspect.signature(function)
    named: dict[str, Any] = {}
    for name, value in list(signature.bind(model, *args, **kwargs).arguments.items())[1:]:
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named.update(value if is_rest else {name: value})
    return named


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
