"""Contrastive losses over a batch of pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext.linear import linear_cross_entropy

__all__ = ["ClipLoss", "contrastive_loss"]


def contrastive_loss(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    logit_scale: Tensor | None = None,
    symmetric: bool = False,
    positives: Tensor | None = None,
) -> Tensor:
    """InfoNCE: each query is to be most similar to its own key (van den Oord et al. 2018).

    Cosine similarity over temperature, and cross entropy over the keys of the batch. The B x B
    similarities are never in memory: they are the chunked logits of a projection.

    Args:
        queries: (B, D).
        keys: (B, D): ``keys[i]`` belongs to ``queries[i]``. None: one view; the queries are
            their own keys, so ``positives`` must say which belong together.
        temperature: > 0.
        logit_scale: A 0-d tensor used in place of 1 / temperature; it gets its gradient. (CLIP
            learns its logarithm: pass ``log_scale.exp()``.)
        symmetric: Adds the other direction, keys to queries, and halves the sum (CLIP,
            Radford et al. 2021).
        positives: (B) int64: the row of the key that belongs to each query; by default its own.
            With one view, a query is no key of itself.

    Returns:
        The mean loss in nats, 0-d.

    Raises:
        ValueError: The shapes do not fit, the temperature is not > 0, or one view has no
            ``positives``.
    """
    if queries.dim() != 2 or (keys is not None and keys.shape != queries.shape):
        shapes = tuple(queries.shape), None if keys is None else tuple(keys.shape)
        raise ValueError(f"queries and keys must have one shape (B, D), got {shapes}")
    if not isinstance(temperature, Tensor) and not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    if positives is not None and positives.shape != queries.shape[:1]:
        raise ValueError(
            f"positives must have one row for each query, ({queries.shape[0]},), got "
            f"{tuple(positives.shape)}"
        )
    scale: float | Tensor = 1 / temperature if logit_scale is None else logit_scale
    q = F.normalize(queries, dim=-1)
    if keys is None:
        if positives is None or symmetric:
            raise ValueError("one view needs positives, and has no other direction")
        return _one_view(q, positives, scale)
    k = F.normalize(keys, dim=-1)
    rows = torch.arange(q.shape[0], device=q.device) if positives is None else positives
    loss = linear_cross_entropy(q, k, rows, logit_scale=scale)
    if not symmetric:
        return loss
    if positives is not None:
        # Whose key each row is: the inverse of the permutation.
        rows = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=q.device))
    return (loss + linear_cross_entropy(k, q, rows, logit_scale=scale)) / 2


def _one_view(q: Tensor, positives: Tensor, scale: float | Tensor) -> Tensor:
    """Without a query's similarity to itself: log(e^lse - e^self), from row statistics alone."""
    from llmloss_ext.linear import linear_token_stats

    stats = linear_token_stats(q, q, positives, logit_scale=scale)
    own = (q * q).sum(-1).float() * scale
    # log-prob among the others: log p / (1 - p_self).
    p_self = torch.exp(own - stats.lse)
    return (-stats.log_prob + torch.log1p(-p_self.clamp_max(1 - 1e-7))).mean()


class ClipLoss(torch.nn.Module):
    """The symmetric contrastive loss with a learned scale (Radford et al. 2021).

    Args:
        temperature: At the start; the parameter is log(1 / temperature).
        max_scale: The scale is kept below this, as CLIP keeps it below 100.
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf or not max_scale > 0:
            raise ValueError(f"temperature and max_scale must be > 0, got {temperature, max_scale}")
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_scale = max_scale

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """The loss of matching rows (B, D) and (B, D)."""
        scale = self.log_scale.exp().clamp_max(self.max_scale)
        return contrastive_loss(images, texts, logit_scale=scale, symmetric=True)
