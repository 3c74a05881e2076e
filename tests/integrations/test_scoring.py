"""The scores of tokens under any causal model, against its own logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmloss_ext.integrations.scoring import TokenScorer, linear_scores

V = 37


class Plain(nn.Module):
    """Hidden states by running means; ``how`` says what is done to the logits."""

    def __init__(self, how="plain", bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V, bias=bias)
        self.how = how

    def forward(self, ids):
        steps = torch.arange(1, ids.shape[1] + 1).unsqueeze(-1)
        hidden = 4 * self.embedding(ids).cumsum(1) / steps.to(self.head.weight.dtype)
        if self.how == "function":
            return nn.functional.linear(hidden, self.head.weight, self.head.bias)
        logits = self.head(hidden)
        if self.how == "twice":
            return self.head(hidden) if logits is not None else None
        if self.how == "normalised":
            return logits.log_softmax(-1)
        if self.how == "in place":
            return logits.mul_(2)  # the same tensor, but not what the layer computes
        if self.how == "masked in place":
            logits[..., V // 2 :] = -1e9  # as for rows that only fill up a vocabulary
        if self.how == "scaled a little":
            logits.mul_(0.99)
        if self.how == "banned in place":
            logits[..., 3] = -torch.inf
        return logits


def inputs(rows=3, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (rows, length + 1), generator=generator)
    target = ids[:, 1:].clone()
    target[0, :4] = target[1, -2:] = -100
    return ids[:, :-1], target


def check(model, scorer, ids, target, **tolerance):
    scores = scorer(ids, target)
    with torch.no_grad():
        output = model(ids)
    log_p = getattr(output, "logits", output).double().log_softmax(-1)
    valid = target != -100
    expected = log_p[valid].gather(1, target[valid, None]).squeeze(1)
    torch.testing.assert_close(scores.log_prob.double(), expected, **tolerance)
    best = log_p[valid].max(-1).values.exp()
    torch.testing.assert_close(scores.confidence.double(), best, **tolerance)
    assert scores.confidence.max() <= 1
    assert torch.equal(scores.rank == 0, log_p[valid].argmax(-1) == target[valid])
    return scores


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("how", "from_hidden"),
    [
        ("plain", True), ("function", False), ("twice", False), ("normalised", False),
        ("in place", False), ("masked in place", False), ("scaled a little", False),
        ("banned in place", False),
    ],
)  # fmt: skip
def test_plain_modules(how, from_hidden, bias):
    model = Plain(how, bias).eval()
    ids, target = inputs()
    scorer = TokenScorer(model, ids[:1, :3])
    assert scorer.from_hidden == from_hidden
    assert scorer.vocab_size == V
    check(model, scorer, ids, target, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(model.head)


def test_hooks_that_change_the_logits():
    """The layer's weight does not make them: the model's own logits are read."""
    model = Plain().eval()
    model.head.register_forward_hook(lambda _layer, _inputs, output: output * 3)
    ids, target = inputs()
    scorer = TokenScorer(model, ids[:1, :3])
    assert not scorer.from_hidden
    check(model, scorer, ids, target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Of 16 bits, the logits are not rounded: nearer to float64 than the model's own."""
    model = Plain().to(dtype).eval()
    ids, target = inputs()
    scorer = TokenScorer(model, ids[:1, :3])
    assert scorer.from_hidden
    scores = scorer(ids, target)
    whole = Plain().to(dtype).double().eval()
    if dtype == torch.float64:
        check(whole, scorer, ids, target, rtol=1e-12, atol=1e-12)
    else:
        assert scores.log_prob.dtype == torch.float32
        expected = TokenScorer(whole, ids[:1, :3])(ids, target)
        torch.testing.assert_close(
            scores.log_prob.double(), expected.log_prob, rtol=2e-2, atol=2e-2
        )


def test_more_tokens_than_are_taken_at_once():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2500, 8, generator=generator)
    weight, bias = torch.randn(V, 8, generator=generator), torch.randn(V, generator=generator)
    target = torch.randint(0, V, (2500,), generator=generator)
    scores = linear_scores(hidden, weight, target, bias=bias, logit_scale=0.5, softcap=2.0)
    logits = 2 * torch.tanh(0.5 * (hidden.double() @ weight.double().T + bias) / 2)
    best = logits.softmax(-1).max(-1).values
    torch.testing.assert_close(scores.confidence.double(), best, rtol=1e-5, atol=1e-6)


def test_no_target():
    model = Plain().eval()
    ids, target = inputs()
    scores = TokenScorer(model, ids[:1, :3])(ids, torch.full_like(target, -100))
    assert [x.numel() for x in scores] == [0, 0, 0]


def test_what_is_ignored_may_be_anything():
    """Nan where nothing is scored spoils nothing; nan where something is shows."""
    _, target = inputs()
    weight, hidden = torch.randn(V, 8), torch.randn(3, 9, 8)
    clean = linear_scores(hidden, weight, target)
    hidden[0, :4] = torch.nan
    for one, other in zip(clean, linear_scores(hidden, weight, target), strict=True):
        assert torch.equal(one, other)
    hidden[2, 0] = torch.nan
    assert linear_scores(hidden, weight, target).log_prob.isnan().sum() == 1
    assert linear_scores(hidden, weight, target).confidence.isnan().sum() == 1


@pytest.mark.parametrize("module", [nn.Flatten(), nn.GRU(1, 1), nn.Softmax(-1)])
def test_what_makes_no_logits(module):
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        TokenScorer(module, torch.zeros(1, 2, dtype=torch.int64))


def test_models_of_transformers():
    """The scale and the softcap behind the layer are found."""
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for config in (
        transformers.LlamaConfig(**small),
        transformers.Gemma2Config(**small, final_logit_softcapping=0.1),
        transformers.CohereConfig(**small, logit_scale=5.0),
        transformers.GraniteConfig(**small, logits_scaling=0.25),
    ):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids, target = inputs()
        scorer = TokenScorer(model, ids[:1, :3])
        assert scorer.from_hidden
        check(model, scorer, ids, target, rtol=1e-4, atol=1e-6)
