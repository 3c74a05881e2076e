"""Padding, packed documents, and what is given per label: in every function that shifts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from properties import SETTINGS, hypothesis, st

from llmloss_ext import (
    linear_cross_entropy,
    linear_log_probs,
    linear_token_stats,
    losses,
    nn,
)
from llmloss_ext.integrations import transformers
from llmloss_ext.sequences import Sequences

V, D = 17, 8
WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def through_module(h, ids, token_weight=None, **given):
    module = nn.LinearCrossEntropyLoss(D, V, linear_weight=WEIGHT, shift=1)
    return module(h, ids, token_weight=token_weight, **given)


def language_model(h, ids, token_weight=None, **given):
    return losses.LanguageModelLoss(V, pad_token_id=-1, ignore_index=-1)(
        F.linear(h, WEIGHT), ids, token_weight=token_weight, **given
    )


def with_statistics(h, ids, token_weight=None, **given):
    module = losses.LanguageModelLoss(V, pad_token_id=-1, ignore_index=-1)
    return module.compute_loss_with_stats(
        h, ids, linear_weight=WEIGHT, token_weight=token_weight, **given
    ).loss


def from_log_probs(h, ids, token_weight=None, **given):
    log_p = linear_log_probs(h, WEIGHT, ids, shift=1, **given)
    w = torch.ones(ids.shape) if token_weight is None else F.pad(token_weight[..., 1:], (0, 1))
    w = torch.where(Sequences(**given).targets(ids, 1, -100) == -100, 0.0, w)
    return -(w * log_p).sum() / w.sum()


def from_statistics(h, ids, token_weight=None, **given):
    log_p = linear_token_stats(h, WEIGHT, ids, shift=1, **given).log_prob
    w = torch.ones(ids.shape) if token_weight is None else F.pad(token_weight[..., 1:], (0, 1))
    w = torch.where(Sequences(**given).targets(ids, 1, -100) == -100, 0.0, w)
    return -(w * log_p).sum() / w.sum()


SHIFTING = {
    "linear": lambda h, ids, **given: linear_cross_entropy(h, WEIGHT, ids, shift=1, **given),
    "module": through_module,
    "log_probs": from_log_probs,
    "statistics": from_statistics,
    "causal": lambda h, ids, **given: losses.causal_lm_loss(F.linear(h, WEIGHT), ids, **given),
    "language model": language_model,
    "with statistics": with_statistics,
    "transformers": lambda h, ids, **given: transformers.causal_lm_loss(
        F.linear(h, WEIGHT), ids, V, **given
    ),
}


def documents(seed, lengths):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    return torch.randn(1, tokens, D), torch.randint(0, V, (1, tokens)), torch.rand(1, tokens) + 0.5


def by_definition(hidden, ids, weights, lengths):
    """The mean over the documents' own next tokens, in float64."""
    total, count, begin = 0.0, 0.0, 0
    for length in lengths:
        z = hidden[0, begin : begin + length - 1].double() @ WEIGHT.double().t()
        inside = slice(begin + 1, begin + length)
        each = F.cross_entropy(z, ids[0, inside], reduction="none")
        total += (each * weights[0, inside]).sum()
        count += weights[0, inside].sum()
        begin += length
    return total / count


def boundaries(lengths):
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return {
        "position_ids": positions,
        "document_ids": numbers,  # (S): for all rows
        "cu_seqlens": ends,
    }


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5).filter(lambda x: max(x) > 1)


@pytest.mark.parametrize("name", SHIFTING)
@SETTINGS
@hypothesis.given(st.integers(0, 1000), LENGTHS)
def test_packed_documents(name, seed, lengths):
    hidden, ids, weights = documents(seed, lengths)
    plain = by_definition(hidden, ids, torch.ones_like(weights), lengths)
    weighted = by_definition(hidden, ids, weights, lengths)
    for kind, tensor in boundaries(lengths).items():
        assert_close(SHIFTING[name](hidden, ids, **{kind: tensor}), plain, 2e-6)
        actual = SHIFTING[name](hidden, ids, token_weight=weights, **{kind: tensor})
        assert_close(actual, weighted, 2e-6)


@pytest.mark.parametrize("name", SHIFTING)
@SETTINGS
@hypothesis.given(st.integers(0, 1000), st.integers(2, 7), st.integers(0, 4), st.integers(0, 4))
def test_the_side_of_the_padding_changes_nothing(name, seed, length, left, right):
    hidden, ids, weights = documents(seed, [length])
    expected = by_definition(hidden, ids, weights, [length])
    padded = F.pad(ids, (left, right), value=3)
    states = F.pad(hidden, (0, 0, left, right), value=9.0)
    mask = F.pad(torch.ones_like(ids), (left, right))
    wide = F.pad(weights, (left, right), value=2.0)
    for kind in (mask, mask.bool(), mask.float()):
        actual = SHIFTING[name](states, padded, token_weight=wide, attention_mask=kind)
        assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_language_model_knows_its_pads(penalty):
    hidden, ids, _ = documents(0, [6])
    ids = ids.clamp_min(1)
    logits = F.linear(hidden, WEIGHT)
    module = losses.LanguageModelLoss(V, pad_token_id=0, confidence_penalty=penalty)
    expected = module.compute_loss_with_stats(logits, ids)
    assert expected.tokens == 5
    for left, right in ((3, 0), (0, 3), (2, 2)):
        padded = module.compute_loss_with_stats(
            F.pad(logits, (0, 0, left, right), value=4.0), F.pad(ids, (left, right))
        )
        for name in expected._fields:
            assert_close(getattr(padded, name), getattr(expected, name), 1e-6)


