"""Every option of the losses, once: its type, its default, its check and what it does.

The public functions name their options in their signatures, for readers and editors; a test holds
each signature to `OPTIONS`. Documentation (`documented`), the modules of `llmloss_ext.nn` and
`llmloss_ext.parallel` are made from these definitions. On the way to the kernels, options travel as
`LogitOptions` and `LossOptions` (from hidden states with `linear.planning.ChunkOptions`); the
operators take these two packed as lists (`pack`), which csrc/ops/arguments.h unpacks in the order
of the fields here.

A new option of the loss is a field of `LossOptions` with its check, an entry of `OPTIONS`, a place
in `pack` and `unpack`, and the signatures of `cross_entropy` and `linear_cross_entropy`.
"""

from __future__ import annotations

import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Option(NamedTuple):
    """An option of the public functions."""

    type: str
    """The annotation."""
    default: Any
    text: str
    """What it does; for the documentation."""


OPTIONS = {
    "weight": Option(
        "Tensor | None",
        None,
        "Class weights (V), without a gradient. As in torch, the mean divides by the sum of the "
        "targets' weights.",
    ),
    "ignore_index": Option(
        "int",
        -100,
        "Tokens with this target have no loss, a gradient of exactly zero, and do not count in the "
        "mean. Any integer, also one that is a class.",
    ),
    "reduction": Option("str", "mean", '``"mean"``, ``"sum"`` or ``"none"``.'),
    "label_smoothing": Option("float", 0.0, "In [0, 1]."),
    "z_loss": Option(
        "float",
        0.0,
        "Factor of lse^2, >= 0 (PaLM, Chowdhery et al. 2022; ST-MoE, Zoph et al. 2022). A mean "
        "adds its mean over the tokens, in which class weights have no part.",
    ),
    "focal_gamma": Option(
        "float",
        0.0,
        "A token's cross entropy, smoothed and weighted, times (1 - p_y)^focal_gamma; >= 0, 0: not "
        "(Lin et al. 2017). The z-loss is not multiplied. For class indices.",
    ),
    "softcap": Option(
        "float | None",
        None,
        "If given (> 0), x = softcap * tanh(logit_scale * logits / softcap) (Gemma 2).",
    ),
    "logit_scale": Option(
        "float | Tensor", 1.0, "Factor of the logits; a 0-d tensor gets its gradient."
    ),
    "temperature": Option(
        "float",
        1.0,
        "Divides the logits (> 0) after softcap and logit_scale, as the field's trainers do with "
        "what a model returns: everything is then of softmax(x / temperature).",
    ),
    "token_weight": Option(
        "Tensor | None",
        None,
        "A weight for each token, shaped like the target of indices; the mean divides by their sum "
        "over valid tokens. A token of weight 0 is as if ignored. With a shift it moves with the "
        "labels.",
    ),
    "num_items": Option(
        "int | Tensor | None",
        None,
        "Replaces the denominator of the mean, e.g. by the number of valid tokens of all "
        "micro-batches: an int >= 0 or a 0-d tensor on the input's device, taken as a constant. Of "
        "0 items (a step whose tokens are all masked) the loss and its gradients are 0.",
    ),
    "vocab_size": Option(
        "int | None",
        None,
        "Only the first ``vocab_size`` classes take part; the gradient of the others (padding) is "
        "zero. With ``shard``: the classes of all ranks.",
    ),
    "class_dim": Option(
        "int | None",
        None,
        "The dimension of the classes, 1 (as torch) or -1 (as language models). Needed only where "
        "the target's shape fits both; torch's is then taken, and a warning says so.",
    ),
    "size_average": Option("bool | None", None, "Deprecated, as in torch: see ``reduction``."),
    "reduce": Option("bool | None", None, "Deprecated, as in torch: see ``reduction``."),
    "inplace": Option(
        "bool",
        False,
        "Writes the gradient over ``input`` (which then no longer holds logits): no memory of the "
        "size of the logits is needed. Serves one backward, of first order.",
    ),
    "shard": Option(
        "Shard | None",
        None,
        "Where each rank of a process group holds some of the classes: see `llmloss_ext.Shard`.",
    ),
    "return_stats": Option(
        "bool | Sequence[str]",
        False,
        "Whether to return ``(loss, stats)``: a `TokenStats`, detached, from the same read of the "
        "logits. True: log_prob, lse, entropy, argmax and rank; or names of statistics; the others "
        "are None. For class indices, and not in place.",
    ),
    "with_rank": Option("bool", False, "Whether to fill ``argmax`` and ``rank``."),
    "extra": Option(
        "Sequence[str]",
        (),
        "Names of further statistics of `TokenStats` to fill; what is not asked for costs nothing.",
    ),
    "linear_bias": Option("Tensor | None", None, "The projection's bias (V)."),
    "shift": Option(
        "int",
        0,
        "With 1, the hidden state at position i of the second to last dimension predicts "
        "``target[..., i + 1]``; nothing of the size of the hidden states is copied. Without a "
        "reduction, the loss of that label stands at position i.",
    ),
    "attention_mask": Option(
        "Tensor | None",
        None,
        "(..., S), with ``shift``: 0 at padding, on either side. A position predicts a label if "
        "both are real tokens.",
    ),
    "position_ids": Option(
        "Tensor | None",
        None,
        "(..., S) or (S), with ``shift``: of documents packed into a row. Where positions do not "
        "increase, a document begins, and no token predicts its first.",
    ),
    "document_ids": Option(
        "Tensor | None",
        None,
        "(..., S) or (S), with ``shift``: one integer for the tokens of a document.",
    ),
    "cu_seqlens": Option(
        "Tensor | None",
        None,
        "(documents + 1) integers, with ``shift``: where each document begins among the tokens of "
        "all rows, and where the last ends (as flash-attention has them).",
    ),
    "chunk_tokens": Option(
        "int | None",
        None,
        "Tokens of a chunk at most; by default what `llmloss_ext.plan` says.",
    ),
    "max_chunk_bytes": Option(
        "int | None", None, "The most memory that the logits of a chunk may take."
    ),
    "drop_ignored": Option(
        "bool | None",
        None,
        "Whether ignored tokens are left out of the matrix products. By default on a CPU; on CUDA "
        "this waits for the device to know their number.",
    ),
    "logits_dtype": Option(
        "torch.dtype | None",
        None,
        "With torch.float32, the logits of 16-bit hidden states and weight are accumulated and "
        "kept in float32; their gradient is rounded once, to the dtype of its two products. By "
        "default logits are rounded to that dtype. If given, hidden states and weight may have "
        "different dtypes: products are computed in the one that holds both, and each gradient "
        "comes back in its own. Under autocast its dtype is that of the products, as ever.",
    ),
    "weight_grad_dtype": Option(
        "torch.dtype | None",
        None,
        "In which the weight's gradient is accumulated over the chunks before it is rounded once; "
        "by default float32 (float64 for float64). float16 cannot hold such a sum before the mean "
        'divides it: unless the reduction is "none", float32 is taken instead.',
    ),
    "weight_grad_accumulator": Option(
        "Tensor | None",
        None,
        "A (V, D) tensor of that dtype (a trainer's ``main_grad``) to which backward adds the "
        "weight's gradient; ``linear_weight.grad`` then stays as it is, and no V x D buffer is "
        "made. Costs the fourth product.",
    ),
}

