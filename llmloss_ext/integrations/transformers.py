"""Trains causal language models of Hugging Face transformers with the losses of this library.

From the logits, which the model computes as before::

    model.loss_function = causal_lm_loss

From the hidden states, so that the logits are never in memory::

    use_linear_cross_entropy(model)
    model(input_ids=input_ids, labels=labels).loss.backward()

Both use the ``num_items_in_batch`` that `transformers.Trainer` passes with each micro-batch.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composite
from ..checks import items_tensor
from ..functional import cross_entropy
from ..linear import linear_cross_entropy, linear_token_stats
from ..options import LossOptions
from ..sequences import Sequences, moved
from ..statistics import FloatStats
from .examination import AroundTheLayer, examined
from .output_layer import (
    beside,
    columns_of,
    layer_of,
    replaced_forward,
    weights_of,
    whole,
)

__all__ = [
    "Logits",
    "causal_lm_loss",
    "stop_linear_cross_entropy",
    "token_lm_loss",
    "use_linear_cross_entropy",
]

Logits = Literal["none", "last", "argmax", "all"]
"""What a call with labels returns in evaluation: see `use_linear_cross_entropy`."""

_PATCH = "_llmloss_linear_cross_entropy"
_UNKNOWN_LOGITS = (
    "use_linear_cross_entropy: the model's logits are not what its output layer, scale and softcap "
    "make of its base model's hidden states; use causal_lm_loss"
)
# The options of the losses, except those that a model's call determines.
_DETERMINED = {"input", "target", "num_items", "ignore_index", "class_dim"}
_DETERMINED |= {"size_average", "reduce"}
_PER_LABEL = {*Sequences._fields, "token_weight"}
_FROM_LOGITS = inspect.signature(cross_entropy).parameters.keys() - _DETERMINED - _PER_LABEL
_FROM_HIDDEN = inspect.signature(linear_cross_entropy).parameters.keys() - _DETERMINED - _PER_LABEL
_FROM_HIDDEN -= {"linear_weight", "linear_bias", "shift", "options", "reduction", "shard"}
_OF_LOSSES = {"label_smoothing", "z_loss", "focal_gamma"}
_THEIR_NAMES = {"document_ids": "seq_idx", "cu_seqlens": "cu_seq_lens_q"}
"""What transformers' collators and models call those of the sequences."""
_OF_MODELS = {"input_ids", "inputs_embeds", "token_type_ids", "decoder_attention_mask"}
"""What has the shape of the labels in a model's call, and is no business of the loss."""


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A ``loss_function`` for a model: like transformers' own, without its float32 copy of logits.

    Set options with `functools.partial`, e.g. ``partial(causal_lm_loss, z_loss=1e-4)``.

    Args:
        logits: (B, S, V). More than ``vocab_size`` columns are padding.
        labels: (B, S); the logits at position i predict the label at i + 1, if both are real tokens
            of one document.
        vocab_size: V.
        num_items_in_batch: Replaces the number of tokens as the denominator of the mean.
        ignore_index: Labels with this value are ignored.
        shift_labels: (B, S), already shifted: the logits at i predict the label at i.
        token_weight: (B, S), of the labels: shifted if they are.
        attention_mask: As in `llmloss_ext.linear_cross_entropy`, and so the next three. Not used
            with ``shift_labels``.
        position_ids: Of packed documents.
        document_ids: Of packed documents; a model's ``seq_idx`` is taken, too.
        cu_seqlens: Of packed documents; a model's ``cu_seq_lens_q`` is taken, too.
        options: Other options of `llmloss_ext.cross_entropy`. What else models pass on has no
            effect.

    Returns:
        The loss, 0-d float32; (B, S) for ``reduction="none"``.

    Raises:
        ValueError: Neither labels nor shift_labels are given; and as `llmloss_ext.cross_entropy`.
        TypeError: An argument of the labels' shape, or a number, that the loss does not know.
    """
    named = Sequences(attention_mask, position_ids, document_ids, cu_seqlens)._asdict()
    sequences = _sequences_of(options | named)
    shifted = _Shifted.of(labels, shift_labels, token_weight, ignore_index, sequences)
    _refuse_unknown(options, _FROM_LOGITS, shifted.target)
    target, token_weight = shifted.on(logits.device)
    columns = logits.shape[-1]
    own = {name: options[name] for name in _FROM_LOGITS & options.keys()}
    return cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        token_weight=token_weight,
        num_items=_items(num_items_in_batch, logits),
        class_dim=-1,
        **{"vocab_size": None if vocab_size == columns else vocab_size} | own,
    )


def token_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """`causal_lm_loss` for a model whose labels stand where they are predicted.

    Encoders with masked tokens (``...ForMaskedLM``) and decoders with inputs of their own
    (``...ForSeq2SeqLM``) are such: the logits at position i predict the label at i.

    Args:
        logits: (B, S, V).
        labels: (B, S).
        vocab_size: V.
        num_items_in_batch: Replaces the number of tokens as the denominator of the mean.
        ignore_index: Labels with this value are ignored.
        options: As in `causal_lm_loss`, without masks and positions.

    Returns:
        The loss, 0-d float32; (B, S) for ``reduction="none"``.

    Raises:
        TypeError: An argument of the labels' shape, or a number, that the loss does not know.
    """
    return causal_lm_loss(
        logits, None, vocab_size, num_items_in_batch, ignore_index, labels, **options
    )


def use_linear_cross_entropy(model: Any, *, logits: Logits | None = None, **options: Any) -> None:
    """Makes a causal language model compute its loss from the hidden states.

    In a call with labels, the output layer computes the loss from the hidden states that the model
    hands it, by `llmloss_ext.linear_cross_entropy`, and returns the logits of the last token of
    each sequence only; the model's ``loss_function`` returns that loss. So whatever gathers the
    layer's weight (FSDP, FSDP2, ZeRO-3) gathers it once, and terms that the model adds to its loss,
    such as a router's load balancing, are kept. Generation and calls without labels do not change.

    The ``attention_mask`` (B, S), ``position_ids``, ``cu_seq_lens_q`` and ``seq_idx`` of a call
    tell which tokens are real and of one document: no padding predicts a token, and none the first
    of the next document. A ``token_weight`` (B, S) of a call weighs its labels.

    A final softcap or scale of the logits, and whether a position predicts the next label or its
    own, is found by calling the model's own code with chosen logits, without its layers. The first
    call also compares the last token's logits that result with those of the model.

    Args:
        model: A model that calls its ``loss_function``, and whose output layer is a
            `torch.nn.Linear`, with or without a LoRA adapter, or saved by PEFT; before or after it
            is wrapped (PEFT, DistributedDataParallel, FSDP). `torch.nn.DataParallel` is not
            supported. Or a `transformers.Trainer`: its model, with the trainer's
            ``label_smoothing_factor``, which otherwise takes the labels away from the model.
        logits: What a call with labels returns when the model is not training: ``"none"``;
            ``"last"``: those of each sequence's last token, as in training; ``"argmax"``: in their
            place the predicted classes (B, S) of the tokens that have a label, else -1, from the
            pass that computes the loss: enough for the accuracy in a ``compute_metrics`` of
            `transformers.Trainer`; or ``"all"``: as the model does by itself, with whole logits in
            memory. By default ``"last"``, with a warning. A call's ``skip_logits`` (True: none,
            False: all) goes first.
        options: Options of `llmloss_ext.linear_cross_entropy`, such as label_smoothing, z_loss or
            max_chunk_bytes.

    Raises:
        ValueError: The model does not meet these requirements, or an option does not exist. Raised
            by the first call if a hook has changed the layer's logits.
    """
    if logits not in (None, *get_args(Logits)):
        raise ValueError(f"logits must be one of {get_args(Logits)}, got {logits!r}")
    if hasattr(model, "label_smoother"):
        options = _with_smoothing_of(model, options)
    trainer, model = model, _unwrapped(model)
    head = model.get_output_embeddings()
    layer = layer_of(head)
    unknown = options.keys() - _FROM_HIDDEN
    if unknown:
        raise ValueError(
            f"use_linear_cross_entropy has no option {', '.join(sorted(unknown))}; labels, "
            "ignore_index and the number of items come from the model's calls"
        )
    stop_linear_cross_entropy(model)
    plain = functools.partial(cross_entropy, class_dim=-1)
    asked = {name: options[name] for name in _OF_LOSSES & options.keys()}
    losses = [plain, functools.partial(plain, **asked)]  # theirs may have the same options
    around = examined(model, head, columns_of(layer), losses)
    setattr(model, _PATCH, _Patch(model, logits, around, options))
    if hasattr(trainer, "label_smoother"):
        trainer.label_smoother = None


def _with_smoothing_of(trainer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with what a Trainer does to the loss."""
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "the Trainer's compute_loss_func takes the labels away from the model and reads its "
            "logits: give the Trainer no such function, and its loss as options"
        )
    theirs = trainer.args.label_smoothing_factor  # its smoother is gone after a first call
    if theirs and options.get("label_smoothing", theirs) != theirs:
        raise ValueError(
            f"label_smoothing={options['label_smoothing']}, but the Trainer's "
            f"label_smoothing_factor is {theirs}"
        )
    return options | {"label_smoothing": theirs} if theirs else options


