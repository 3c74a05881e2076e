"""Metrics for language models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import functional

__all__ = [
    "CorpusPerplexity",
    "Reliability",
    "ReliabilityBins",
    "accuracy",
    "bleu",
    "expected_calibration_error",
    "length_normalized_score",
    "perplexity",
    "rouge",
    "token_f1",
    "top_k_accuracy",
]


@overload
def perplexity(loss: float) -> float: ...


@overload
def perplexity(loss: Tensor) -> Tensor: ...


def perplexity(loss: float | Tensor) -> float | Tensor:
    """Perplexity, exp(loss), of a mean loss in nats; inf on overflow, nan for nan.

    Args:
        loss: A number, or a tensor of any shape.

    Returns:
        A number or a tensor, like ``loss``: the number of equally likely tokens that would be as
        hard to predict.
    """
    if isinstance(loss, Tensor):
        return torch.exp(loss)
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class CorpusPerplexity:
    """Perplexity over many batches, in which every token has the same weight.

    The sums stay on the device; only `compute` waits for it.
    """

    def __init__(self) -> None:
        """Starts without tokens."""
        self._sum: Tensor | None = None
        self._tokens: Tensor | None = None

    def update(self, log_probs: Tensor, mask: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            log_probs: log p of each token in nats, any shape.
            mask: Which tokens to count; all if None.

        Raises:
            ValueError: The shapes differ.
        """
        if mask is None:
            mask = torch.ones_like(log_probs, dtype=torch.bool)
        if mask.shape != log_probs.shape:
            raise ValueError(
                f"the mask must have shape {tuple(log_probs.shape)}, got {tuple(mask.shape)}"
            )
        mask = mask.bool()
        total = torch.where(mask, log_probs.detach().double(), 0.0).sum()
        self._sum = total if self._sum is None else self._sum + total
        tokens = mask.sum()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def compute(self) -> float:
        """exp(-mean log p); nan without tokens, inf on overflow."""
        if self._sum is None or self._tokens is None or int(self._tokens) == 0:
            return math.nan
        return perplexity(-float(self._sum) / int(self._tokens))


def top_k_accuracy(logits: Tensor, target: Tensor, k: int, *, ignore_index: int = -100) -> Tensor:
    """The fraction of tokens whose target is among the k largest logits.

    Equal logits are ordered by class, as argmax does: a model whose logits are all equal is right
    by chance only. Ignored tokens are left out.

    Args:
        logits: (..., V).
        target: (...).
        k: At least 1.
        ignore_index: Targets with this value are ignored.

    Returns:
        0-d float64, in [0, 1]; nan if all tokens are ignored.

    Raises:
        ValueError: k < 1, or the shapes do not match.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    logits = logits.detach()
    rank = functional.token_stats(logits, target, ignore_index=ignore_index, with_rank=True).rank
    assert rank is not None  # with_rank
    valid = target != ignore_index
    return ((rank < k) & valid).sum().double() / valid.sum()


def accuracy(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The fraction of tokens whose target is the argmax: `top_k_accuracy` with k = 1.

    Args:
        logits: (..., V).
        target: (...).
        ignore_index: Targets with this value are ignored.

    Returns:
        0-d float64, in [0, 1]; nan if all tokens are ignored.

    Raises:
        ValueError: The shapes do not match.
    """
    return top_k_accuracy(logits, target, 1, ignore_index=ignore_index)


class Reliability(NamedTuple):
    """What a reliability diagram shows of each bin of confidence; each (bins)."""

    tokens: Tensor
    """int64: how many."""
    confidence: Tensor
    """float64: the mean; nan in an empty bin."""
    accuracy: Tensor
    """float64: the fraction of right predictions; nan in an empty bin."""