_PLACE = "Options: each is described in `llmloss_ext.options`."
NONE, MEAN, SUM = range(3)
_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
"""Their numbers in the kernels: Reduction of csrc/core/loss_rows.h."""


def option_names(function: Callable[..., Any], table: Mapping[str, Option] = OPTIONS) -> list[str]:
    """The options in a function's signature."""
    return [name for name in inspect.signature(function).parameters if name in table]


def documented(
    function: F, names: Iterable[str] | None = None, table: Mapping[str, Option] = OPTIONS
) -> F:
    """The function, whose documentation lists its options in place of `_PLACE`.

    ``table`` says what they are; a family of losses has its own.
    """
    if function.__doc__:  # none under python -OO
        chosen = option_names(function, table) if names is None else names
        at = function.__doc__.index(_PLACE)
        indent = " " * (at - function.__doc__.rindex("\n", 0, at) - 1)
        lines = (
            textwrap.fill(
                f"{name}: {table[name].text}",
                100,
                initial_indent=indent,
                subsequent_indent=indent + "    ",
                break_long_words=False,
            )
            for name in chosen
        )
        function.__doc__ = function.__doc__.replace(indent + _PLACE, "\n".join(lines))
    return function


def spelled_out(
    function: F,
    names: Iterable[str],
    table: Mapping[str, Option] = OPTIONS,
    *,
    with_others: bool = False,
) -> F:
    """The function, whose signature lists options in place of ``**options``.

    ``with_others``: it takes others besides, and ``**options`` stays behind them.
    """
    signature = inspect.signature(function)
    *parameters, others = signature.parameters.values()
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=table[name].default,
            annotation=table[name].type,
        )
        for name in names
    ]
    parameters += [others] if with_others else []
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def with_defaults(
    options: Mapping[str, Any], names: Iterable[str], table: Mapping[str, Option] = OPTIONS
) -> dict[str, Any]:
    """The options of these names, by default where they are not given.

    Raises:
        TypeError: There are others.
    """
    found = {name: table[name].default for name in names}
    unknown = options.keys() - found.keys()
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
    return found | dict(options)