def stop_linear_cross_entropy(model: Any) -> None:
    """Undoes `use_linear_cross_entropy`; does nothing where it is not in use."""
    given, model = model, _unwrapped(model)
    patch = getattr(model, _PATCH, None)
    if patch is None:
        return
    patch.remove(model)
    delattr(model, _PATCH)
    if hasattr(given, "label_smoother") and given.args.label_smoothing_factor:
        from transformers.trainer_pt_utils import LabelSmoother

        given.label_smoother = LabelSmoother(epsilon=given.args.label_smoothing_factor)


def _unwrapped(model: Any) -> Any:
    """The model in a Trainer and in wrappers: compiled, of PEFT, of data parallelism."""
    inner = model.model if hasattr(model, "label_smoother") else model
    while True:
        kind = type(inner).__name__
        if kind == "OptimizedModule":
            inner = inner._orig_mod
        elif kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
            inner = inner.module
        elif hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            inner = inner.get_base_model()
        else:
            return inner


class _Step(NamedTuple):
    """What the output layer has made of one call: in a list, to which it is appended."""

    loss: Tensor
    last: Tensor
    """(B, 1, V): the logits of the last tokens, before the model does more to them."""
    predicted: Tensor | None
    """(B, S): the argmax of the tokens with a label, where it is asked for."""
    logits: Tensor | None = None
    """``last`` as the model hands it to its loss, and returns it."""


