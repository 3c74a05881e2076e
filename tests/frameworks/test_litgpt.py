"""LitGPT's loss of logits, in parts or whole, and its models' step, beside ours."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from llmloss_ext.integrations.litgpt import chunked_cross_entropy

pytest.importorskip("litgpt")

BATCH, LENGTH, VOCAB = 2, 9, 32


def model():
    from litgpt import GPT, Config

    torch.manual_seed(0)
    config = Config(
        block_size=16, n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB, padded_vocab_size=VOCAB,
        final_logit_softcapping=5.0,
    )  # fmt: skip
    return GPT(config)


def theirs():
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy


@pytest.mark.parametrize("head_chunk", [0, 4])
@pytest.mark.parametrize("chunk_size", [0, 128])
def test_a_step(head_chunk, chunk_size):
    """As in its finetuning scripts."""
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    targets = tokens.masked_fill(tokens < 8, -100)
    results = []
    for loss_fn in (theirs(), chunked_cross_entropy):
        gpt = model()
        logits = gpt(tokens, lm_head_chunk_size=head_chunk)
        if head_chunk:
            logits[-1] = logits[-1][..., :-1, :]
        else:
            logits = logits[..., :-1, :]
        loss = loss_fn(logits, targets[..., 1:], chunk_size=chunk_size)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [0, 128])
def test_no_tokens(chunk_size):
    logits = torch.randn(BATCH, LENGTH, VOCAB)
    nothing = torch.full((BATCH, LENGTH), -1)
    for given in (logits, list(logits.split(4, 1))):
        wanted = theirs()(given, nothing, chunk_size, -1)
        assert_close(chunked_cross_entropy(given, nothing, chunk_size, -1), wanted, equal_nan=True)


def test_another_length():
    with pytest.raises(
        ValueError, match=r"logits of 8 positions do not fit targets of shape \(2, 9"
    ):
        chunked_cross_entropy([torch.zeros(2, 4, VOCAB)] * 2, torch.zeros(2, 9, dtype=torch.long))