def as_integer(name: str, value: int) -> int:
    """The option, if it is an integer (numpy's, too); else a TypeError that names it."""
    if isinstance(value, int | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


class LogitOptions(NamedTuple):
    """How the kernels read logits: LogitArguments of csrc/ops/arguments.h."""

    scale: float
    softcap: float
    """0: none."""
    ignore_index: int
    vocab_size: int
    """The columns that take part."""
    classes: int = 0
    """Not 0: the columns are a part of so many classes."""

    @classmethod
    def of(
        cls,
        softcap: float | None,
        logit_scale: float | Tensor,
        vocab_size: int | None,
        ignore_index: int,
        columns: int,
        temperature: float = 1.0,
    ) -> LogitOptions:
        """The options of logits with so many columns; a tensor ``logit_scale`` travels beside them.

        cap tanh(s z / cap) / T is (cap / T) tanh((s / T) z / (cap / T)): the kernels need no
        temperature. Who has a tensor for s divides it (`tempered`).

        Raises:
            ValueError: An option is out of range.
            TypeError: ``vocab_size`` or ``ignore_index`` is not an integer, or ``temperature`` is a
                tensor.
        """
        if softcap is None:
            softcap = 0.0
        elif not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap must be a finite number > 0, got {softcap}")
        if vocab_size is None:
            vocab_size = columns
        else:
            vocab_size = as_integer("vocab_size", vocab_size)
            if not 1 <= vocab_size <= columns:
                raise ValueError(
                    f"vocab_size must be in [1, {columns}], the number of classes of the input, "
                    f"got {vocab_size}"
                )
        scale = 1.0 if isinstance(logit_scale, Tensor) else float(logit_scale)
        if isinstance(temperature, Tensor):
            raise TypeError(
                "temperature must be a number; a tensor without a softcap is "
                "logit_scale=1 / temperature"
            )
        if temperature != 1.0:
            if not 0.0 < temperature < math.inf:
                raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
            scale, softcap = scale / temperature, softcap / temperature
        if type(ignore_index) is not int:
            ignore_index = as_integer("ignore_index", ignore_index)
        elif not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
        return cls(scale, softcap, ignore_index, vocab_size)


def tempered(logit_scale: Tensor | None, temperature: float) -> Tensor | None:
    """A tensor ``logit_scale`` as the kernels take it, beside `LogitOptions.of`.

    In float64, since a quotient in bfloat16 would be off by 0.2 %, and all logits with it.
    """
    if logit_scale is None or temperature == 1.0:
        return logit_scale
    return logit_scale.double() / temperature


class LossOptions(NamedTuple):
    """What a cross entropy is made of: LossArguments of csrc/ops/arguments.h."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    focal_gamma: float = 0.0
    reduction: int = NONE

    @classmethod
    def of(
        cls,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        focal_gamma: float = 0.0,
        reduction: str = "mean",
    ) -> LossOptions:
        """The checked options.

        Raises:
            ValueError: An option is out of range.
        """
        number = _REDUCTIONS.get(reduction)
        if number is None:
            raise ValueError(
                f'{reduction!r} is not a valid value for reduction: "none", "mean", "sum"'
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
        if not 0.0 <= z_loss < math.inf:
            raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
        if not 0.0 <= focal_gamma < math.inf:
            raise ValueError(f"focal_gamma must be a finite number >= 0, got {focal_gamma}")
        return cls(label_smoothing, z_loss, focal_gamma, number)

    def statistics(self, has_probabilities: bool = False) -> tuple[str, ...]:
        """The statistics that a token's loss is a function of."""
        with_mean = has_probabilities or self.label_smoothing != 0
        return ("log_prob", "lse", "mean_log_prob") if with_mean else ("log_prob", "lse")


LOSS_OPTIONS = tuple(name for name in LossOptions._fields if name != "reduction")
"""The options of a token's loss."""

Packed = tuple[tuple[float, ...], tuple[int, ...]]


def pack(logits: LogitOptions, loss: LossOptions | None = None) -> Packed:
    """The floats and the integers of an operator's options."""
    scale, softcap, ignore_index, vocab_size, classes = logits
    if loss is None:
        return (scale, softcap), (ignore_index, vocab_size, classes)
    label_smoothing, z_loss, focal_gamma, reduction = loss
    floats = (scale, softcap, label_smoothing, z_loss, focal_gamma)
    return floats, (ignore_index, vocab_size, classes, reduction)


def unpack(floats: Sequence[float], ints: Sequence[int]) -> tuple[LogitOptions, LossOptions]:
    """What was packed."""
    scale, softcap, *of_loss = floats
    ignore_index, vocab_size, classes, *reduction = ints
    logits = LogitOptions(scale, softcap, ignore_index, vocab_size, classes)
    return logits, LossOptions(*of_loss, *reduction)  # type: ignore[arg-type]