class _KeepsHooks(torch.autograd.Function):
    """The loss, and a gradient of zeros for the logits: so that the layer's backward hooks run."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.like
        return grad, grad.new_zeros(shape, dtype=dtype)


class _Forward:
    """A model's forward, by way of its patch. It is copied and pickled with the model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's, by which `transformers.Trainer` chooses the columns of its batches."""
        whole = inspect.signature(type(self._model).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        patch = getattr(self._model, _PATCH, None)
        if patch is None:  # removed, but still called by a wrapper installed since
            return type(self._model).forward(self._model, *args, **kwargs)
        return patch.call(self._model, args, kwargs)


class _Patch:
    """Replaces a model's forward and loss_function.

    It holds no reference to the model, and the replacements no other patch than their model's, so
    that a copy of the model works with its own.
    """

    def __init__(
        self, model: Any, logits: Logits | None, around: AroundTheLayer, options: dict[str, Any]
    ) -> None:
        self._logits, self._shift = logits, around.shift
        self._options: dict[str, Any] = {"logit_scale": around.logit_scale}
        self._options["softcap"] = around.softcap or None
        self._options |= options
        self._is_checked = False
        self._steps: list[_Step] | None = None
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        own = vars(model)
        self._replaced = {name: own[name] for name in ("forward", "_loss_function") if name in own}
        self._original_loss = model.loss_function
        self._handle = model.register_forward_pre_hook(_refuse_replicas)
        model.forward = _Forward(model)
        model.loss_function = self.loss

    def remove(self, model: Any) -> None:
        """Restores the model's attributes, except those that others have replaced since."""
        self._handle.remove()
        own = vars(model)
        ours = {
            "forward": isinstance(own.get("forward"), _Forward),
            "_loss_function": own.get("_loss_function") == self.loss,
        }
        for name, is_ours in ours.items():
            if is_ours:
                delattr(model, name)
                if name in self._replaced:
                    setattr(model, name, self._replaced[name])

    def call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the model's forward, in a call with labels with another output layer."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        returned: Logits | None = "last" if model.training else self._logits
        if (skips := given.get("skip_logits")) is not None:
            returned = "none" if skips else "all"
        has_labels = given.get("labels") is not None or given.get("shift_labels") is not None
        if not has_labels and model.training:
            _warn_of_missing_labels()
        if not has_labels or returned == "all":
            return self._inner(model, args, kwargs)
        given.pop("skip_logits", None)
        if returned is None:
            _warn_of_the_last()
        layer = layer_of(model.get_output_embeddings())
        steps: list[_Step] = []

        def forward(hidden: Tensor) -> Tensor:
            steps.append(self._step(layer, hidden, given, returned == "argmax"))
            return steps[-1].last

        self._steps = steps
        try:
            with replaced_forward(layer, forward):
                output = self._inner(model, (), given)
        finally:
            self._steps = None
        return _with_logits(output, steps[-1]) if returned in ("none", "argmax") else output

    def _inner(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = self._replaced.get("forward")
        if own is not None:
            return own(*args, **kwargs)
        return type(model).forward(model, *args, **kwargs)

    def _step(self, layer: Any, hidden: Tensor, given: dict[str, Any], with_argmax: bool) -> _Step:
        """The loss of the hidden states that the model hands its output layer."""
        weight, bias = weights_of(layer)
        hidden = beside(hidden, weight)
        ignore_index = given.get("ignore_index", -100)
        sequences = _sequences_of(given)
        labels, shift_labels = given.get("labels"), given.get("shift_labels")
        if not self._shift:
            labels, shift_labels = None, labels
        shifted = _Shifted.of(
            labels, shift_labels, given.get("token_weight"), ignore_index, sequences
        )
        target, token_weight = shifted.on(hidden.device)
        compute: Any = _loss_and_argmax if with_argmax else linear_cross_entropy
        result = compute(
            hidden,
            weight,
            target,
            linear_bias=bias,
            token_weight=token_weight,
            num_items=_items(given.get("num_items_in_batch"), hidden),
            ignore_index=ignore_index,
            **self._options,
        )
        loss, predicted = result if with_argmax else (result, None)
        bias = None if bias is None else bias.detach()
        last = F.linear(hidden[..., -1:, :], weight.detach(), bias)
        return _Step(whole(loss), whole(last), predicted)

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
        """The model's loss_function: what the output layer has computed, or the original."""
        steps = self._steps
        if steps is None:
            named = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self._original_loss(
                logits, labels, vocab_size, shift_labels=shift_labels, **named, **others
            )
        if len(steps) != 1:
            raise ValueError(_UNKNOWN_LOGITS)
        used = labels if shift_labels is None else shift_labels
        if used is not None:
            _refuse_unknown(others, _PER_LABEL, used)
        if not self._is_checked and not torch.compiler.is_compiling():
            self._is_checked = self._check(steps[0].last, logits)
        steps[0] = steps[0]._replace(logits=logits)
        loss: Tensor = _KeepsHooks.apply(steps[0].loss, logits)  # type: ignore[no-untyped-call]
        return loss

    def _check(self, last: Tensor, logits: Tensor) -> bool:
        """Compares the model's last logits with those that the loss assumes.

        Returns:
            True if they agree; False if they are not finite, so that the next call checks again.

        Raises:
            ValueError: They differ.
        """
        with torch.no_grad():
            ours = last.float() * self._options["logit_scale"]
            if cap := self._options.get("softcap"):
                ours = cap * torch.tanh(ours / cap)
            size = ours.abs().max()
            if ours.shape == logits.shape:
                if not size.isfinite():
                    return False
                if ((ours - logits.float()).abs() <= 2e-2 * size).all():
                    return True
        raise ValueError(_UNKNOWN_LOGITS)


def _warn_of_the_last() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "use_linear_cross_entropy: a call with labels returns the logits of each sequence's "
            "last token only, in evaluation too. Say logits='all' if something reads the others "
            "(a compute_metrics does), or logits='last' if nothing does.",
            stacklevel=2,
        )


