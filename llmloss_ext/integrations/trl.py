"""Serves TRL's trainers with the statistics of this library.

Before or after a trainer is made, in whichever order modules are imported::

    use_llmloss()
    GRPOTrainer(...).train()

TRL 1.16 computes log-probabilities and entropies in two ways. SFT, DPO, KTO, GRPO, RLOO and what
is made of them take them from the hidden states, by one autograd function; ORPO, CPO, TPO, SDPO,
SDFT and A2PO from logits, by three functions that they import by name. Both are replaced. What the
trainers make of the numbers, and what they compute in other ways (distillation, label smoothing),
stays theirs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import is_autocast
from ..functional import cross_entropy, token_stats
from ..linear import linear_log_probs, linear_token_stats
from .versions import check_version

__all__ = ["stop_llmloss", "use_llmloss"]

_MASKED = -(2**31)
"""An ignore_index that is no class: a wrong class of TRL's, -100 too, is an error as before."""
_in_use: list[tuple[Any, Any]] = []
"""What was replaced, and by what."""


def use_llmloss(
    *, max_chunk_bytes: int | None = None, logits_dtype: torch.dtype | None = None
) -> None:
    """Makes all trainers of TRL in this process use the kernels of this library.

    Losses, metrics and gradients are TRL's within rounding. Log-probabilities of 16-bit logits are
    float32, as on TRL's own GPU path, where its CPU path rounds them to the logits' dtype.

    Args:
        max_chunk_bytes: The most memory that the logits of a chunk of tokens may take; by default
            what `llmloss_ext.plan` says.
        logits_dtype: As in `llmloss_ext.linear_log_probs`: torch.float32 keeps the logits that are
            made of hidden states in float32, which the ratios of policies need.

    Raises:
        RuntimeError: The installed TRL is not a known version.
    """
    check_version("trl", "1.16")
    stop_llmloss()
    utils = importlib.import_module("trl.trainer.utils")
    replacements = {
        "_ChunkedLogProbFunction": _ChunkedLogProbs(max_chunk_bytes, logits_dtype),
        "selective_log_softmax": _selective_log_softmax,
        "entropy_from_logits": _entropy_from_logits,
        "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    }
    _in_use.extend((getattr(utils, name), ours) for name, ours in replacements.items())
    _rebind({id(theirs): ours for theirs, ours in _in_use})


def stop_llmloss() -> None:
    """Undoes `use_llmloss`; does nothing where it is not in use."""
    _rebind({id(ours): theirs for theirs, ours in _in_use})
    _in_use.clear()


def _rebind(replaced: dict[int, Any]) -> None:
    """Gives every name that stands for an object, in any module, its replacement.

    A module that is imported later takes the name from one of these. Here, where ours have names,
    they stay.
    """
    if not replaced:
        return
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__ == __name__:
            continue
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


# ----------------------------------------------------------------------------- from hidden states


class _PerToken(NamedTuple):
    """What TRL's function returns for each token (N); None where not asked for."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


class _ChunkedLogProbs:
    """Stands for TRL's autograd function, of which only ``apply`` is used."""

    def __init__(
        self, max_chunk_bytes: int | None, logits_dtype: torch.dtype | None = None
    ) -> None:
        self._max_chunk_bytes, self._logits_dtype = max_chunk_bytes, logits_dtype

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        _chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _PerToken._fields,
    ) -> _PerToken:
        """The statistics of ``hidden @ weight.T + bias``, scaled, capped, then over temperature.

        Args:
            hidden: (N, D).
            weight: (V, D).
            bias: (V) or None.
            targets: (N).
            temperature: Divides the logits after the softcap.
            _chunk_size: The width of TRL's tiles of the vocabulary; here, chunks are of tokens.
            final_logit_softcapping: The softcap, if there is one.
            logit_scale: Multiplies the logits before the softcap.
            outputs: Names of `_PerToken`; the log-probabilities are always computed.

        Returns:
            The log-probabilities and the entropy are differentiable, as TRL's.
        """
        is_refused = self._logits_dtype is None and not is_autocast(hidden)
        if weight.dtype != hidden.dtype and is_refused:
            weight = weight.to(hidden.dtype)
        options: dict[str, Any] = {
            "linear_bias": bias,
            "ignore_index": _MASKED,
            "max_chunk_bytes": self._max_chunk_bytes,
            "logits_dtype": self._logits_dtype,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
            "temperature": temperature,
        }
        with _gathered_in_backward(weight, bias):
            if not set(outputs) - {"log_probs"}:
                return _PerToken(linear_log_probs(hidden, weight, targets, **options))
            wanted = {"log_sum_sq_probs": "log_sum_sq_probs", "is_top1": "argmax"}
            extra = [statistic for name, statistic in wanted.items() if name in outputs]
            stats = linear_token_stats(hidden, weight, targets, extra=extra, **options)
        mean_logits = stats.mean_logit.detach()
        squares, predicted = stats.log_sum_sq_probs, stats.argmax
        return _PerToken(
            stats.log_prob,
            stats.entropy if "entropy" in outputs else None,
            None if squares is None else squares.detach(),
            mean_logits if "mean_logits" in outputs else None,
            None if predicted is None else torch.eq(predicted, targets),
        )


@contextmanager
def _gathered_in_backward(*weights: Tensor | None) -> Iterator[None]:
    """Lets the backward of what is computed within it read weights that ZeRO-3 splits.

    TRL gathers them for the length of the forward pass, and in its own backward once more.
    """
    if not any(hasattr(weight, "ds_status") for weight in weights):
        yield
        return
    gathered = importlib.import_module("trl.trainer.utils").maybe_gather_lm_head_ctx

    def unpack(tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_status"):
            return tensor
        with gathered(tensor):
            return tensor.detach()  # which keeps the whole weight when the parameter lets it go

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        yield


# ------------------------------------------------------------------------------------ from logits


def _selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of ``logits / temperature`` (..., V) at index (...) or (..., K).

    ``row_mask``, shaped like index: 0 where a row is not read, and has a log-probability of 0.
    """
    scale = _scale(temperature)
    if index.dim() == logits.dim():
        log_probs = _of_many_classes(logits, index, scale)
        return log_probs if row_mask is None else log_probs.masked_fill(row_mask == 0, 0.0)
    return -cross_entropy(
        logits,
        _masked(index, row_mask),
        ignore_index=_MASKED,
        reduction="none",
        logit_scale=scale,
        class_dim=-1,
    )


def _of_many_classes(logits: Tensor, index: Tensor, scale: float) -> Tensor:
    lse = token_stats(logits, _any_class(logits), logit_scale=scale).lse
    return logits.gather(-1, index).to(lse.dtype) * scale - lse.unsqueeze(-1)


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of logits (..., V). Without chunks: there is no copy for them to keep small."""
    return token_stats(logits, _any_class(logits)).entropy


def _selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both, of logits (..., V) at index (...), in one read."""
    stats = token_stats(
        logits, _masked(index, row_mask), ignore_index=_MASKED, logit_scale=_scale(temperature)
    )
    return stats.log_prob, stats.entropy if entropy_requires_grad else stats.entropy.detach()


def _scale(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    return 1 / temperature


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else index.masked_fill(row_mask == 0, _MASKED)


def _any_class(logits: Tensor) -> Tensor:
    """A target for statistics that do not depend on it."""
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
