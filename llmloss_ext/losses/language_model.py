"""Causal language modelling."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composite, functional
from ..checks import check_token_weight, items_tensor
from ..linear import linear_cross_entropy
from ..options import LOSS_OPTIONS, documented, spelled_out
from ..sequences import Sequences, moved
from ..statistics import TokenStats
from .objective import Objective, check_projection, statistics

__all__ = [
    "LabelSmoothingCrossEntropy",
    "LanguageModelLoss",
    "LossStats",
    "causal_lm_loss",
    "confidence_penalty_loss",
    "create_causal_mask",
    "next_token_targets",
]


@partial(documented, names=Sequences._fields)
def next_token_targets(
    input_ids: Tensor,
    ignore_index: int = -100,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The target of each position: the next token, if both are real tokens of one document.

    Args:
        input_ids: (..., S), int64 or int32.
        ignore_index: Stands where there is no target.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        (..., S), of the ids' dtype.

    Raises:
        ValueError: The shapes do not fit, or S is 0.
    """
    if input_ids.dim() == 0 or input_ids.shape[-1] == 0:
        raise ValueError(
            f"input_ids must be (..., S) with at least one position, got {tuple(input_ids.shape)}"
        )
    sequences = Sequences(attention_mask, position_ids, document_ids, cu_seqlens)
    return sequences.targets(input_ids, 1, ignore_index)