def _warn_of_missing_labels() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            "use_linear_cross_entropy: a call without labels, in training, makes the whole logits. "
            "A transformers.Trainer takes the labels away for its label_smoothing_factor and "
            "compute_loss_func: call use_linear_cross_entropy(trainer) instead.",
            stacklevel=2,
        )


def _with_logits(output: Any, step: _Step) -> Any:
    """A model's output with the predicted classes in place of the logits, or neither."""
    logits = step.predicted
    if isinstance(output, tuple):  # in which a router's loss may stand before the logits
        place = next((at for at, x in enumerate(output) if x is step.logits), 1)
        return output[:place] + (() if logits is None else (logits,)) + output[place + 1 :]
    named = {name: x for name, x in output.items() if name != "logits"}
    return type(output)(**named | ({} if logits is None else {"logits": logits}))


def _loss_and_argmax(
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
    ignore_index: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What `linear_cross_entropy` returns, and the argmax of each token, from one pass."""
    loss = LossOptions.of(**{name: options.pop(name) for name in _OF_LOSSES & options.keys()})
    options.pop("weight_grad_accumulator", None)  # nothing is trained here
    if token_weight is not None:
        target = torch.where(token_weight == 0, ignore_index, target)
    stats = linear_token_stats(
        hidden, linear_weight, target, ignore_index=ignore_index, extra=("argmax",), **options
    )
    log_prob, lse, entropy, mean_log_prob, argmax = map(whole, stats[:5])  # type: ignore[arg-type]
    real = log_prob.dtype
    w_y = composite.target_weights(target, options.get("weight"), ignore_index, real)
    weights = composite.row_weights(token_weight, target, ignore_index, real)
    items = items_tensor(num_items, "mean", hidden)
    floats = FloatStats(log_prob, lse, entropy, mean_log_prob)
    return composite.loss_of(floats, w_y, weights, items, loss), argmax


def _refuse_replicas(model: Any, _args: Any) -> None:
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            "use_linear_cross_entropy does not work under torch.nn.DataParallel, whose threads "
            "share the model's attributes; use DistributedDataParallel"
        )


class _Shifted(NamedTuple):
    """What the positions predict, and what it weighs; (B, S)."""

    target: Tensor
    token_weight: Tensor | None

    @classmethod
    def of(
        cls,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        token_weight: Tensor | None,
        ignore_index: int,
        sequences: Sequences,
    ) -> _Shifted:
        """From labels; or from labels that are shifted already, with their weights."""
        if shift_labels is not None:
            return cls(shift_labels, token_weight)
        if labels is None:
            raise ValueError("a causal language model's loss needs labels or shift_labels")
        target = sequences.fitting(labels).targets(labels, 1, ignore_index)
        if token_weight is not None:
            token_weight = moved(token_weight, 1, 0.0)
        return cls(target, token_weight)

    def on(self, device: torch.device) -> _Shifted:
        """The same on another device: that of the output layer."""
        return _Shifted(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


def _sequences_of(given: dict[str, Any]) -> Sequences:
    """What a call says of its tokens, under our names or transformers'."""
    named = {name: given.get(name) for name in Sequences._fields}
    for ours, theirs in _THEIR_NAMES.items():
        if named[ours] is None:
            named[ours] = given.get(theirs)
    return Sequences(**named)


def _refuse_unknown(given: dict[str, Any], known: Collection[str], labels: Tensor) -> None:
    """Raises a TypeError for an argument that would change the loss if somebody read it."""
    for name, value in given.items():
        if name in known or name in _OF_MODELS or name in _THEIR_NAMES.values():
            continue
        is_per_label = isinstance(value, Tensor) and value.shape == labels.shape
        if is_per_label or isinstance(value, float):
            raise TypeError(
                f"the loss does not know {name!r}, which the model passes on: what is given per "
                f"label is called {', '.join(sorted(_PER_LABEL))}"
            )


def _items(items: int | Tensor | None, like: Tensor) -> int | Tensor | None:
    """Moves the number of items to the device of the loss."""
    return items.to(like.device) if isinstance(items, Tensor) else items
