"""Contrastive losses over a batch of pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..linear import linear_cross_entropy
from ..linear.planning import plan
from ..ops import can_read, in_transform

__all__ = ["ClipLoss", "contrastive_loss"]

_TEMPERATURE = 0.07
_NO_ROW = torch.iinfo(torch.int64).min
"""What the cross entropies ignore: every query has a positive, and -100 is none."""


def contrastive_loss(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: Tensor | None = None,
    symmetric: bool = False,
    positives: Tensor | None = None,
) -> Tensor:
    """InfoNCE: each query is to be most similar to its own key (van den Oord et al. 2018).

    The mean over queries of -log(e^{s(i, y_i) / T} / sum_j e^{s(i, j) / T}), with s the cosine
    similarity, T the temperature and y_i the query's own key. The B x B similarities are never in
    memory: they are the chunked logits of a projection.

    Args:
        queries: (B, D).
        keys: (B, D): ``keys[i]`` belongs to ``queries[i]``. None: one view; the queries are
            their own keys, so ``positives`` must say which belong together, and the sum over j
            leaves out i itself (SimCLR, Chen et al. 2020).
        temperature: T > 0; by default 0.07.
        logit_scale: A 0-d tensor in place of 1 / T; it gets its gradient. (CLIP learns its
            logarithm: pass ``log_scale.exp()``.)
        symmetric: Adds the other direction, keys to queries, and halves the sum (CLIP,
            Radford et al. 2021).
        positives: (B) int64 or int32: the row of the key that belongs to each query; by default
            its own. With ``symmetric`` a permutation; with one view never the query's own row.

    Returns:
        The mean loss in nats, 0-d; float32 for 16-bit inputs.

    Raises:
        ValueError: The shapes do not fit, the temperature is not > 0 or given beside a
            ``logit_scale``, one view has no ``positives`` or less than two rows, or ``positives``
            are not as described (on CUDA the loss is then nan or inf instead).
        IndexError: A positive outside [0, B) (on CUDA the loss is nan instead).
    """
    if queries.dim() != 2 or (keys is not None and keys.shape != queries.shape):
        shapes = tuple(queries.shape), None if keys is None else tuple(keys.shape)
        raise ValueError(f"queries and keys must have one shape (B, D), got {shapes}")
    if not queries.shape[0]:
        raise ValueError("queries hold no row: there is nothing to tell apart")
    if positives is not None and positives.shape != queries.shape[:1]:
        raise ValueError(
            f"positives must have one row for each query, ({queries.shape[0]},), got "
            f"{tuple(positives.shape)}"
        )
    scale = _scale(temperature, logit_scale)
    q = F.normalize(queries, dim=-1)
    if keys is None:
        if positives is None or symmetric:
            raise ValueError("one view needs positives, and has no other direction")
        return _one_view(q, positives, scale)
    k = F.normalize(keys, dim=-1)
    own = torch.arange(q.shape[0], device=q.device)
    rows = own if positives is None else positives
    loss = linear_cross_entropy(q, k, rows, logit_scale=scale, ignore_index=_NO_ROW)
    if not symmetric:
        return loss
    back = own if positives is None else _inverse(positives)
    return (loss + linear_cross_entropy(k, q, back, logit_scale=scale)) / 2


def _scale(temperature: float | Tensor | None, logit_scale: Tensor | None) -> float | Tensor:
    """What the similarities are multiplied by."""
    if logit_scale is not None:
        if temperature is not None:
            raise ValueError("temperature and logit_scale are two names of one factor: give one")
        return logit_scale
    temperature = _TEMPERATURE if temperature is None else temperature
    if not isinstance(temperature, Tensor) and not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    return 1 / temperature


def _inverse(positives: Tensor) -> Tensor:
    """The query that each key belongs to; where there is none, the number of rows."""
    rows = positives.long()
    count = rows.numel()
    back = torch.full_like(rows, count)
    back.scatter_(0, rows, torch.arange(count, device=rows.device))
    if can_read(back) and bool((back == count).any()):
        raise ValueError("symmetric: positives must name each key once")
    return back


def _one_view(q: Tensor, positives: Tensor, scale: float | Tensor) -> Tensor:
    """Among the other rows of q: the similarities of some rows at a time, made twice."""
    count, features = q.shape
    if count < 2:
        raise ValueError(f"one view needs at least two rows, got {count}")
    own = torch.arange(count, device=q.device)
    if can_read(positives) and bool((positives == own).any()):
        raise ValueError("one view: a query cannot be its own positive")
    size, needs_grad = (count, features, count), (True, False)  # no sums of a weight's gradient
    step = plan(*size, q.dtype, q.device, needs_grad=needs_grad).chunk_tokens
    total = q.new_zeros(())
    for begin in range(0, count, step):
        part = (q[begin : begin + step], q, positives[begin : begin + step], begin, scale)
        # Kept until backward are the arguments alone. Transforms have no hooks for that.
        total = total + (
            _among_others(*part)
            if in_transform() or step == count
            else checkpoint(_among_others, *part, use_reentrant=False)
        )
    return total / count


def _among_others(
    queries: Tensor, keys: Tensor, rows: Tensor, begin: int, scale: float | Tensor
) -> Tensor:
    """The sum of the losses of ``queries``, the rows of ``keys`` from ``begin`` on."""
    similarities = queries @ keys.t()
    similarities.diagonal(begin).fill_(-math.inf)  # each query's to itself
    return functional.cross_entropy(
        similarities, rows, logit_scale=scale, reduction="sum", ignore_index=_NO_ROW
    )


class _AtMost(Function):
    """The smaller of x and a bound; above it, only a gradient that leads back below passes.

    A plain clamp has none there, so that a parameter above the bound would stay for ever.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_max(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x > ctx.bound, grad.clamp_min(0.0), grad), None


class ClipLoss(torch.nn.Module):
    """The symmetric contrastive loss with a learned scale (Radford et al. 2021).

    Args:
        temperature: At the start, > 0; the parameter ``log_scale`` is log(1 / temperature).
        max_scale: > 0. The scale used is at most this, as CLIP keeps it at most 100; a parameter
            above it still gets the gradient that leads back.

    Raises:
        ValueError: A number is out of range, or 1 / temperature exceeds ``max_scale``.
    """

    def __init__(self, temperature: float = _TEMPERATURE, max_scale: float = 100.0) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf or not 0.0 < max_scale < math.inf:
            raise ValueError(f"temperature and max_scale must be > 0, got {temperature, max_scale}")
        if 1 / temperature > max_scale * (1 + 1e-9):
            raise ValueError(
                f"1 / temperature = {1 / temperature:.6g} exceeds max_scale = {max_scale}"
            )
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_scale = max_scale

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """The loss of matching rows.

        Args:
            images: (B, D).
            texts: (B, D).

        Returns:
            The mean of both directions in nats, 0-d.

        Raises:
            ValueError: The shapes differ.
        """
        at_most = _AtMost.apply(self.log_scale, math.log(self.max_scale))  # type: ignore[no-untyped-call]
        return contrastive_loss(images, texts, logit_scale=at_most.exp(), symmetric=True)
