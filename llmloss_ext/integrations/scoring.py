"""How well a causal language model predicts given tokens, without its logits where that can be.

::

    scorer = TokenScorer(model, input_ids[:1, :8])
    with torch.no_grad():
        scores = scorer(input_ids[:, :-1], input_ids[:, 1:])

The model is any module that makes logits (B, S, V) of token ids (B, S), itself or as the ``logits``
of its output, as those of Hugging Face transformers do. If a plain `torch.nn.Linear` computes them,
with a scale and a softcap at most behind it, they are never in memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import cross_entropy, token_stats
from ..linear import linear_token_stats
from .examination import AroundTheLayer, examined
from .output_layer import columns_of, layer_of, replaced_forward, weights_of

__all__ = ["TokenScorer", "TokenScores", "linear_scores"]

_IGNORED = -100
_ROWS = 1024
_TOLERANCE = 2e-2
"""Of the lse or the target's logit, the larger: what 16 bits round."""
_NOTHING_AROUND = AroundTheLayer(1.0, 0.0, 1)


class TokenScores(NamedTuple):
    """Of each token with a target, in the order of the targets; (N)."""

    log_prob: Tensor
    """log p of the target, in nats; float32 (float64 for a float64 model)."""
    rank: Tensor
    """int64: how many tokens come before the target; 0 where the prediction is right."""
    confidence: Tensor
    """The probability of the prediction, the likeliest token; of the dtype of ``log_prob``."""


def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """The scores of hidden states, whose logits exist a chunk at a time only.

    16-bit operands get logits of float32: what a model rounds to 16 bits is not rounded here.

    Args:
        hidden: (..., D).
        weight: (V, D).
        target: (...), int64; tokens of -100 are left out.
        bias: (V).
        logit_scale: What the logits are multiplied by.
        softcap: Which softcap they get after that.

    Returns:
        The scores of the tokens that are not left out.
    """
    valid = target != _IGNORED
    hidden, target = hidden[valid], target[valid]
    sixteen = hidden.dtype.itemsize == 2 or weight.dtype.itemsize == 2
    stats = linear_token_stats(
        hidden, weight, target, linear_bias=bias, logit_scale=logit_scale, softcap=softcap,
        logits_dtype=torch.float32 if sixteen else None, with_rank=True,
    )  # fmt: skip
    assert stats.argmax is not None
    assert stats.rank is not None  # with_rank
    best = torch.empty_like(stats.lse)
    for begin in range(0, len(best), _ROWS):  # one row of the weight a token, instead of all
        rows = slice(begin, begin + _ROWS)
        classes = stats.argmax[rows].clamp_min(0)
        best[rows] = (hidden[rows].to(best.dtype) * weight[classes].to(best.dtype)).sum(-1)
        if bias is not None:
            best[rows] += bias[classes]
    best *= logit_scale
    if softcap:
        best = softcap * torch.tanh(best / softcap)
    return TokenScores(stats.log_prob, stats.rank, _confidence(stats, best))


