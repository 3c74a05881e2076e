"""The loss family against independent float64 computations, worked values and other packages."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close

import llmloss_ext
from llmloss_ext import cross_entropy, losses, token_stats

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

SETTINGS = hypothesis.settings(max_examples=25, deadline=None)
B, S, V, D = 3, 7, 41, 12


def lm_batch(device, vocab=V):
    logits = torch.randn(B, S, vocab, device=device)
    ids = torch.randint(1, vocab, (B, S), device=device)
    ids[1, 4:] = 0  # padding
    return logits, ids


# ------------------------------------------------------------------------------- distributions


def test_worked_values():
    fair, skewed = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    assert losses.entropy(fair, base=2) == 1
    assert float(losses.entropy(skewed, base=2)) == pytest.approx(0.469, abs=5e-4)
    assert float(losses.cross_entropy_between(skewed, fair, base=2)) == pytest.approx(1)
    assert float(losses.kl_divergence(skewed, fair, base=2)) == pytest.approx(0.531, abs=5e-4)
    assert losses.kl_divergence(skewed, fair) != losses.kl_divergence(fair, skewed)
    one = torch.tensor([1.0, 0.0])
    assert losses.entropy(one) == 0
    assert losses.kl_divergence(one, torch.tensor([0.0, 1.0])) == math.inf
    assert losses.kl_divergence(one, one) == 0
    assert losses.cross_entropy_between(one, torch.tensor([0.5, 0.5]), base=2) == 1


def test_distributions_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    p, q = torch.softmax(torch.randn(2, 5, 30).double(), -1)
    for base in (2, 10, math.e):
        assert_close(
            losses.entropy(p, base), torch.tensor(scipy.entropy(p, base=base, axis=1)), 1e-12
        )
        expected = torch.tensor(scipy.entropy(p, q, base=base, axis=1))
        assert_close(losses.kl_divergence(p, q, base), expected, 1e-12)


def test_distributions_with_zeros_and_nan():
    """0 log 0 = 0 with finite gradients, and what is nan stays nan."""
    zeros = torch.tensor([[0.0, 0.25, 0.75]]).double()
    other = torch.tensor([[0.0, 0.5, 0.5]]).double()
    functions = (
        losses.kl_divergence, losses.cross_entropy_between, lambda p, q: losses.entropy(p) + 0 * q
    )  # fmt: skip
    for function in functions:
        p, q = zeros.clone().requires_grad_(), other.clone().requires_grad_()
        value = function(p, q).sum()
        assert value.isfinite()
        for grad in torch.autograd.grad(value, (p, q)):
            assert grad.isfinite().all()
        for where in ((math.nan, 0.25, 0.75), (0.0, math.nan, 0.75)):
            bad = torch.tensor([where]).double()
            assert function(bad, other).isnan().all()
            if function is not functions[2]:
                assert function(zeros, bad).isnan().all()
    x = torch.tensor([0.0, -800.0, 1.0]).double().requires_grad_()
    (grad,) = torch.autograd.grad(losses.entropy(torch.softmax(x, -1)), x)
    two = x.detach()[::2].clone().requires_grad_()
    (want,) = torch.autograd.grad(losses.entropy(torch.softmax(two, -1)), two)
    assert_close(grad[::2], want, 1e-12)
    assert grad[1] == 0


rows = st.lists(st.floats(-30, 30), min_size=2, max_size=20)


@SETTINGS
@hypothesis.given(rows, st.randoms(use_true_random=False))
def test_divergences_are_not_negative_and_zero_of_themselves(x, random):
    p = torch.softmax(torch.tensor(x).double(), -1)
    shuffled = list(x)
    random.shuffle(shuffled)
    q = torch.softmax(torch.tensor(shuffled).double(), -1)
    assert losses.kl_divergence(p, p) == 0
    assert losses.kl_divergence(p, q) >= -1e-12
    difference = losses.cross_entropy_between(p, q) - losses.entropy(p)
    assert_close(losses.kl_divergence(p, q), difference, 1e-9)
    assert 0 <= losses.entropy(p) <= math.log(len(x)) + 1e-9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: losses.entropy(p, base=1.0), "base must be"),
        (lambda p: losses.entropy(p, base=-2), "base must be"),
        (lambda p: losses.entropy(p * 2, check=True), "sum to 1"),
        (lambda p: losses.entropy(p - 1, check=True), "negative probability"),
        (lambda p: losses.kl_divergence(p, p * math.nan, check=True), "q holds"),
        (lambda p: losses.kl_divergence(p, torch.ones(3) / 3), "number of outcomes"),
        (lambda p: losses.check_probabilities(p * 2, "target"), "target must sum to 1"),
        (lambda p: losses.check_probabilities(p - 0.5, "target"), "target holds a negative"),
    ],
)
def test_what_is_no_distribution_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.tensor([0.25, 0.75]))


def test_roundings_are_no_mistake():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        p = torch.softmax(torch.randn(4, 5000), -1).to(dtype)
        losses.check_probabilities(p)
    losses.check_probabilities(p[:0])


# ------------------------------------------------------------------------- language modelling


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
    assert losses.next_token_targets(ids, -1, mask).tolist() == [[6, -1, 8, -1]]
    with pytest.raises(ValueError, match="shape of input_ids"):
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
    assert module.compute_loss_with_stats(logits, ids).tokens == 2


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
    flat = F.cross_entropy(logits.flatten(0, 1).double(), target.roll(-1, 1).flatten(),
                           reduction="none").view(2, 5) * weights  # fmt: skip
    flat[:, -1] = 0
    if reduction == "mean":
        flat = flat.sum() / weights[:, :-1].sum()
    assert_close(loss, flat, 1e-6)
    view = losses.shapes.classes_last(logits, target)
    assert view.data_ptr() == logits.data_ptr()
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


# ------------------------------------------------------------------------------- properties


@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.floats(-1e3, 1e3))
def test_a_common_offset_changes_nothing(seed, offset):
    torch.manual_seed(seed)
    logits, ids = torch.randn(2, 5, 17).double(), torch.randint(0, 17, (2, 5))
    expected = losses.causal_lm_loss(logits, ids)
    assert_close(losses.causal_lm_loss(logits + offset, ids), expected, 1e-9)


@SETTINGS
@hypothesis.given(st.integers(0, 10_000))
def test_a_permuted_vocabulary_changes_nothing(seed):
    torch.manual_seed(seed)
    logits, target = torch.randn(9, 23).double(), torch.randint(0, 23, (9,))
    order = torch.randperm(23)
    moved = torch.empty(23, dtype=torch.long).scatter_(0, order, torch.arange(23))
    one = token_stats(logits, target, with_rank=True)
    other = token_stats(logits[:, order], moved[target], with_rank=True)
    for name in ("log_prob", "lse", "entropy", "mean_log_prob", "rank"):
        assert_close(getattr(one, name), getattr(other, name), 1e-12)


PADDED = {
    "plain": lambda x, y: losses.LanguageModelLoss(19)(x, y),
    "statistics": lambda x, y: losses.LanguageModelLoss(19).compute_loss_with_stats(x, y).loss,
    "penalty": lambda x, y: losses.LanguageModelLoss(19, confidence_penalty=0.1)(x, y),
    "confidence": lambda x, y: losses.confidence_penalty_loss(x, y, ignore_index=0),
    "distillation": lambda x, y: losses.distillation_loss(
        x, x.detach().flip(-1), target=y, ignore_index=0
    ),
    "mlm": lambda x, y: losses.mlm_loss(x, y, ignore_index=0),
}


@pytest.mark.parametrize("name", PADDED)
@SETTINGS
@hypothesis.given(st.integers(0, 10_000), st.integers(1, 2000), st.integers(1, 1500))
def test_padding_changes_no_bit(name, seed, length, extra):
    torch.manual_seed(seed)
    logits, ids = torch.randn(1, length, 19), torch.randint(1, 19, (1, length))
    leaves = [logits.requires_grad_(), F.pad(logits.detach(), (0, 0, 0, extra), value=9.0)]
    leaves[1].requires_grad_()
    results = []
    for leaf, tokens in zip(leaves, (ids, F.pad(ids, (0, extra))), strict=True):
        loss = PADDED[name](leaf, tokens)
        results.append((loss.detach().nan_to_num(), *torch.autograd.grad(loss, leaf)))
    assert torch.equal(results[0][0], results[1][0])
    if length > 1:  # of one token, none has a target
        assert torch.equal(results[0][1], results[1][1][:, :length])
        assert (results[1][1][:, length:] == 0).all()


# ------------------------------------------------------------------------------- masked LM


def test_mask_tokens():
    ids = torch.randint(5, 1000, (200, 100))
    before = ids.clone()
    ids[:, 0] = 1  # special
    before[:, 0] = 1

    def mask(seed):
        generator = torch.Generator().manual_seed(seed)
        return losses.mask_tokens(ids, 4, 1000, special_tokens=[1], generator=generator)

    hidden, labels = mask(3)
    assert torch.equal(ids, before)
    chosen = labels != -100
    assert not chosen[:, 0].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    count = chosen.sum().item()
    assert count / ids[:, 1:].numel() == pytest.approx(0.15, abs=0.01)
    masked = (hidden == 4)[chosen].sum().item() / count
    same = (hidden == ids)[chosen].sum().item() / count
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1, abs=0.03)
    for a, b in zip(mask(3), (hidden, labels), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(mask(4)[1], labels)


def test_mask_tokens_options():
    ids = torch.arange(10, 20).view(2, 5)
    none, labels = losses.mask_tokens(ids, 3, 50, probability=0.0)
    assert torch.equal(none, ids)
    assert (labels == -100).all()
    allowed = torch.zeros(2, 5, dtype=torch.bool)
    allowed[0, 2] = True
    hidden, labels = losses.mask_tokens(
        ids, 3, 50, probability=1.0, mask_share=1.0, random_share=0.0, maskable=allowed
    )
    assert hidden[0, 2] == 3
    assert (labels != -100).sum() == 1
    for wrong in ({"probability": 1.5}, {"mask_share": 0.8, "random_share": 0.3},
                  {"maskable": allowed[:1]}, {"vocab_size": 0}, {"vocab_size": 3}):  # fmt: skip
        with pytest.raises(ValueError):
            losses.mask_tokens(ids, 3, **{"vocab_size": 50, **wrong})
    for dtype in (torch.float32, torch.uint8, torch.int16):
        with pytest.raises(ValueError, match="int64 or int32"):
            losses.mask_tokens(ids.to(dtype), 3, 50)


@pytest.mark.parametrize("from_hidden", [False, True])
def test_mlm_loss(device, from_hidden):
    hidden, weight = torch.randn(B, S, D, device=device), torch.randn(V, D, device=device)
    labels = torch.full((B, S), -100, device=device)
    labels[0, 2], labels[2, 5] = 7, 9
    leaf = (hidden if from_hidden else hidden @ weight.t()).clone().requires_grad_()
    arguments = (weight,) if from_hidden else ()
    loss = losses.mlm_loss(leaf, labels, *arguments)
    logits = (hidden.double() @ weight.double().t()).flatten(0, 1)
    assert_close(loss.detach(), F.cross_entropy(logits, labels.flatten()), 1e-5)
    loss.backward()
    assert (leaf.grad[1] == 0).all()
    for wrong in (labels[:, 1:], labels.t()):  # misaligned, with as many labels or not
        with pytest.raises(ValueError):
            losses.mlm_loss(leaf, wrong, *arguments)
    if from_hidden:
        for drop in (False, True):
            again = losses.mlm_loss(leaf, labels, weight, drop_ignored=drop, num_items=4)
            assert_close(again.detach(), loss.detach() / 2, 1e-5)
    else:
        for options in ({"drop_ignored": True}, {"linear_bias": weight[:, 0]}):
            with pytest.raises(ValueError, match="need linear_weight"):
                losses.mlm_loss(leaf, labels, **options)
    empty = losses.mlm_loss(leaf, torch.full_like(labels, -100), *arguments)
    assert empty == 0
    empty.backward()


# ------------------------------------------------------------------------------- contrastive


def info_nce(q, k, rows, temperature):
    q, k = F.normalize(q.double(), dim=-1), F.normalize(k.double(), dim=-1)
    return F.cross_entropy(q @ k.t() / temperature, rows)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_contrastive(device, symmetric, permuted):
    q, k = torch.randn(2, 19, D, device=device)
    rows = torch.randperm(19, device=device) if permuted else torch.arange(19, device=device)
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    loss = losses.contrastive_loss(
        *leaves, temperature=0.2, symmetric=symmetric, positives=rows if permuted else None
    )
    exact = [q.double().requires_grad_(), k.double().requires_grad_()]
    expected = info_nce(*exact, rows, 0.2)
    if symmetric:
        expected = (expected + info_nce(exact[1], exact[0], rows.argsort(), 0.2)) / 2
    assert_close(loss.detach(), expected.detach(), 1e-5)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact),
                    strict=True):  # fmt: skip
        assert_close(a, b, 1e-5)


def one_view(x, positives, temperature):
    q = F.normalize(x, dim=-1)
    own = torch.eye(len(x), device=x.device, dtype=torch.bool)
    return F.cross_entropy((q @ q.t() / temperature).masked_fill(own, -math.inf), positives)


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
@pytest.mark.parametrize("chunk", [5, 16])
def test_one_view(device, temperature, chunk, monkeypatch):
    """SimCLR: two views of each sample in one batch, no sample its own key."""
    module = losses.contrastive
    right = module.plan
    monkeypatch.setattr(module, "plan", lambda *a: right(*a, chunk_tokens=chunk))
    x = torch.randn(16, D, device=device)
    positives = torch.arange(16, device=device) ^ 1
    leaf = x.clone().requires_grad_()
    scale = torch.tensor(1 / temperature, device=device, requires_grad=True)
    loss = losses.contrastive_loss(leaf, temperature=temperature, positives=positives)
    scaled = losses.contrastive_loss(leaf, logit_scale=scale, positives=positives.int())
    exact = x.double().requires_grad_()
    exact_scale = scale.detach().double().requires_grad_()
    expected = one_view(exact, positives, 1 / exact_scale)
    assert_close(loss.detach(), expected.detach(), 1e-6)
    assert_close(scaled.detach(), expected.detach(), 1e-6)
    (grad,) = torch.autograd.grad(loss, leaf)
    want, want_scale = torch.autograd.grad(expected, (exact, exact_scale))
    assert_close(grad, want, 1e-5)
    assert_close(torch.autograd.grad(scaled, scale)[0], want_scale, 1e-5)


def test_one_view_in_float64(monkeypatch):
    module = losses.contrastive
    right = module.plan
    positives = torch.tensor([1, 0, 3, 2, 0])
    x = torch.randn(5, 3).double().requires_grad_()

    def loss(x):
        return losses.contrastive_loss(x, temperature=0.07, positives=positives)

    assert_close(loss(x).detach(), one_view(x.detach(), positives, 0.07), 1e-12)
    wanted = torch.autograd.grad(loss(x), x)[0]
    assert_close(torch.func.grad(loss)(x.detach()), wanted, 1e-12)
    monkeypatch.setattr(module, "plan", lambda *a: right(*a, chunk_tokens=2))
    assert torch.autograd.gradcheck(loss, x)


def test_one_view_keeps_no_similarities(monkeypatch):
    module = losses.contrastive
    right = module.plan
    monkeypatch.setattr(module, "plan", lambda *a: right(*a, chunk_tokens=8))
    x = torch.randn(64, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1],
                                                  lambda t: t):  # fmt: skip
        losses.contrastive_loss(x, positives=torch.arange(64) ^ 1)
    assert max(kept) <= 64 * D


def test_clip(device):
    module = losses.ClipLoss(0.1).to(device)
    images, texts = torch.randn(2, 11, D, device=device)
    module(images, texts).backward()
    log_scale = module.log_scale.detach().double().requires_grad_()
    q, k = (F.normalize(t.double(), dim=-1) for t in (images, texts))
    logits = q @ k.t() * log_scale.exp()
    rows = torch.arange(11, device=device)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.t(), rows)) / 2
    (want,) = torch.autograd.grad(expected, log_scale)
    assert_close(module.log_scale.grad, want, 1e-5)
    again = losses.ClipLoss()
    again.load_state_dict(module.state_dict())
    assert again.log_scale == module.log_scale


@pytest.mark.parametrize(
    "arguments",
    [
        {"keys": torch.randn(4, D)},
        {"keys": torch.randn(5, D), "temperature": 0.0},
        {"keys": torch.randn(5, D), "temperature": 0.07, "logit_scale": torch.tensor(2.0)},
        {"keys": torch.randn(5, D), "positives": torch.zeros(4).long()},
        {"keys": torch.randn(5, D), "positives": torch.zeros(5).long(), "symmetric": True},
        {},
        {"symmetric": True, "positives": torch.zeros(5).long()},
        {"positives": torch.tensor([1, 0, 3, 2, 4])},  # the last its own
    ],
)
def test_contrastive_bad_input(arguments):
    with pytest.raises(ValueError):
        losses.contrastive_loss(torch.randn(5, D), **arguments)


def test_one_view_of_one_row():
    with pytest.raises(ValueError, match="at least two rows"):
        losses.contrastive_loss(torch.randn(1, D), positives=torch.zeros(1).long())


def test_a_key_that_is_nobodys_is_seen_in_a_graph():
    """Where no value can be looked at, the loss says so and reads no memory that nobody wrote."""
    twice = torch.tensor([0, 0, 1])
    q, k = torch.randn(2, 3, D)
    run = torch.compile(
        lambda: losses.contrastive_loss(q, k, positives=twice, symmetric=True), backend="eager"
    )
    with pytest.raises(IndexError):
        run()


def test_positives_of_int32(device):
    q, k = torch.randn(2, 5, D, device=device)
    rows = torch.randperm(5, device=device)
    one, other = (
        losses.contrastive_loss(q, k, positives=r, symmetric=True) for r in (rows, rows.int())
    )
    assert torch.equal(one, other)


def test_the_scale_of_clip_comes_back():
    module = losses.ClipLoss(0.1, max_scale=20.0)
    with torch.no_grad():
        module.log_scale.fill_(math.log(500.0))
    images, texts = torch.randn(2, 9, D)  # do not match: a smaller scale is better
    loss = module(images, texts)
    loss.backward()
    expected = losses.contrastive_loss(images, texts, temperature=1 / 20, symmetric=True)
    assert_close(loss.detach(), expected, 1e-5)
    assert module.log_scale.grad > 0
    module.log_scale.grad = None
    module(images, images).backward()  # match: no further above
    assert module.log_scale.grad == 0
    with pytest.raises(ValueError, match="exceeds max_scale"):
        losses.ClipLoss(0.001)


# ------------------------------------------------------------------------------- combined


def test_combined():
    x = torch.tensor(2.0, requires_grad=True)

    def never():
        raise AssertionError("a term of weight 0 is not computed")

    combined = losses.combined_loss(
        {"a": x * 3, "b": lambda: x * x, "c": never}, {"a": 1.0, "b": 0.5, "c": 0.0}
    )
    assert combined.total == 8
    assert {name: float(t) for name, t in combined.terms.items()} == {"a": 6.0, "b": 4.0}
    assert not any(t.requires_grad for t in combined.terms.values())
    combined.total.backward()
    assert x.grad == 5
    for terms, weights in (({"a": x}, {"b": 1.0}), ({"a": x}, {"a": math.nan}),
                           ({"a": x}, {"a": 0.0}), ({"a": x.expand(2)}, {"a": 1.0})):  # fmt: skip
        with pytest.raises(ValueError):
            losses.combined_loss(terms, weights)


def test_uncertainty_weights():
    module = losses.UncertaintyWeights(["a", "b"])
    terms = {"b": torch.tensor(3.0), "a": torch.tensor(1.0)}
    assert module(terms).total == 4
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2000):
        optimiser.zero_grad()
        module(terms).total.backward()
        optimiser.step()
    # e^{-s} L + s / 2 is least at s = log 2L.
    assert_close(module.log_variances.detach(), torch.tensor([2.0, 6.0]).log(), 1e-3)
    with pytest.raises(ValueError, match="expected the terms"):
        module({"a": terms["a"]})
    with pytest.raises(ValueError, match="must be a 0-d loss"):
        module({"a": terms["a"], "b": torch.ones(2)})
    with pytest.raises(ValueError, match="different names"):
        losses.UncertaintyWeights(["a", "a"])


def test_linear_schedule():
    values = [losses.linear_schedule(step, 10, 20, 1.0, 0.0) for step in (0, 10, 15, 20, 99)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError):
        losses.linear_schedule(0, 2, 1, 0.0, 1.0)


# ------------------------------------------------------------------------------- preference


def test_sequence_log_probs():
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -1.0, math.nan]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert losses.sequence_log_probs(log_probs, mask).tolist() == [-7.0, -2.0]
    assert losses.sequence_log_probs(log_probs[:1]).tolist() == [-7.0]
    assert losses.sequence_log_probs(log_probs, mask, average=True)[1] == -1
    with pytest.raises(ValueError):
        losses.sequence_log_probs(log_probs, average=True)
    with pytest.raises(ValueError):
        losses.sequence_log_probs(log_probs, mask[:, :2])


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo(device, kind):
    pc, pr, rc, rr = torch.randn(4, 6, device=device).double() * 3
    pc.requires_grad_()
    eps = 0.1 if kind == "sigmoid" else 0.0
    result = losses.dpo_loss(pc, pr, rc, rr, beta=0.2, label_smoothing=eps, kind=kind)
    h = (pc - rc) - (pr - rr)
    expected = {
        "sigmoid": -(0.9 * torch.log(torch.sigmoid(0.2 * h))
                     + 0.1 * torch.log(1 - torch.sigmoid(0.2 * h))),
        "hinge": (1 - 0.2 * h).clamp_min(0),
        "ipo": (h - 2.5) ** 2,
    }[kind].mean()  # fmt: skip
    assert_close(result.loss.detach(), expected.detach(), 1e-10)
    (grad,), (want,) = (torch.autograd.grad(z, pc) for z in (result.loss, expected))
    assert_close(grad, want, 1e-10)
    assert_close(result.chosen_rewards, 0.2 * (pc - rc).detach(), 1e-12)
    same = losses.dpo_loss(rc, rr, rc, rr)
    assert float(same.loss) == pytest.approx(math.log(2))


def test_ppo_and_grpo(device):
    log_probs = (-torch.rand(4, 6, device=device).double() * 3).requires_grad_()
    old = log_probs.detach() + torch.randn(4, 6, device=device).double() * 0.3
    reference = log_probs.detach() + torch.randn(4, 6, device=device).double() * 0.3
    entropy = torch.rand(4, 6, device=device).double()
    advantages = torch.randn(4, device=device).double()
    mask = torch.ones(4, 6, device=device)
    mask[0, 3:] = 0
    ratio = (log_probs - old).exp()
    a = advantages.unsqueeze(1).expand(4, 6)
    each = []
    for r, x in zip(ratio.flatten(), a.flatten(), strict=True):
        clipped = min(max(r, 1 - 0.2), 1 + 0.3) if isinstance(r, float) else r.clamp(0.8, 1.3)
        each.append(-torch.minimum(r * x, clipped * x))
    surrogate = torch.stack(each).view(4, 6)
    ppo = losses.ppo_clip_loss(log_probs, old, a, mask, clip=0.2, clip_high=0.3, entropy=entropy,
                               entropy_bonus=0.01)  # fmt: skip
    expected = (surrogate - 0.01 * entropy)[mask.bool()].mean()
    assert_close(ppo.detach(), expected.detach(), 1e-10)
    d = reference - log_probs
    tokens = surrogate + 0.04 * (d.exp() - d - 1) - 0.01 * entropy
    wanted = torch.stack([t[m.bool()].mean() for t, m in zip(tokens, mask, strict=True)]).mean()
    grpo = losses.grpo_loss(
        log_probs, old, advantages, mask, reference_log_probs=reference, clip=0.2, clip_high=0.3,
        entropy=entropy, entropy_bonus=0.01,
    )  # fmt: skip
    assert_close(grpo.detach(), wanted.detach(), 1e-10)
    for one, other in ((ppo, expected), (grpo, wanted)):
        (grad,), (want,) = (
            torch.autograd.grad(z, log_probs, retain_graph=True) for z in (one, other)
        )
        assert_close(grad, want, 1e-10)
    assert losses.ppo_clip_loss(log_probs, old, a, mask * 0).isnan()
    assert losses.grpo_loss(log_probs, old, advantages, mask * 0) == 0


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize("fill", [math.nan, -math.inf])
def test_what_masked_tokens_hold_does_not_matter(device, kind, fill):
    mask = torch.ones(3, 5, device=device)
    mask[0, 2:] = mask[2] = 0
    tensors = [-torch.rand(3, 5, device=device) for _ in range(4)]
    results = []
    for value in (0.0, fill):
        x, old, reference, entropy = (
            t.masked_fill(mask == 0, value).requires_grad_() for t in tensors
        )
        options = {"entropy": entropy, "entropy_bonus": 0.1}
        if kind == "ppo":
            advantages = torch.ones(3, 5, device=device).masked_fill(mask == 0, value)
            loss = losses.ppo_clip_loss(x, old, advantages, mask, **options)
        else:
            advantages = torch.tensor([1.0, 2.0, value], device=device)
            options["reference_log_probs"] = reference
            loss = losses.grpo_loss(x, old, advantages, mask, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, entropy))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[1][1][mask == 0] == 0).all()


@pytest.mark.parametrize("name", ["old_log_probs", "advantages", "mask", "entropy",
                                  "reference_log_probs"])  # fmt: skip
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 5), (3, 1), (3, 5, 1)])
def test_policy_losses_do_not_broadcast(name, shape):
    whole = dict.fromkeys(("log_probs", "old_log_probs", "mask", "entropy"), torch.ones(3, 5))
    ppo, grpo = {**whole, "advantages": torch.ones(3, 5)}, {**whole, "advantages": torch.ones(3)}
    grpo["reference_log_probs"] = torch.ones(3, 5)
    for function, arguments in ((losses.ppo_clip_loss, ppo), (losses.grpo_loss, grpo)):
        if name not in arguments:
            continue
        function(**arguments)
        if (name, shape, function) == ("advantages", (3, 1), losses.ppo_clip_loss):
            function(**{**arguments, name: torch.ones(shape)})  # one for each sequence
            continue
        with pytest.raises(ValueError, match=name.split("_")[0]):
            function(**{**arguments, name: torch.ones(shape)})


@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.dpo_loss(x, x, x, x, beta=0.0),
        lambda x: losses.dpo_loss(x, x, x, x, label_smoothing=0.6),
        lambda x: losses.dpo_loss(x, x, x, x, kind="other"),
        lambda x: losses.dpo_loss(x, x, x, x, kind="ipo", label_smoothing=0.1),
        lambda x: losses.dpo_loss(x, x, x, x[:1]),
        lambda x: losses.ppo_clip_loss(x, x, x, x, clip=0.0),
        lambda x: losses.ppo_clip_loss(x, x, x, x, entropy_bonus=1.0),
        lambda x: losses.ppo_clip_loss(x, x, x, x[:1]),
        lambda x: losses.grpo_loss(x[None], x[None], x, x[None]),
        lambda x: losses.grpo_loss(x[None], x[None], x[:1], x[None], kl_weight=math.nan),
    ],
)
def test_preference_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.zeros(3))


# ------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_distillation(device, direction):
    student = torch.randn(B, S, V, device=device, requires_grad=True)
    teacher = torch.randn(B, S, V, device=device)
    target = torch.zeros(B, S, dtype=torch.long, device=device)
    target[1] = -100
    options = {"direction": direction, "temperature": 2.0, "beta": 0.3, "target": target}
    loss = losses.distillation_loss(student, teacher, **options)
    q, p = (F.log_softmax(x.double() / 2, -1) for x in (student, teacher))
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    rows = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}
    expected = 4 * rows[direction][target == 0].mean()
    assert_close(loss.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = (torch.autograd.grad(z, student) for z in (loss, expected))
    assert_close(grad, want, 1e-5)
    each = losses.distillation_loss(student, teacher, **options, reduction="none")
    assert (each[1] == 0).all()
    for wrong in ({"temperature": 0.0}, {"beta": 0.0}, {"direction": "x"}, {"reduction": "x"},
                  {"target": target[0]}):  # fmt: skip
        with pytest.raises(ValueError):
            losses.distillation_loss(student, teacher, **{**options, **wrong})
    with pytest.raises(ValueError):
        losses.distillation_loss(student, teacher[0])


DIRECTIONS = ["forward", "reverse", "jsd"]


def by_definition(p, q, direction, beta=0.5):
    """The divergence of probabilities (..., V) in float64, with 0 log 0 = 0."""

    def kl(a, b):
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)

    m = beta * p + (1 - beta) * q
    jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["whole", "strided", "four dimensions"])
def test_distillation_reads_rows_in_place(device, direction, kind, monkeypatch):
    """A chunk of rows is all that is copied, and its gradient is that of the whole."""
    rowwise = llmloss_ext.linear.rowwise
    seen, right = [], rowwise.masked
    monkeypatch.setattr(rowwise, "COPIES", 1000)  # chunks of one row
    monkeypatch.setattr(rowwise, "masked",
                        lambda f, v, *x: (seen.append(len(x[0])), right(f, v, *x))[1])  # fmt: skip
    shape = (2, 2, S, V) if kind == "four dimensions" else (B, S, V)
    whole, other = torch.randn(2, *shape, device=device)
    cut = (slice(None), slice(1, None)) if kind != "whole" else ()
    leaf = whole.clone().requires_grad_()
    loss = losses.distillation_loss(leaf[cut], other[cut], direction=direction)
    exact = whole.double().requires_grad_()
    p, q = torch.softmax(other[cut].double(), -1), torch.softmax(exact[cut], -1)
    expected = by_definition(p, q, direction).mean()
    assert_close(loss.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, exact)
    assert_close(grad, want, 1e-5)
    assert set(seen) == {1}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_of_masked_columns(device, direction):
    """-inf in both models, as a padded head has it: no nan in the gradient."""
    student, teacher = torch.randn(2, 4, V, device=device)
    student[:, ::3] = teacher[:, ::3] = -math.inf
    leaf = student.clone().requires_grad_()
    loss = losses.distillation_loss(leaf, teacher, direction=direction)
    keep = [i for i in range(V) if i % 3]
    small = student[:, keep].clone().requires_grad_()
    expected = losses.distillation_loss(small, teacher[:, keep], direction=direction)
    assert_close(loss.detach(), expected.detach(), 1e-6)
    (grad,), (want,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, small)
    assert_close(grad[:, keep], want, 1e-6)
    assert (grad[:, ::3] == 0).all()
    for one, other in ((student * math.nan, teacher), (student, teacher * math.nan)):
        assert losses.distillation_loss(one, other, direction=direction).isnan()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("stored", [False, True])
def test_what_ignored_tokens_hold_does_not_matter(device, direction, stored):
    student = torch.randn(B, S, V, device=device)
    teacher = torch.log_softmax(torch.randn(B, S, V, device=device), -1)
    target = torch.zeros(B, S, dtype=torch.long, device=device)
    target[0, 1] = target[2] = -100
    bad = target == -100
    results = []
    for fill in (0.0, math.nan, math.inf):
        leaf = student.masked_fill(bad.unsqueeze(-1), fill).requires_grad_()
        if stored:
            values, ids = teacher.topk(4, -1)
            arguments = (leaf, ids.masked_fill(bad.unsqueeze(-1), -100 if fill else 0),
                         values.masked_fill(bad.unsqueeze(-1), fill))  # fmt: skip
            function = losses.top_k_distillation_loss
        else:
            arguments = (leaf, teacher.masked_fill(bad.unsqueeze(-1), fill))
            function = losses.distillation_loss
        for run in (function, torch.func.vmap):  # the second: where no chunk is possible
            options = {"target": target, "direction": direction}
            if run is torch.func.vmap:
                with torch.autograd.forward_ad.dual_level():
                    loss = function(*arguments, **options)
            else:
                loss = function(*arguments, **options)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert (grad[bad] == 0).all()
            results.append((loss.detach(), grad[~bad]))
    for loss, grad in results[1:]:
        assert_close(loss, results[0][0], 1e-6)
        assert_close(grad, results[0][1], 1e-6)


def test_second_order_of_distillation():
    x, teacher = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 5).double()
    target = torch.tensor([0, -100, 0])
    for direction in DIRECTIONS:
        assert torch.autograd.gradgradcheck(
            lambda x, d=direction: losses.distillation_loss(x, teacher, direction=d, target=target),
            x,
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_from_stored_top_k(device, direction, temperature):
    student = torch.randn(B, S, V, device=device, requires_grad=True)
    teacher = torch.randn(B, S, V, device=device) * 3
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    options = {"direction": direction, "temperature": temperature, "beta": 0.3}
    whole = losses.distillation_loss(student, teacher, **options)
    values, ids = log_p.topk(V, -1)
    all_of_it = losses.top_k_distillation_loss(student, ids, values, **options)
    assert_close(all_of_it.detach(), whole.detach(), 1e-4)
    values, ids = log_p.topk(5, -1)
    few = losses.top_k_distillation_loss(student, ids, values, **options)
    assert 0 <= few <= whole
    q = torch.softmax(student.double() / temperature, -1).gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (values.exp(), q))
    expected = by_definition(p, q, direction, 0.3).mean() * temperature**2
    assert_close(few.detach(), expected.detach(), 1e-5)
    (grad,), (want,) = (torch.autograd.grad(z, student) for z in (few, expected))
    assert_close(grad, want, 1e-5)
    for wrong in ({"direction": "x"}, {"temperature": 0.0}, {"beta": 1.0}, {"reduction": "x"}):
        with pytest.raises(ValueError):
            losses.top_k_distillation_loss(student, ids, values, **wrong)
    with pytest.raises(ValueError, match="expected student_logits"):
        losses.top_k_distillation_loss(student, ids, values[..., :2])


def test_the_rest_of_a_sure_student_does_not_cancel(device):
    """1 - sum q is 0 in float32 long before the rest of the probability is."""
    student = torch.zeros(1, V, device=device)
    student[0, 0] = 40.0
    leaf = student.requires_grad_()
    ids = torch.tensor([[0]], device=device)
    log_p = torch.tensor([[0.5]], device=device).log()
    loss = losses.top_k_distillation_loss(leaf, ids, log_p)
    log_q = torch.log_softmax(student.detach().double(), -1)
    expected = math.log(0.5) - 0.5 * (log_q[0, 0] + torch.logsumexp(log_q[0, 1:], 0))
    assert_close(loss.detach(), expected, 1e-6)
    assert torch.autograd.grad(loss, leaf)[0][0, 0] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("stored", [False, True])
def test_distillation_keeps_nothing_of_the_logits_size(device, stored):
    student = torch.randn(64, 500, device=device, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(64, 500, device=device), -1)
    values, ids = teacher.topk(4, -1)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if stored:
            losses.top_k_distillation_loss(student, ids, values)
        else:
            losses.distillation_loss(student, teacher)
    inputs = {student.data_ptr(), teacher.data_ptr()}
    assert student.data_ptr() in kept
    assert all(n <= 64 * 4 for where, n in kept.items() if where not in inputs)


@SETTINGS
@hypothesis.given(
    st.integers(0, 10_000), st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1,
                                     max_size=6), st.sampled_from(["logits", "hidden"])
)  # fmt: skip
def test_micro_batches_equal_the_large_batch(seed, parts, kind):
    """However many, however long, and however many of each one's tokens are ignored."""
    from llmloss_ext.training import accumulate_gradients

    torch.manual_seed(seed)
    model = torch.nn.Linear(D, V, bias=False).double()
    other = copy.deepcopy(model)
    sizes = [size for size, _ in parts]
    x, y = torch.randn(sum(sizes), D).double(), torch.randint(0, V, (sum(sizes),))
    ignored = torch.cat([torch.rand(size) < share for size, share in parts])
    y[ignored] = -100
    micro = [((a, b), b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]

    def loss(model, x, y, items=None):
        if kind == "logits":
            return cross_entropy(model(x), y, num_items=items)
        return llmloss_ext.linear_cross_entropy(x, model.weight, y, num_items=items)

    total = accumulate_gradients(lambda batch, items: loss(model, *batch, items), micro)
    if ignored.all():
        assert total == 0
        assert (model.weight.grad == 0).all()
        return
    whole = loss(other, x, y)
    whole.backward()
    assert_close(total, whole.detach(), 1e-10)
    assert_close(model.weight.grad, other.weight.grad, 1e-10)