def test_a_label_that_a_prompt_predicts_is_kept():
    """Ignored labels are no padding: a prompt's last token predicts the answer's first."""
    hidden, ids, _ = documents(1, [6])
    labels = ids.clone()
    labels[0, :3] = -100
    each = F.cross_entropy(F.linear(hidden, WEIGHT)[0, 2:5].double(), ids[0, 3:], reduction="mean")
    for name in ("linear", "module", "causal", "transformers"):
        assert_close(SHIFTING[name](hidden, labels), each, 2e-6)


def test_several_tokens_ahead():
    """With shift=2, both tokens and the one between them must be of one document."""
    lengths = [4, 1, 3]
    _, ids, _ = documents(2, lengths)
    wanted = [ids[0, 2], ids[0, 3], -100, -100, -100, ids[0, 7], -100, -100]
    for kind, tensor in boundaries(lengths).items():
        targets = Sequences(**{kind: tensor}).targets(ids, 2, -100)
        assert targets.tolist() == [[int(x) for x in wanted]], kind
    assert (Sequences().targets(ids, 20, -100) == -100).all()


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_what_stands_between_two_tokens(shift):
    """Numbers of documents may return, and padding may lie within a row."""
    ids = torch.arange(10, 19)
    numbers, real = (
        torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1]),
        torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1]),
    )
    for given, tensor in (("document_ids", numbers), ("attention_mask", real)):
        found = Sequences(**{given: tensor}).targets(ids, shift, -1).tolist()
        for i in range(9):
            span = tensor[i : i + shift + 1].tolist()
            whole = len(span) == shift + 1
            one = whole and len(set(span)) == 1 and (given == "document_ids" or span[0] == 1)
            assert found[i] == (ids[i + shift] if one else -1), (given, i)


def test_rows_of_a_batch_and_all_kinds_at_once():
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    numbers = torch.tensor([[0, 1, 1, 1, 2, 2], [5, 5, 6, 6, 6, 6]])
    positions = torch.arange(6)
    given = Sequences(mask, positions, numbers, torch.tensor([0, 3, 12]))
    assert given.targets(ids, 1, -1).tolist() == [[-1, 2, -1, -1, 5, -1], [7, -1, 9, 10, -1, -1]]


BAD = [
    ({"attention_mask": torch.ones(5)}, "attention_mask must have the shape of the labels"),
    ({"position_ids": torch.ones(3, 2, 6)}, "position_ids must have the shape of the labels"),
    ({"document_ids": torch.ones(2, 5)}, "document_ids must have the shape of the labels"),
    ({"cu_seqlens": torch.ones(2, 2)}, "cu_seqlens must hold"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must hold"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Sequences(**given).targets(torch.zeros(2, 6, dtype=torch.long), 1, -100)


def test_without_a_shift_they_have_no_meaning():
    with pytest.raises(ValueError, match="position_ids: needs shift >= 1"):
        linear_cross_entropy(
            torch.randn(4, D), WEIGHT, torch.zeros(4, dtype=torch.long),
            position_ids=torch.arange(4),
        )  # fmt: skip
    with pytest.raises(TypeError, match="there is no option masks"):
        losses.LanguageModelLoss(V)(
            torch.randn(1, 4, V), torch.ones(1, 4, dtype=torch.long), masks=1
        )


def test_shifted_labels_of_transformers_bring_their_weights():
    hidden, ids, weights = documents(3, [6])
    logits = F.linear(hidden, WEIGHT)
    shifted = F.pad(ids[..., 1:], (0, 1), value=-100)
    moved = F.pad(weights[..., 1:], (0, 1))
    one = transformers.causal_lm_loss(logits, ids, V, token_weight=weights)
    other = transformers.causal_lm_loss(logits, None, V, shift_labels=shifted, token_weight=moved)
    assert_close(one, other, 1e-6)


@pytest.mark.parametrize(
    "swallowed", [{"loss_mask": torch.ones(1, 6)}, {"logits_scaling": 0.7}], ids=str
)
def test_transformers_loss_swallows_nothing_that_would_change_it(swallowed):
    hidden, ids, _ = documents(4, [6])
    logits = F.linear(hidden, WEIGHT)
    with pytest.raises(TypeError, match="the loss does not know"):
        transformers.causal_lm_loss(logits, ids, V, **swallowed)
    # What models pass on besides.
    others = {"input_ids": ids, "use_cache": False, "max_length_q": 3, "return_dict": True}
    plain = transformers.causal_lm_loss(logits, ids, V)
    assert torch.equal(plain, transformers.causal_lm_loss(logits, ids, V, **others))
    each = transformers.causal_lm_loss(logits, ids, V, reduction="none")
    assert_close(each.sum() / 5, plain, 1e-6)
    wide = F.pad(logits, (0, 5), value=50.0)  # a padded head
    assert_close(transformers.causal_lm_loss(wide, ids, V), plain, 1e-6)