class ReliabilityBins:
    """Calibration over many batches: sums in bins of confidence, which add up over batches.

    The bins have equal width, and bin m of M holds confidences in ((m - 1) / M, m / M], as in Guo
    et al. 2017. The sums stay on the device, are float64, and have the same bits in every run.

    Attributes:
        bins: M.
    """

    def __init__(self, bins: int = 15) -> None:
        """Starts without tokens.

        Raises:
            ValueError: bins < 1.
        """
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.bins = bins
        self._sums = torch.zeros(3, bins, dtype=torch.float64)  # tokens, confidence, right ones

    def update(self, confidence: Tensor, correct: Tensor, mask: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            confidence: The probability of each prediction, in [0, 1]; any shape. One that is nan
                makes the error nan.
            correct: Whether the prediction is right.
            mask: Which tokens to count; all if None.

        Raises:
            ValueError: The shapes differ.
        """
        for name, other in (("correct", correct), ("mask", mask)):
            if other is not None and other.shape != confidence.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(confidence.shape)}, got {tuple(other.shape)}"
                )
        p = confidence.detach().double().reshape(-1)
        bin_of = (p * self.bins).ceil().nan_to_num().clamp(1, self.bins) - 1
        inside = bin_of == torch.arange(self.bins, device=p.device).unsqueeze(1)
        if mask is not None:
            inside &= mask.reshape(-1).bool()
        right = correct.reshape(-1).bool()
        # Sums of rows: an index_add would be atomic on CUDA, and its order another in each run.
        sums = [inside.sum(1).double(), torch.where(inside, p, 0.0).sum(1), (inside & right).sum(1)]
        self._sums = self._sums.to(p.device) + torch.stack([x.double() for x in sums])

    def merge(self, other: ReliabilityBins) -> None:
        """Adds the tokens of another's, e.g. of another process.

        Raises:
            ValueError: It has another number of bins.
        """
        if other.bins != self.bins:
            raise ValueError(f"expected {self.bins} bins, got {other.bins}")
        self._sums = self._sums + other._sums.to(self._sums.device)

    def compute(self) -> Reliability:
        """The bins."""
        tokens, confidence, right = self._sums
        return Reliability(tokens.long(), confidence / tokens, right / tokens)

    def expected_calibration_error(self) -> Tensor:
        """sum_m (n_m / n) |accuracy_m - confidence_m|: 0-d float64; nan without tokens."""
        tokens, confidence, right = self._sums
        return (right - confidence).abs().sum() / tokens.sum()

    def state_dict(self) -> dict[str, list[float]]:
        """The sums as plain values."""
        names = ("tokens", "confidence", "correct")
        return dict(zip(names, self._sums.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continues from what `state_dict` returned.

        Raises:
            ValueError: It has another number of bins, or is no such state.
        """
        try:
            rows = [state[name] for name in ("tokens", "confidence", "correct")]
            sums = torch.tensor(rows, dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a ReliabilityBins: {error}") from error
        if sums.shape != (3, self.bins):
            raise ValueError(f"expected {self.bins} bins, got {tuple(sums.shape)}")
        self._sums = sums


def expected_calibration_error(
    confidence: Tensor, correct: Tensor, bins: int = 15, *, mask: Tensor | None = None
) -> Tensor:
    """How far confidence is from accuracy: ECE (Naeini et al. 2015; Guo et al. 2017).

    Tokens are put into bins of equal width by their confidence, the probability of the prediction;
    the error is the mean over the tokens of |accuracy - mean confidence| of their bin.

    Args:
        confidence: The probability of each prediction, in [0, 1]; any shape.
        correct: Whether the prediction is right, of the same shape.
        bins: At least 1.
        mask: Which tokens to count; all if None.

    Returns:
        0-d float64, in [0, 1]; nan without tokens.

    Raises:
        ValueError: bins < 1, or the shapes differ.
    """
    sums = ReliabilityBins(bins)
    sums.update(confidence, correct, mask)
    return sums.expected_calibration_error()


def length_normalized_score(
    log_probs: Tensor, alpha: float = 0.6, lengths: Tensor | Sequence[int] | None = None
) -> Tensor:
    """The sum of log p divided by length^alpha, to rank candidates of different lengths.

    alpha 0 gives the sum and 1 the mean. The default is that of GNMT (Wu et al. 2016), without the
    constants that its penalty adds to the length.

    Args:
        log_probs: (S) of one sequence, or (B, S) of a padded batch, in nats.
        alpha: Any finite number.
        lengths: (B) integers: the number of tokens of each sequence. What follows in its row is
            padding, of any value. None: each sequence has S tokens.

    Returns:
        0-d for (S), (B) for (B, S). A larger score is a likelier candidate.

    Raises:
        ValueError: A sequence is empty, a length exceeds S or is not an integer, or alpha is not
            finite.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if log_probs.dim() not in (1, 2):
        raise ValueError(f"expected (S) or (B, S), got {tuple(log_probs.shape)}")
    batch = log_probs if log_probs.dim() == 2 else log_probs.unsqueeze(0)
    size = batch.shape[1]
    if lengths is None:
        counts = torch.full((batch.shape[0],), size, device=batch.device)
    else:
        counts = torch.as_tensor(lengths, device=batch.device).reshape(-1)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {counts.dtype}")
    if counts.shape != batch.shape[:1]:
        raise ValueError(f"expected {batch.shape[0]} lengths, got {counts.numel()}")
    if bool((counts < 1).any()):
        raise ValueError("an empty sequence has no score")
    if bool((counts > size).any()):
        raise ValueError(f"a length exceeds the {size} tokens of the batch")
    inside = torch.arange(size, device=batch.device) < counts.unsqueeze(1)
    scores = torch.where(inside, batch, 0.0).sum(1) / counts.to(batch.dtype) ** alpha
    return scores if log_probs.dim() == 2 else scores[0]


def token_f1(prediction: Sequence[Any], reference: Sequence[Any]) -> float:
    """F1 of two bags of tokens, as in SQuAD (Rajpurkar et al. 2016); 1 if both are empty.

    It is 2 common / (tokens of the prediction + tokens of the reference). A token that occurs n
    times in one and m times in the other is common min(n, m) times.

    Args:
        prediction: Tokens: words, ids or anything else that can be hashed.
        reference: Tokens.

    Returns:
        In [0, 1].

    Raises:
        ValueError: An argument is a string instead of a sequence of tokens.
    """
    if isinstance(prediction, str) or isinstance(reference, str):
        raise ValueError("token_f1 compares tokens: split the texts, e.g. with text.split()")
    if not prediction or not reference:
        return float(not prediction and not reference)
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002), computed by sacrebleu with its defaults (Post 2018).

    Args:
        predictions: Texts.
        references: For each prediction, a list of at least one reference.

    Returns:
        In [0, 100].

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: There are no predictions, the two lists differ in length, a prediction has no
            reference, or an argument is a string instead of a list.
    """
    _same_length(predictions, references)
    for of_one in references:
        if isinstance(of_one, str) or not of_one:
            raise ValueError(
                f"each prediction needs a list of at least one reference, got {of_one!r}"
            )
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("bleu needs sacrebleu: pip install 'llmloss_ext[metrics]'") from error
    most = max(len(r) for r in references)
    # sacrebleu takes a stream per reference, with None where a prediction has fewer.
    streams: Any = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), computed by rouge-score.

    Args:
        predictions: Texts.
        references: One text for each prediction.

    Returns:
        The scores "rouge1", "rouge2" and "rougeL", each in [0, 1].

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: There are no predictions, the two lists differ in length, or an argument is a
            string instead of a list.
    """
    _same_length(predictions, references)
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError("rouge needs rouge-score: pip install 'llmloss_ext[metrics]'") from error
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {kind: sum(s[kind].fmeasure for s in scores) / len(scores) for kind in kinds}


def _same_length(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("expected lists of predictions and references, got one text")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"expected as many references as predictions, and at least one; got {len(predictions)} "
            f"and {len(references)}"
        )
