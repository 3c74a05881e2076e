"""Causal language modelling."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext import composite, functional
from llmloss_ext.losses.shapes import classes_last

__all__ = [
    "LabelSmoothingCrossEntropy",
    "LanguageModelLoss",
    "LossStats",
    "causal_lm_loss",
    "confidence_penalty_loss",
    "create_causal_mask",
    "next_token_targets",
]


def next_token_targets(
    input_ids: Tensor, ignore_index: int = -100, attention_mask: Tensor | None = None
) -> Tensor:
    """The target of each position: the next token; none behind the last.

    Args:
        input_ids: (..., S), int64 or int32.
        ignore_index: Stands where there is no target.
        attention_mask: (..., S); positions whose next token is masked (0 or False) get no target.

    Returns:
        (..., S), of the ids' dtype.

    Raises:
        ValueError: The shapes do not fit.
    """
    if input_ids.dim() == 0:
        raise ValueError("input_ids must have a dimension of positions")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        input_ids = torch.where(attention_mask.bool(), input_ids, ignore_index)
    return F.pad(input_ids[..., 1:], (0, 1), value=ignore_index)


def causal_lm_loss(
    logits: Tensor,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Cross entropy of ``logits[:, i]`` for ``input_ids[:, i + 1]``.

    No shifted copy of the logits is made: the (small) targets are shifted, and the last position
    is ignored.

    Args:
        logits: (..., S, V).
        input_ids: (..., S).
        attention_mask: (..., S); tokens that are masked are no targets.
        ignore_index: Tokens that are no targets.
        **options: Of `llmloss_ext.cross_entropy`.

    Returns:
        The loss in nats; see `llmloss_ext.cross_entropy`.

    Raises:
        ValueError: The shapes do not fit.
    """
    targets = next_token_targets(input_ids, ignore_index, attention_mask)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"expected logits (..., S, V) for input_ids (..., S), got {tuple(logits.shape)} and "
            f"{tuple(input_ids.shape)}"
        )
    rows, flat = classes_last(logits, targets)
    loss = functional.cross_entropy(rows, flat, ignore_index=ignore_index, **options)
    return loss.reshape(targets.shape) if loss.dim() else loss


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
    """Share of tokens whose target has the largest logit (ties count for it); nan without any."""
    top_k_accuracy: Tensor
    """Share of tokens whose target is among the k largest."""
    tokens: Tensor
    """Number of tokens that have a target, int64."""


class LanguageModelLoss(torch.nn.Module):
    """Next-token loss, with the statistics of the same pass on request.

    Args:
        vocab_size: V, the logits' last dimension.
        pad_token_id: Of padding.
        ignore_index: Tokens that are no targets; None: ``pad_token_id``. A pad id that doubles as a
            real token needs the ``attention_mask`` of the calls and another ``ignore_index``.
        label_smoothing: In [0, 1].
        z_loss: Factor of lse^2.
        confidence_penalty: beta of -beta entropy (Pereyra et al. 2017).
        top_k: k of the statistics' top-k accuracy.

    Raises:
        ValueError: A size or an option is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        pad_token_id: int = 0,
        ignore_index: int | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        confidence_penalty: float = 0.0,
        top_k: int = 5,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or top_k < 1:
            raise ValueError(f"vocab_size and top_k must be at least 1, got {vocab_size, top_k}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        if not 0.0 <= z_loss < math.inf or not 0.0 <= confidence_penalty < math.inf:
            raise ValueError("z_loss and confidence_penalty must be finite numbers >= 0")
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.ignore_index = pad_token_id if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.confidence_penalty = confidence_penalty
        self.top_k = top_k

    def forward(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The same as `compute_loss`."""
        return self.compute_loss(logits, input_ids, attention_mask)

    def compute_loss(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The mean loss of ``logits[:, i]`` (B, S, V) for ``input_ids[:, i + 1]`` (B, S), nats.

        nan where no token has a target, as torch's.
        """
        if self.confidence_penalty:
            return self.compute_loss_with_stats(logits, input_ids, attention_mask).loss
        self._check(logits)
        return causal_lm_loss(
            logits,
            input_ids,
            attention_mask=attention_mask,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )

    def compute_loss_with_stats(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> LossStats:
        """Loss, perplexity and accuracies, from one pass over the logits and without a sync."""
        self._check(logits)
        targets = next_token_targets(input_ids, self.ignore_index, attention_mask)
        rows, flat = classes_last(logits, targets)
        stats = functional.token_stats(rows, flat, ignore_index=self.ignore_index, with_rank=True)
        valid = flat != self.ignore_index
        tokens = valid.sum()
        options = composite.LossOptions(self.label_smoothing, self.z_loss, 0)
        losses = composite.losses_of(stats[:4], flat, None, None, self.ignore_index, options)
        if self.confidence_penalty:
            losses = losses - self.confidence_penalty * stats.entropy
        assert stats.rank is not None  # with_rank
        with torch.no_grad():
            perplexity = torch.exp(-stats.log_prob.double().sum() / tokens)
            hits = ((stats.rank < k) & valid for k in (1, self.top_k))
            accuracy, top_k = (hit.sum() / tokens for hit in hits)
        return LossStats(losses.sum() / tokens, perplexity, accuracy, top_k, tokens)

    def _check(self, logits: Tensor) -> None:
        if logits.dim() < 2 or logits.shape[-1] != self.vocab_size:
            raise ValueError(
                f"expected logits (..., S, {self.vocab_size}), got {tuple(logits.shape)}"
            )

    def extra_repr(self) -> str:
        """The settings."""
        names = ("vocab_size", "ignore_index", "label_smoothing", "z_loss", "confidence_penalty")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class LabelSmoothingCrossEntropy(torch.nn.Module):
    """Cross entropy against (1 - epsilon) onehot + epsilon / V (Szegedy et al. 2016).

    Args:
        epsilon: In [0, 1].
        ignore_index: Tokens that take no part; any integer, negative or a class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    def __init__(
        self, epsilon: float = 0.1, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
        self.epsilon, self.ignore_index, self.reduction = epsilon, ignore_index, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, V) or (..., V) for classes (N) or (...), in nats."""
        return functional.cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
            reduction=self.reduction,
        )


def confidence_penalty_loss(
    logits: Tensor, target: Tensor, beta: float = 0.1, *, ignore_index: int = -100
) -> Tensor:
    """Cross entropy - beta entropy, the mean over tokens in nats (Pereyra et al. 2017).

    Args:
        logits: (..., V).
        target: (...).
        beta: >= 0.
        ignore_index: Tokens that take no part.

    Raises:
        ValueError: beta is negative or not finite, or the shapes do not fit.
    """
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    rows, flat = classes_last(logits, target)
    stats = functional.token_stats(rows, flat, ignore_index=ignore_index)
    tokens = (flat != ignore_index).sum()
    return (-stats.log_prob - beta * stats.entropy).sum() / tokens