@documented
def causal_lm_loss(
    logits: Tensor,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Cross entropy of ``logits[:, i]`` for ``input_ids[:, i + 1]``.

    No shifted copy of the logits is made: the (small) targets are shifted, and whatever is given
    for them; the last position is ignored.

    Args:
        logits: (..., S, V).
        input_ids: (..., S).
        Options: each is described in `llmloss_ext.options`.
        **options: Others of `llmloss_ext.cross_entropy`.

    Returns:
        The mean loss in nats, 0-d, or what ``reduction`` says: (..., S) for ``"none"``.

    Raises:
        ValueError: The shapes do not fit.
    """
    targets = next_token_targets(
        input_ids, ignore_index, attention_mask, position_ids=position_ids,
        document_ids=document_ids, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"expected logits (..., S, V) for input_ids (..., S), got {tuple(logits.shape)} and "
            f"{tuple(input_ids.shape)}"
        )
    if token_weight is not None:
        token_weight = moved(check_token_weight(token_weight, targets.shape, logits), 1, 0.0)
    return functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, token_weight=token_weight, class_dim=-1,
        **options,
    )  # fmt: skip


def create_causal_mask(
    seq_len: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The additive mask of causal attention: 0 on and below the diagonal, -inf above it.

    Args:
        seq_len: S >= 0.
        device: Of the mask.
        dtype: Floating point.

    Returns:
        (S, S): ``mask[i, j]`` is added to the score with which position i attends to position j.

    Raises:
        ValueError: ``seq_len`` is negative, or the dtype cannot hold -inf.
    """
    if seq_len < 0 or not dtype.is_floating_point:
        raise ValueError(f"expected seq_len >= 0 and a floating-point dtype, got {seq_len, dtype}")
    return torch.full((seq_len, seq_len), -math.inf, device=device, dtype=dtype).triu(1)


class LossStats(NamedTuple):
    """What one pass over the logits tells of a batch; 0-d tensors on its device."""

    loss: Tensor
    """Mean over the tokens in nats, with its gradient."""
    perplexity: Tensor
    """exp of the mean of -log p; inf where that overflows."""
    accuracy: Tensor
    """Share of tokens whose target is the argmax; nan without any."""
    top_k_accuracy: Tensor
    """Share of tokens whose target is among the k largest, equal logits ordered by class."""
    tokens: Tensor
    """Number of tokens that have a target, int64."""


_DOCUMENTS = ("position_ids", "document_ids", "cu_seqlens")
_PER_CALL = (*_DOCUMENTS, "token_weight", "num_items")


class _Tokens(NamedTuple):
    """What the positions of a batch predict, as options of the losses name it."""

    target: Tensor
    ignore_index: int
    token_weight: Tensor | None
    num_items: int | Tensor | None


class LanguageModelLoss(torch.nn.Module):
    """Next-token loss, with the statistics of the same pass on request.

    Args:
        vocab_size: V. Logits may have more columns (padded heads), which take no part.
        pad_token_id: Of padding.
        ignore_index: Tokens that are no targets. None: ``pad_token_id``; but where a call has an
            ``attention_mask``, that alone, so that a pad id may double as a real token.
        confidence_penalty: beta of -beta entropy (Pereyra et al. 2017).
        top_k: k of the statistics' top-k accuracy.
        **options: Of the loss, as `llmloss_ext.cross_entropy` has them: ``label_smoothing``,
            ``z_loss`` ... Each is an attribute.

    Raises:
        ValueError: A size or an option is out of range.
        TypeError: There is no such option.
    """

    def __init__(
        self,
        vocab_size: int,
        pad_token_id: int = 0,
        ignore_index: int | None = None,
        *,
        confidence_penalty: float = 0.0,
        top_k: int = 5,
        **options: float,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or top_k < 1:
            raise ValueError(f"vocab_size and top_k must be at least 1, got {vocab_size, top_k}")
        self.objective = Objective.of(confidence_penalty=confidence_penalty, **options)
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.ignore_index = pad_token_id if ignore_index is None else ignore_index
        self.ignore_index_is_pad = ignore_index is None
        self.top_k = top_k

    def __getattr__(self, name: str) -> Any:
        """The options are attributes."""
        if name in LOSS_OPTIONS:
            return getattr(self.objective.loss, name)
        return super().__getattr__(name)

    def forward(
        self,
        logits: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The same as `compute_loss`."""
        where = (logits, input_ids, attention_mask, linear_weight, linear_bias)
        return self.compute_loss(*where, **options)

    @partial(documented, names=_PER_CALL)
    def compute_loss(
        self,
        logits: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The mean loss of what position i predicts, for ``input_ids[..., i + 1]``.

        Both must be real tokens of one document. Without an ``attention_mask``, ids that are
        ``pad_token_id`` are padding, on either side, unless an ``ignore_index`` says otherwise.

        Args:
            logits: Logits (..., S, V); hidden states (..., S, D) if ``linear_weight`` is given,
                whose logits are then never in memory whole.
            input_ids: (..., S), int64 or int32.
            attention_mask: (..., S); tokens where it is 0 are no targets.
            linear_weight: The projection (V, D).
            linear_bias: (V), with ``linear_weight``.
            Options: each is described in `llmloss_ext.options`.

        Returns:
            0-d, in nats; without ``num_items`` nan where no token has a target, as torch's.

        Raises:
            ValueError: The shapes do not fit.
            TypeError: There is no such option.
        """
        check_projection(linear_weight, linear_bias=linear_bias)
        tokens = self._tokens(logits, input_ids, attention_mask, linear_weight, options)
        if self.objective.confidence_penalty:
            return self._from_statistics(logits, tokens, linear_weight, linear_bias, False)[0]
        how: dict[str, Any] = tokens._asdict() | {"vocab_size": self.vocab_size}
        target = how.pop("target")
        how |= self.objective.options
        if linear_weight is None:
            return functional.cross_entropy(logits, target, class_dim=-1, **how)
        return linear_cross_entropy(logits, linear_weight, target, linear_bias=linear_bias, **how)

    def compute_loss_with_stats(
        self,
        logits: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        **options: Any,
    ) -> LossStats:
        """Loss, perplexity and accuracies, from one pass over the logits and without a sync.

        Args: as in `compute_loss`.

        Returns:
            A `LossStats`: its ``loss`` is that of `compute_loss`, the rest is detached.

        Raises:
            ValueError: The shapes do not fit.
            TypeError: There is no such option.
        """
        targets = self._tokens(logits, input_ids, attention_mask, linear_weight, options)
        loss, stats = self._from_statistics(logits, targets, linear_weight, linear_bias, True)
        valid = targets.target != targets.ignore_index
        tokens = valid.sum()
        rank = stats.rank
        assert rank is not None  # with_rank
        with torch.no_grad():
            perplexity = torch.exp(-composite.total(stats.log_prob.double()) / tokens)
            hits = ((rank < k) & valid for k in (1, self.top_k))
            accuracy, top_k = (hit.sum() / tokens for hit in hits)
        return LossStats(loss, perplexity, accuracy, top_k, tokens)

    def _from_statistics(
        self,
        logits: Tensor,
        tokens: _Tokens,
        linear_weight: Tensor | None,
        linear_bias: Tensor | None,
        with_rank: bool,
    ) -> tuple[Tensor, TokenStats]:
        """The mean loss, and the statistics."""
        target, ignore_index, token_weight, num_items = tokens
        stats = statistics(
            logits, target, linear_weight, linear_bias, ignore_index=ignore_index,
            vocab_size=self.vocab_size, with_rank=with_rank,
        )  # fmt: skip
        rows = self.objective.rows(stats, target, ignore_index)
        weights = composite.row_weights(token_weight, target, ignore_index, rows.dtype)
        items = items_tensor(num_items, "mean", logits)
        return composite.mean(rows * weights, weights.sum(), items), stats

    def _tokens(
        self,
        logits: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        linear_weight: Tensor | None,
        options: dict[str, Any],
    ) -> _Tokens:
        """What each position predicts."""
        unknown = options.keys() - set(_PER_CALL)
        if unknown:
            raise TypeError(f"there is no option {', '.join(sorted(unknown))} of a call")
        columns = logits.shape[-1:] if linear_weight is None else linear_weight.shape[:1]
        if logits.dim() < 2 or columns[0] < self.vocab_size:
            raise ValueError(
                f"expected logits (..., S, V) of at least {self.vocab_size} columns, or hidden "
                f"states and a weight of as many rows; got {tuple(logits.shape)}"
                + ("" if linear_weight is None else f" and {tuple(linear_weight.shape)}")
            )
        ignore_index, is_pad = self.ignore_index, self.ignore_index == self.pad_token_id
        if attention_mask is not None and self.ignore_index_is_pad:
            ignore_index = -100  # no token has this id
        elif attention_mask is None and is_pad:
            attention_mask = input_ids != self.pad_token_id
        documents = {name: options.get(name) for name in _DOCUMENTS}
        target = next_token_targets(input_ids, ignore_index, attention_mask, **documents)
        if target.shape != logits.shape[:-1]:
            raise ValueError(
                f"expected input_ids {tuple(logits.shape[:-1])} for logits or hidden states "
                f"{tuple(logits.shape)}, got {tuple(input_ids.shape)}"
            )
        token_weight = options.get("token_weight")
        if token_weight is not None:
            token_weight = moved(check_token_weight(token_weight, target.shape, logits), 1, 0.0)
            target = torch.where(token_weight == 0, ignore_index, target)
        return _Tokens(target, ignore_index, token_weight, options.get("num_items"))

    def extra_repr(self) -> str:
        """The settings."""
        shown: dict[str, float] = {"vocab_size": self.vocab_size, "ignore_index": self.ignore_index}
        shown |= self.objective.options
        shown |= {"confidence_penalty": self.objective.confidence_penalty}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


spelled_out(LanguageModelLoss.__init__, LOSS_OPTIONS)
for _method in ("forward", "compute_loss", "compute_loss_with_stats"):
    spelled_out(getattr(LanguageModelLoss, _method), _PER_CALL)


class LabelSmoothingCrossEntropy(torch.nn.Module):
    """Cross entropy against (1 - epsilon) onehot + epsilon / V (Szegedy et al. 2016).

    Args:
        epsilon: In [0, 1].
        ignore_index: Tokens that take no part; any integer, negative or a class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: epsilon is out of range.
    """

    def __init__(
        self, epsilon: float = 0.1, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
        self.epsilon, self.ignore_index, self.reduction = epsilon, ignore_index, reduction

    def forward(
        self, logits: Tensor, target: Tensor, *, num_items: int | Tensor | None = None
    ) -> Tensor:
        """The loss of logits (..., V) for classes (...).

        Args:
            logits: (..., V): the classes are the last dimension, whatever the sizes.
            target: (...), int64 or int32.
            num_items: Replaces the number of tokens of the mean, as in `llmloss_ext.cross_entropy`.

        Returns:
            0-d in nats, or (...) for ``"none"``; the mean of no token is nan.

        Raises:
            ValueError: The shapes do not fit.
        """
        return functional.cross_entropy(
            logits,
            target,
            class_dim=-1,
            num_items=num_items,
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
            reduction=self.reduction,
        )


def confidence_penalty_loss(
    logits: Tensor,
    target: Tensor,
    beta: float = 0.1,
    *,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross entropy - beta entropy, the mean over tokens (Pereyra et al. 2017).

    Args:
        logits: Logits (..., V); hidden states (..., D) if ``linear_weight`` is given, whose logits
            are then never in memory whole.
        target: (...).
        beta: >= 0.
        linear_weight: The projection (V, D).
        linear_bias: (V), with ``linear_weight``.
        ignore_index: Tokens that take no part.
        num_items: What the sum over tokens is divided by in place of their number: the tokens of
            all micro-batches of a step; of 0 items the loss is 0.

    Returns:
        0-d, in nats; without ``num_items`` nan if no token takes part.

    Raises:
        ValueError: beta is negative or not finite, or the shapes do not fit.
    """
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    objective = Objective.of(confidence_penalty=beta)
    stats = statistics(logits, target, linear_weight, linear_bias, ignore_index=ignore_index)
    rows = objective.rows(stats, target, ignore_index)
    items = items_tensor(num_items, "mean", logits)
    return composite.mean(rows, (target != ignore_index).sum(), items)
