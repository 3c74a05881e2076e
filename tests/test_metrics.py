"""Metrics against definitions, worked values and the packages that are known for them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close

from llmloss_ext import metrics, token_stats


def test_perplexity():
    assert metrics.perplexity(math.log(50_000)) == pytest.approx(50_000)
    assert metrics.perplexity(1e4) == math.inf
    assert metrics.perplexity(torch.tensor(1e4)) == math.inf
    assert metrics.perplexity(0.0) == 1
    assert math.isnan(metrics.perplexity(math.nan))


def test_corpus_perplexity_weighs_tokens_and_not_batches(device):
    corpus = metrics.CorpusPerplexity()
    assert math.isnan(corpus.compute())
    parts = [-torch.rand(n, device=device) * 5 for n in (3, 100)]
    for part in parts:
        padded = torch.cat([part, torch.full((4,), -99.0, device=device)])
        corpus.update(padded, padded > -98)
    expected = torch.exp(-torch.cat(parts).double().mean())
    assert corpus.compute() == pytest.approx(float(expected))
    corpus.update(torch.tensor([-1e6], device=device))
    assert corpus.compute() == math.inf
    with pytest.raises(ValueError):
        corpus.update(parts[0], parts[1] > 0)


def test_a_uniform_guess(device):
    logits = torch.zeros(4, 50_000, device=device)
    corpus = metrics.CorpusPerplexity()
    corpus.update(token_stats(logits, torch.arange(4, device=device)).log_prob)
    assert corpus.compute() == pytest.approx(50_000, rel=1e-5)


@pytest.mark.parametrize("shape", [(30,), (3, 10), (4, 4)])
def test_accuracies(device, shape):
    vocab = 4 if shape == (4, 4) else 17  # (4, 4, 4): torch's form would fit too
    logits = torch.randn(*shape, vocab, device=device)
    target = torch.randint(0, vocab, shape, device=device)
    target[0] = -100
    valid = target != -100
    order = logits[valid].argsort(-1, descending=True)
    for k in (1, 3):
        hits = (order[:, :k] == target[valid].unsqueeze(1)).any(1)
        assert_close(metrics.top_k_accuracy(logits, target, k), hits.double().mean(), 1e-9)
    assert metrics.accuracy(logits, target) == metrics.top_k_accuracy(logits, target, 1)


def test_ties_and_nothing_to_count(device):
    logits = torch.zeros(2, 5, device=device)
    target = torch.tensor([4, -100], device=device)
    assert metrics.accuracy(logits, target) == 0  # argmax is 0
    assert metrics.accuracy(logits, torch.tensor([0, -100], device=device)) == 1
    assert metrics.top_k_accuracy(logits, target, 4) == 0
    assert metrics.top_k_accuracy(logits, target, 5) == 1
    assert metrics.accuracy(logits, target * 0 - 100).isnan()
    with pytest.raises(ValueError, match="k must be"):
        metrics.top_k_accuracy(logits, target, 0)
    with pytest.raises(ValueError, match="to match target batch_size"):
        metrics.accuracy(logits, target[:1])


def test_length_normalized_score():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, math.nan]])
    assert metrics.length_normalized_score(log_probs[0], 0.0) == -6
    assert metrics.length_normalized_score(log_probs[0], 1.0) == -2
    assert_close(
        metrics.length_normalized_score(log_probs, 0.6, [3, 1]),
        torch.tensor([-6 / 3**0.6, -4.0]), 1e-6,
    )  # fmt: skip
    wrong = (
        (log_probs, 0.6, [3, 0]),
        (log_probs, 0.6, [4, 1]),
        (log_probs, 0.6, [3]),
        (log_probs, 0.6, [2.5, 1.0]),
        (log_probs, 0.6, torch.tensor([True, True])),
        (log_probs, math.nan),
        (torch.zeros(0), 0.6),
        (torch.zeros(2, 2, 2), 1.0),
    )
    for arguments in wrong:
        with pytest.raises(ValueError):
            metrics.length_normalized_score(*arguments)


def test_token_f1():
    assert metrics.token_f1(["the", "cat", "sat"], ["the", "cat", "sat", "down"]) == pytest.approx(
        6 / 7
    )
    assert metrics.token_f1([1, 1, 2], [1, 3]) == pytest.approx(0.4)
    assert metrics.token_f1([], []) == 1
    assert metrics.token_f1([], [1]) == 0
    for texts in (("the cat", "the cat"), ("the", ["the"]), (["the"], "the")):
        with pytest.raises(ValueError, match="compares tokens"):
            metrics.token_f1(*texts)


def test_bleu_and_rouge():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    text = "the quick brown fox jumps over the lazy dog"
    assert metrics.bleu([text], [[text]]) == pytest.approx(100)
    assert metrics.bleu(["nothing of it is there at all"], [[text]]) < 5
    two = metrics.bleu([text, text], [["something else entirely now", text], [text]])
    assert two == pytest.approx(100)
    scores = metrics.rouge([text], [text])
    assert scores == pytest.approx({"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})
    assert metrics.rouge(["the fox"], [text])["rouge1"] == pytest.approx(4 / 11)


def test_generation_metrics_want_as_many_references():
    for function in (metrics.bleu, metrics.rouge):
        for arguments in (([], []), (["a"], [])):
            with pytest.raises(ValueError, match="as many references"):
                function(*arguments)


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        (["a b"], ["a b"], "list of at least one reference"),
        (["a b", "c"], [["a b"], []], "list of at least one reference"),
        ("ab", [["a"], ["b"]], "got one text"),
        (["a", "b"], "ab", "got one text"),
    ],
)
def test_bleu_wants_lists_of_texts(predictions, references, words):
    with pytest.raises(ValueError, match=words):
        metrics.bleu(predictions, references)


def test_rouge_wants_lists_of_texts():
    with pytest.raises(ValueError, match="got one text"):
        metrics.rouge("ab", "ab")
