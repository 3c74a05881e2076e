"""Independent float64 references, in plain torch or numpy, for every option of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transformed(
    input: Tensor, softcap: float | None, logit_scale: Any, vocab: int, temperature: float = 1.0
) -> Tensor:
    x = input.double()[..., :vocab] * logit_scale
    capped = x if softcap is None else softcap * torch.tanh(x / softcap)
    return capped / temperature


def stats(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: Any = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """log_prob, lse, entropy, mean_log_prob, argmax, rank of logits (..., V) in float64."""
    vocab = input.shape[-1] if vocab_size is None else vocab_size
    x = transformed(input, softcap, logit_scale, vocab, temperature)
    log_p = torch.log_softmax(x, -1)
    valid = target != ignore_index
    index = torch.where(valid, target, 0).long().unsqueeze(-1)
    w = torch.ones(vocab, dtype=torch.float64) if weight is None else weight.double()[:vocab]
    terms = torch.where(w.to(x.device) == 0, 0.0, w.to(x.device) * log_p)
    # By sorting: where the target stands, equal logits in the order of their columns.
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    rank = (order == index).int().argmax(-1)
    out = {
        "log_prob": log_p.gather(-1, index).squeeze(-1),
        "lse": torch.logsumexp(x, -1),
        "entropy": torch.special.entr(log_p.exp()).sum(-1),
        "mean_log_prob": terms.sum(-1) / vocab,
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "argmax": x.argmax(-1),
        "rank": rank,
    }
    blank = {"argmax": -1, "rank": vocab}
    return {k: torch.where(valid, v, blank.get(k, 0)) for k, v in out.items()}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    softcap: float | None = None,
    logit_scale: Any = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross entropy of logits (..., V) in float64; class indices only."""
    s = stats(
        input, target, weight=weight, ignore_index=ignore_index, softcap=softcap,
        logit_scale=logit_scale, temperature=temperature, vocab_size=vocab_size,
    )  # fmt: skip
    valid = (target != ignore_index).double()
    w_y = valid
    if weight is not None:
        w_y = weight.double()[torch.where(target == ignore_index, 0, target).long()] * valid
    rows = -(1 - label_smoothing) * w_y * s["log_prob"] - label_smoothing * s["mean_log_prob"]
    rows = rows * (1 - s["log_prob"].exp()) ** focal_gamma
    tokens = valid if token_weight is None else token_weight.double() * valid
    rows, z_rows = rows * tokens, z_loss * s["lse"] ** 2 * tokens
    if reduction == "none":
        return rows + z_rows
    if reduction == "sum":
        return (rows + z_rows).sum()
    if num_items is not None:
        return (rows + z_rows).sum() / num_items
    return rows.sum() / (w_y * tokens).sum() + z_rows.sum() / tokens.sum()
