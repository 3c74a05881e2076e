"""What the losses of sequences share that take hidden states: options, tokens and a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear import linear_log_probs
from ..linear.functional import HowChunks, HowLogits, LinearCall
from ..linear.groups import GroupLimit, Groups
from ..linear.objective import ObjectiveLoss
from ..linear.walk import Objective
from ..options import OPTIONS, Option
from ..sequences import Sequences
from ..shard import Shard
from ..statistics import asked

__all__ = [
    "HIDDEN_OPTIONS",
    "LOG_PROB",
    "HiddenOptions",
    "PolicyTokens",
    "is_of_tokens",
    "options_of_part",
]

LOG_PROB = ("log_prob", "lse")
"""The statistics that a log-probability is made of."""


class HiddenOptions(NamedTuple):
    """The options of `HIDDEN_OPTIONS`, as users give them."""

    mask: Tensor | None
    reference_log_probs: Tensor | None
    reference_input: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    linear_bias: Tensor | None
    ignore_index: int | None
    softcap: float | None
    logit_scale: float | Tensor
    temperature: float
    vocab_size: int | None
    shift: int
    chunk_tokens: int | None
    max_chunk_bytes: int | None
    drop_ignored: bool | None
    logits_dtype: torch.dtype | None
    weight_grad_dtype: torch.dtype | None
    shard: Shard | None

    @classmethod
    def split(cls, options: dict[str, Any]) -> tuple[HiddenOptions, dict[str, Any]]:
        """These options, by default where they are not given, and all others."""
        own = {name: options.get(name, HIDDEN_OPTIONS[name].default) for name in cls._fields}
        return cls(**own), {name: x for name, x in options.items() if name not in own}


_OWN = {
    "mask": Option(
        "Tensor | None",
        None,
        "Which tokens count, shaped like the target; None: all whose target is not ignored. Like "
        "everything else of a token, with a ``shift`` it stands where `linear_log_probs` has the "
        "token.",
    ),
    "reference_log_probs": Option(
        "Tensor | None",
        None,
        "The reference's log-probabilities of the tokens, shaped like the target; for losses of "
        "sequences also one number each. Or:",
    ),
    "reference_input": Option(
        "Tensor | None", None, "The reference's hidden states (..., S, E), with its"
    ),
    "reference_weight": Option("Tensor | None", None, "(V, E) and"),
    "reference_bias": Option("Tensor | None", None, "(V). None of them gets a gradient."),
}

HIDDEN_OPTIONS = {name: (OPTIONS | _OWN)[name] for name in HiddenOptions._fields}
"""The options that all these losses have."""


_OF_BOTH = (
    "softcap", "logit_scale", "temperature", "vocab_size", "chunk_tokens", "max_chunk_bytes",
    "drop_ignored", "logits_dtype", "shard",
)  # fmt: skip
"""The options that hold for the reference's projection, too."""


class PolicyTokens:
    """The tokens of a policy from its hidden states, and what a reference says of them.

    Attributes:
        shape: Of the tokens.
        valid: Of that shape: which tokens count.
    """

    def __init__(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, options: HiddenOptions
    ) -> None:
        o = options
        logits = HowLogits(
            o.ignore_index, o.softcap, o.logit_scale, o.vocab_size, o.temperature, o.logits_dtype
        )
        self._walk = HowChunks(
            o.chunk_tokens, o.max_chunk_bytes, o.drop_ignored, o.weight_grad_dtype
        )
        self.call = LinearCall(
            input, linear_weight, target, o.linear_bias, None, logits, o.shift, Sequences(), o.shard
        )
        self.chunks = self.call.chunk_options(self._walk)
        self.valid, self.shape = self.call.leave_out(o.mask), self.call.shape
        self._options = options

    def reference(self) -> Tensor | None:
        """The reference's log-probabilities, as given or of each token; None: there is none.

        Raises:
            ValueError: There are two, or a part of one.
        """
        o = self._options
        if o.reference_input is None:
            if o.reference_weight is not None or o.reference_bias is not None:
                raise ValueError("reference_weight and reference_bias need reference_input")
            return o.reference_log_probs
        if o.reference_weight is None or o.reference_log_probs is not None:
            raise ValueError(
                "a reference is reference_log_probs, or reference_input with reference_weight"
            )
        # The targets are those of the positions by now, and ignored where left out.
        labels, ignored = self.call.targets.reshape(self.shape), self.call.options.ignore_index
        with torch.no_grad():
            return linear_log_probs(
                o.reference_input, o.reference_weight, labels, linear_bias=o.reference_bias,
                ignore_index=ignored, **{name: getattr(o, name) for name in _OF_BOTH},
            )  # fmt: skip

    def walk(
        self,
        objective: Objective,
        names: tuple[str, ...],
        groups: Groups | None = None,
        *,
        in_parts: bool = True,
        items: int | None = None,
    ) -> ObjectiveLoss:
        """A loss that is a sum over the tokens, or over groups of them, in one walk.

        A group that does not fit into a chunk costs a fourth product: its statistics come first,
        and backward computes the logits again.

        Args:
            objective: The loss.
            names: The statistics that it reads.
            groups: How the tokens belong together; None: each is by itself.
            in_parts: Whether it is such a sum; else it needs all groups at once.
            items: It is about a mean over so many; None: over the tokens.
        """
        limit = None
        if groups is not None:
            limit = GroupLimit(groups, 0)
            if in_parts:
                limit = self.call.group_limit(groups, self._walk, self.chunks)
        return self.call.walk(objective, asked(names), self.chunks, limit, items)

    def log_probs(self) -> Tensor:
        """Of the tokens, in nats; 0 where they do not count."""
        log_probs: Tensor = self.call.stats(asked(LOG_PROB), self.chunks).floats.log_prob
        return log_probs.reshape(self.shape)


def options_of_part(
    options: dict[str, Any], of_each: Sequence[str], part: slice, number: int
) -> dict[str, Any]:
    """The options for some of the pairs or sequences, whose losses add up to the mean over all.

    Args:
        options: Those for all of them.
        of_each: The names of those that are a number for each.
        part: Which of them.
        number: How many there are.
    """
    options = dict(options)
    for name in of_each:
        if options.get(name) is not None:
            options[name] = options[name][part]
    if part.stop - part.start < number and options.get("num_items") is None:
        options["num_items"] = number
    return options


def is_of_tokens(reference: Tensor, valid: Tensor, *, must: bool = False) -> bool:
    """Whether a reference has a number for each token (B, S); else it has one a sequence, (B).

    Raises:
        ValueError: It has another shape, or it ``must`` be of tokens and is not.
    """
    if reference.shape == valid.shape:
        return True
    if reference.shape != valid.shape[:1] or must:
        raise ValueError(
            f"reference_log_probs must have one number per token, {tuple(valid.shape)}"
            + ("" if must else f", or per sequence, {tuple(valid.shape[:1])}")
            + f"; got {tuple(reference.shape)}"
        )
    return False