class TokenScorer:
    """Calls a model, and scores the tokens that it should predict.

    Attributes:
        from_hidden: Whether the scores come from the hidden states; else from whole logits of each
            call, as the model returns them.
        vocab_size: V.
    """

    def __init__(self, model: nn.Module, probe: Tensor) -> None:
        """Finds out how the model makes its logits.

        Args:
            model: In evaluation mode, on the device of ``probe``.
            probe: Some token ids (1, S), S at least 1.

        Raises:
            TypeError: The model returns no logits (B, S, V).
        """
        self._model = model
        self._arguments = {"use_cache": False} if "use_cache" in _parameters(model) else {}
        self._layer, self._around = None, _NOTHING_AROUND
        with torch.no_grad(), _outputs_of_layers(model) as outputs:
            logits = self._logits(probe)
        if logits.dim() != 3 or logits.shape[:2] != probe.shape:
            raise TypeError(
                f"expected logits (B, S, V) of token ids {tuple(probe.shape)}, got "
                f"{tuple(logits.shape)}"
            )
        self.vocab_size = logits.shape[-1]
        expected = token_stats(logits, probe)
        largest = torch.maximum(expected.lse.abs(), (expected.log_prob + expected.lse).abs())
        for layer, around in self._candidates(outputs, logits):
            self._layer, self._around = layer, around
            found = self(probe, probe).log_prob
            error = (found - expected.log_prob.flatten()).abs()
            if (error < _TOLERANCE * largest.flatten()).all():
                break
            self._layer = None
        self.from_hidden = self._layer is not None

    @torch.no_grad()
    def __call__(self, ids: Tensor, target: Tensor) -> TokenScores:
        """Scores targets.

        Args:
            ids: Token ids (B, S).
            target: (B, S): the tokens that come next; those of -100 are left out.

        Returns:
            The scores of the tokens that are not left out, sequence by sequence.
        """
        if self._layer is None:
            return _dense_scores(self._logits(ids), target)
        scores: list[TokenScores] = []

        def forward(hidden: Tensor) -> Tensor:
            weight, bias = weights_of(self._layer)
            scale, cap = self._around.logit_scale, self._around.softcap or None
            scores.append(
                linear_scores(hidden, weight, target, bias=bias, logit_scale=scale, softcap=cap)
            )
            return F.linear(hidden[..., -1:, :], weight, bias)  # for what the model does to them

        with replaced_forward(self._layer, forward):
            self._logits(ids)
        return scores[0]

    def _candidates(
        self, outputs: dict[nn.Module, list[_Output]], logits: Tensor
    ) -> Iterator[tuple[Any, AroundTheLayer]]:
        """Layers whose output may be what becomes the logits, and how it becomes them."""
        for layer, made in outputs.items():
            if len(made) == 1 and made[0].became(logits) and _is_plain(layer):
                yield layer, _NOTHING_AROUND
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        if head is None or not hasattr(self._model, "loss_function"):
            return
        plain = functools.partial(cross_entropy, class_dim=-1)
        try:
            layer = layer_of(head)
            around = examined(self._model, head, columns_of(layer), [plain])
        except ValueError:  # it does more to its logits
            return
        yield layer, around

    def _logits(self, ids: Tensor) -> Tensor:
        output = self._model(ids, **self._arguments)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(f"expected logits, or an output with logits, got {type(output)}")
        return logits


def _dense_scores(logits: Tensor, target: Tensor) -> TokenScores:
    stats = token_stats(logits, target, with_rank=True)
    assert stats.argmax is not None
    assert stats.rank is not None  # with_rank
    best = logits.gather(-1, stats.argmax.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    confidence = _confidence(stats, best.to(stats.lse.dtype))
    valid = target != _IGNORED
    return TokenScores(stats.log_prob[valid], stats.rank[valid], confidence[valid])


def _confidence(stats: Any, best: Tensor) -> Tensor:
    """P of the likeliest token: of the target where it is that, to the same bits."""
    log_p = torch.where(stats.rank == 0, stats.log_prob, best - stats.lse)
    return log_p.clamp_max(0.0).exp()


def _is_plain(layer: Any) -> bool:
    try:
        return layer_of(layer) is layer
    except ValueError:
        return False


class _Output(NamedTuple):
    tensor: Tensor
    version: int | None
    """How often it had been written to; None if nobody counts (torch.inference_mode)."""

    @classmethod
    def of(cls, tensor: Tensor) -> _Output:
        return cls(tensor, None if tensor.is_inference() else tensor._version)

    def became(self, other: Tensor) -> bool:
        """Whether this is ``other``, and nothing has been written to it since."""
        return self.tensor is other and self.version is not None and self.version == other._version


def _parameters(model: nn.Module) -> Any:
    return inspect.signature(type(model).forward).parameters


@contextmanager
def _outputs_of_layers(model: nn.Module) -> Iterator[dict[nn.Module, list[_Output]]]:
    """What each linear layer returns within it."""
    outputs: dict[nn.Module, list[_Output]] = {}

    def note(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.setdefault(layer, []).append(_Output.of(output))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
