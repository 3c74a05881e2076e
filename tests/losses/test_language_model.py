"""Losses of language models, against the definition in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import losses

from .problem import B, D, S, V, lm_batch


@pytest.mark.parametrize("vocab", [V, S])  # S == V: torch's form would fit too
def test_causal_lm_loss(device, vocab):
    logits, ids = lm_batch(device, vocab)
    logits.requires_grad_()
    loss = losses.causal_lm_loss(logits, ids, ignore_index=0)
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, vocab).double(), ids[:, 1:].reshape(-1), ignore_index=0
    )
    assert_close(loss.detach(), expected.detach(), 1e-6)
    (grad,), (want,) = (torch.autograd.grad(x, logits) for x in (loss, expected))
    assert_close(grad, want, 1e-6)
    assert (grad[:, -1] == 0).all()
    each = losses.causal_lm_loss(logits, ids, ignore_index=0, reduction="none")
    assert each.shape == (B, S)
    inplace = losses.causal_lm_loss(logits * 1, ids, ignore_index=0, inplace=True)
    assert_close(inplace.detach(), expected.detach(), 1e-6)


def test_targets_and_masks(device):
    ids = torch.tensor([[5, 6, 7, 8]], device=device)
    mask = torch.tensor([[1, 1, 0, 1]], device=device)
    assert losses.next_token_targets(ids).tolist() == [[6, 7, 8, -100]]
    # Position i predicts i + 1 if both are real.
    assert losses.next_token_targets(ids, -1, mask).tolist() == [[6, -1, -1, -1]]
    with pytest.raises(ValueError, match="attention_mask must have the shape of the labels"):
        losses.next_token_targets(ids, attention_mask=mask[:, 1:])
    for empty in (ids[:, :0], ids[0, 0]):
        with pytest.raises(ValueError, match="at least one position"):
            losses.next_token_targets(empty)


def test_causal_mask():
    mask = losses.create_causal_mask(6)
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True), 1e-6)
    assert mask[0, 1] == -math.inf
    assert mask[1, 0] == 0
    assert losses.create_causal_mask(0).shape == (0, 0)
    for arguments in ({"seq_len": -1}, {"seq_len": 2, "dtype": torch.bool}):
        with pytest.raises(ValueError, match="seq_len"):
            losses.create_causal_mask(**arguments)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3},
                                     {"confidence_penalty": 0.2}])  # fmt: skip
def test_language_model_loss(device, options):
    logits, ids = lm_batch(device)
    module = losses.LanguageModelLoss(V, pad_token_id=0, top_k=3, **options)
    logits.requires_grad_()
    stats = module.compute_loss_with_stats(logits, ids)
    assert_close(stats.loss.detach(), module.compute_loss(logits, ids).detach(), 1e-6)
    x, y = logits[:, :-1].reshape(-1, V).double(), ids[:, 1:].reshape(-1)
    valid = y != 0
    log_p = torch.log_softmax(x, -1)[valid]
    at_target = log_p.gather(1, y[valid].unsqueeze(1)).squeeze(1)
    eps = options.get("label_smoothing", 0.0)
    each = -(1 - eps) * at_target - eps * log_p.mean(1)
    each = each + options.get("z_loss", 0.0) * torch.logsumexp(x, -1)[valid].square()
    entropy = -(log_p.exp() * log_p).sum(1)
    expected = (each - options.get("confidence_penalty", 0.0) * entropy).mean()
    assert_close(stats.loss.detach(), expected.detach(), 1e-6)
    (grad,), (want,) = (torch.autograd.grad(z, logits) for z in (stats.loss, expected))
    assert_close(grad, want, 1e-6)
    order = x[valid].argsort(1, descending=True)
    hits = order[:, :3] == y[valid].unsqueeze(1)
    assert_close(stats.perplexity, torch.exp(-at_target.detach().mean()), 1e-6)
    assert_close(stats.accuracy, hits[:, 0].double().mean(), 1e-6)
    assert_close(stats.top_k_accuracy, hits.any(1).double().mean(), 1e-6)
    assert stats.tokens == valid.sum()


def test_a_pad_id_that_is_also_a_token(device):
    logits, ids = lm_batch(device)
    ids[0, 2] = 0  # a real one
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    module = losses.LanguageModelLoss(V, pad_token_id=0, ignore_index=-100)
    stats = module.compute_loss_with_stats(logits, ids, mask)
    assert stats.tokens == (mask[:, 1:] == 1).sum()
    assert_close(module(logits, ids, mask), stats.loss, 1e-6)
    assert losses.LanguageModelLoss(V, pad_token_id=3).ignore_index == 3
    # Without an ignore_index of its own the mask rules too, where there is one.
    ids, mask = torch.tensor([[3, 0, 4, 5, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    module = losses.LanguageModelLoss(11, pad_token_id=0)
    logits = torch.randn(1, 5, 11)
    stats = module.compute_loss_with_stats(logits, ids, mask)
    expected = F.cross_entropy(logits[0, :3], ids[0, 1:4])
    assert stats.tokens == 3
    assert_close(stats.loss, expected, 1e-6)
    assert_close(module(logits, ids, mask), expected, 1e-6)
    assert module.compute_loss_with_stats(logits, ids).tokens == 1


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_language_model_loss_from_hidden_states(device, penalty):
    """A padded head: 3 rows of the weight are no tokens. With statistics, and without."""
    hidden = torch.randn(B, S, D, device=device)
    weight, bias = torch.randn(V + 3, D, device=device), torch.randn(V + 3, device=device)
    _, ids = lm_batch(device)
    module = losses.LanguageModelLoss(V, label_smoothing=0.1, confidence_penalty=penalty)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logits = F.linear(*leaves, bias)
    expected = module.compute_loss_with_stats(logits[..., :V], ids)
    padded = module.compute_loss_with_stats(logits, ids)
    stats = module.compute_loss_with_stats(*leaves[:1], ids, None, leaves[1], bias)
    for other in (padded, stats):
        for one, two in zip(expected, other, strict=True):
            assert_close(one.detach(), two.detach(), 1e-5)
    wanted = torch.autograd.grad(expected.loss, leaves, retain_graph=True)
    plain = module(leaves[0], ids, None, leaves[1], bias)
    for loss in (padded.loss, stats.loss, plain, module(logits, ids)):
        assert_close(loss.detach(), expected.loss.detach(), 1e-5)
        for grad, want in zip(torch.autograd.grad(loss, leaves, retain_graph=True), wanted,
                              strict=True):  # fmt: skip
            assert_close(grad, want, 1e-5)
    for wrong in ((logits[..., : V - 1], ids), (hidden, ids, None, weight[:5]),
                  (logits, ids[:, 1:]), (logits, ids, None, None, bias)):  # fmt: skip
        with pytest.raises(ValueError):
            module(*wrong)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_that_torchs_form_would_fit(device, reduction):
    """Classes are the last dimension, whatever the sizes, and rows are read in place."""
    logits = torch.randn(2, 6, 5, device=device)[:, :-1]
    target = torch.randint(0, 5, (2, 5), device=device)
    weights = torch.rand(2, 5, device=device)
    each = F.cross_entropy(logits.flatten(0, 1).double(), target.flatten(), reduction="none",
                           label_smoothing=0.2).view(2, 5)  # fmt: skip
    expected = each.mean() if reduction == "mean" else each
    module = losses.LabelSmoothingCrossEntropy(0.2, reduction=reduction)
    assert_close(module(logits, target), expected, 1e-6)
    loss = losses.causal_lm_loss(logits, target, token_weight=weights, reduction=reduction)
    # The weights are of the labels, and move with them.
    flat = F.cross_entropy(logits.flatten(0, 1).double(), target.roll(-1, 1).flatten(),
                           reduction="none").view(2, 5) * weights.roll(-1, 1)  # fmt: skip
    flat[:, -1] = 0
    if reduction == "mean":
        flat = flat.sum() / weights[:, 1:].sum()
    assert_close(loss, flat, 1e-6)
    four = torch.randn(2, 2, 3, 5, device=device)
    index = torch.randint(0, 5, (2, 2, 3), device=device)
    wanted = F.cross_entropy(four.flatten(0, 2), index.flatten())
    assert_close(losses.LabelSmoothingCrossEntropy(0.0)(four, index), wanted, 1e-6)
    with pytest.raises(ValueError):
        losses.LabelSmoothingCrossEntropy()(four, index[0])


def test_one_pass_for_all_statistics(monkeypatch):
    logits, ids = lm_batch("cpu")
    calls = []
    right = losses.language_model.functional.token_stats

    def counted(*args, **kwargs):
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(losses.language_model.functional, "token_stats", counted)
    monkeypatch.setattr(losses.language_model.functional, "cross_entropy", None)
    losses.LanguageModelLoss(V).compute_loss_with_stats(logits, ids)
    assert len(calls) == 1


def test_no_valid_token(device):
    logits = torch.randn(1, 3, V, device=device)
    stats = losses.LanguageModelLoss(V).compute_loss_with_stats(
        logits, torch.zeros(1, 3, dtype=torch.long, device=device)
    )
    assert stats.loss.isnan()
    assert stats.accuracy.isnan()
    assert stats.tokens == 0


def test_modules_compose(device, tmp_path):
    logits, ids = lm_batch(device)
    for module in (losses.LanguageModelLoss(V), losses.LabelSmoothingCrossEntropy(0.1, 0)):
        again = copy.deepcopy(module)
        again.load_state_dict(module.state_dict())
        arguments = (logits, ids) if isinstance(module, losses.LanguageModelLoss) else (
            logits.flatten(0, 1), ids.flatten())  # fmt: skip
        assert torch.equal(module(*arguments), again(*arguments))


@pytest.mark.slow
def test_modules_compile(device):
    logits, ids = lm_batch(device)
    module = losses.LanguageModelLoss(V, label_smoothing=0.1)
    clip = losses.ClipLoss().to(device)
    views = torch.randn(2, 6, D, device=device)
    cases = (
        (module, (logits, ids)),
        (lambda x, y: module.compute_loss_with_stats(x, y)[0], (logits, ids)),
        (losses.LabelSmoothingCrossEntropy(), (logits.flatten(0, 1), ids.flatten())),
        (lambda a, b: clip(a, b), tuple(views)),
    )
    for function, (x, y) in cases:
        torch._dynamo.reset()
        results = []
        for run in (function, torch.compile(function, fullgraph=True)):
            leaf = x.clone().requires_grad_()
            loss = run(leaf, y)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for one, other in zip(*results, strict=True):
            assert_close(one, other, 1e-6)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
def test_label_smoothing(device, ignore_index):
    logits, target = torch.randn(20, V, device=device), torch.randint(0, V, (20,), device=device)
    target[::3] = ignore_index
    loss = losses.LabelSmoothingCrossEntropy(0.2, ignore_index)(logits, target)
    expected = F.cross_entropy(
        logits.double(), target, label_smoothing=0.2, ignore_index=ignore_index
    )
    assert_close(loss, expected, 1e-6)
    with pytest.raises(ValueError, match="epsilon"):
        losses.LabelSmoothingCrossEntropy(1.5)


def test_confidence_penalty(device):
    logits = torch.randn(B, S, V, device=device, requires_grad=True)
    target = torch.randint(0, V, (B, S), device=device)
    target[0] = -100
    loss = losses.confidence_penalty_loss(logits, target, 0.3)
    x, y = logits.double().flatten(0, 1), target.flatten()
    log_p = torch.log_softmax(x, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)[y != -100].mean()
    expected = F.cross_entropy(x, y) - 0.3 * entropy
    assert_close(loss.detach(), expected.detach(), 1e-6)
    (grad,), (want,) = (torch.autograd.grad(z, logits) for z in (loss, expected))
    assert_close(grad, want, 1e-6)
    with pytest.raises(ValueError, match="beta"):
        losses.confidence_penalty_loss(logits, target, math.nan)
    with pytest.raises(ValueError, match="need linear_weight"):
        losses.confidence_penalty_loss(logits, target, linear_bias=logits[0, 0])
    leaves = [torch.randn(B, S, D, device=device), torch.randn(V, D, device=device)]
    for leaf in leaves:
        leaf.requires_grad_()
    from_hidden = losses.confidence_penalty_loss(leaves[0], target, 0.3, linear_weight=leaves[1])
    whole = losses.confidence_penalty_loss(F.linear(*leaves), target, 0.3)
    assert_close(from_hidden.detach(), whole.detach(), 1e-5)
    for one, other in zip(torch.autograd.grad(from_hidden, leaves),
                          torch.autograd.grad(whole, leaves), strict=True):  # fmt: skip
        assert_close(one, other, 1e-5)
