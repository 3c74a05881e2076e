"""Log p and log(1 - p) of chosen columns, in plain torch, that keep their digits as p goes to 1.

1 - p is the sum of all other probabilities, and is made of these: the difference from 1 would have
lost them. At most one column has more than half of the whole, the largest, so one more sum per row,
without that column, is enough for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .composite import real_of

__all__ = ["Distribution", "columns_of"]

_LOWEST = 4
"""A logit of -inf stands as the lowest finite number over this, as in `llmloss_ext.composite`."""
_LINEAR = 40
"""From here on log(1 + e^x) is x, to float64's last place."""


def columns_of(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows.gather(-1, columns)``, (..., K), whose gradient adds up in a fixed order.

    That of a gather is added by atomics on a GPU, in any order where a row names a column twice;
    that of an index is sorted there first. A CPU goes row by row.
    """
    if rows.device.type == "cpu":
        return rows.gather(-1, columns)
    flat, chosen = rows.reshape(-1, rows.shape[-1]), columns.reshape(-1, columns.shape[-1])
    every = torch.arange(flat.shape[0], device=flat.device).unsqueeze(-1)
    return flat[every, chosen].reshape(columns.shape)


class Distribution(NamedTuple):
    """Rows of logits, differentiable."""

    x: Tensor
    """(n, V), in float32 or float64; no -inf."""
    lse: Tensor
    """(n, 1)."""
    top: Tensor
    """(n, 1): the largest column."""
    lead: Tensor
    """(n, 1): its logit above the lse of all others: the log of its odds."""

    @classmethod
    def of(cls, logits: Tensor, scale: float | Tensor = 1.0, softcap: float = 0.0) -> Distribution:
        """Of logits (n, V) by the options of `llmloss_ext.options`; softcap 0: none."""
        real = real_of(logits)
        x = logits.to(real) * (scale.to(real) if isinstance(scale, Tensor) else scale)
        if softcap > 0:
            x = softcap * torch.tanh(x / softcap)
        lowest = torch.finfo(real).min / _LOWEST
        x = x.clamp_min(lowest)
        top = x.detach().argmax(-1, keepdim=True)
        # Relative to the largest, as the kernels have it: small differences keep their digits.
        near_0 = x - x.detach().gather(-1, top)
        others = torch.logsumexp(near_0.scatter(-1, top, lowest), -1, keepdim=True)
        return cls(x, torch.logsumexp(x, -1, keepdim=True), top, near_0.gather(-1, top) - others)

    def log_probs(self, columns: Tensor) -> Tensor:
        """Log p of columns (n, K)."""
        plain = columns_of(self.x, columns) - self.lse
        return torch.where(columns == self.top, -F.softplus(-self.lead, threshold=_LINEAR), plain)

    def log_rest(self, chosen: Tensor) -> Tensor:
        """The sum over the chosen columns, (n, V) bool, of log(1 - p): (n)."""
        is_top = torch.zeros_like(chosen).scatter(-1, self.top, True)
        small = chosen & ~is_top
        p = torch.where(small, self.x - self.lse, -torch.inf).exp()
        of_top = -F.softplus(self.lead, threshold=_LINEAR)
        top_is_chosen = chosen.gather(-1, self.top)
        return (torch.log1p(-p).sum(-1, keepdim=True) + torch.where(top_is_chosen, of_top, 0.0))[
            ..., 0
        ]
