"""Options whose result could look right if they were ignored: each is seen to be honoured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from llmloss_ext import (
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
    linear_token_stats,
    losses,
    metrics,
    plan,
    token_stats,
    training,
)
from llmloss_ext.cli import main
from llmloss_ext.linear import projection
from llmloss_ext.nn import LinearCrossEntropyLoss

N, D, V = 24, 8, 50


@pytest.fixture
def chunks(monkeypatch):
    """The tokens of each chunk that is projected."""
    seen = []
    right = projection.Projection.project

    def project(self, hidden, logits):
        seen.append(hidden.shape[0])
        right(self, hidden, logits)

    monkeypatch.setattr(projection.Projection, "project", project)
    return seen


def problem():
    target = torch.randint(0, V, (N,))
    target[:9] = -100
    return torch.randn(N, D), torch.randn(V, D), target


FUNCTIONS = {
    "loss": linear_cross_entropy,
    "rows": lambda *a, **k: linear_cross_entropy(*a, reduction="none", **k),
    "stats": linear_token_stats,
    "log_probs": linear_log_probs,
    "module": lambda h, w, y, **k: LinearCrossEntropyLoss(
        D, V, linear_weight=torch.nn.Parameter(w), **k)(h, y),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_and_dropped_tokens(chunks, name):
    row = plan(1, D, V).chunk_bytes
    for options, expected in (
        ({}, [15]),
        ({"drop_ignored": False}, [24]),
        ({"chunk_tokens": 10}, [8, 7]),
        ({"chunk_tokens": 10, "drop_ignored": False}, [10, 10, 4]),
        ({"max_chunk_bytes": 12 * row, "drop_ignored": False}, [12, 12]),
        ({"ignore_index": 49}, [24]),
    ):
        chunks.clear()
        hidden, weight, target = problem()
        if "ignore_index" in options:
            target = target.clamp_min(0).clamp_max(48)
        FUNCTIONS[name](hidden, weight, target, **options)
        assert chunks == expected


def test_chunks_of_the_divergence(chunks):
    hidden, weight, target = problem()
    teacher = (torch.randn(N, D), torch.randn(V, D))
    row = plan(1, D, V).chunk_bytes
    for options, expected in (
        ({}, [24]),
        ({"target": target}, [15]),
        ({"target": target, "ignore_index": 60}, [24]),
        ({"chunk_tokens": 20}, [20, 4]),
        ({"max_chunk_bytes": 12 * row}, [12, 12]),
    ):
        chunks.clear()
        linear_kl_div(hidden, weight, *teacher, **options)
        assert chunks[::2] == expected  # the student's; between them the teacher's


@pytest.mark.parametrize("statistic", ["log_prob", "lse", "entropy", "mean_log_prob"])
@pytest.mark.parametrize(
    "options",
    [{"softcap": 3.0}, {"logit_scale": 0.3}, {"temperature": 0.4, "softcap": 3.0},
     {"vocab_size": 40}, {"weight": torch.rand(V)}, {"ignore_index": 5}],
)  # fmt: skip
def test_statistics_from_hidden_states(statistic, options):
    hidden, weight, target = problem()
    target = target.clamp(0, 39)
    ours = getattr(linear_token_stats(hidden, weight, target, **options), statistic)
    logits = hidden @ weight.t()
    assert_close(ours, getattr(token_stats(logits, target, **options), statistic), 1e-5)
    if statistic == "log_prob" and "weight" not in options:
        assert_close(linear_log_probs(hidden, weight, target, **options), ours, 1e-6)
    shifted = linear_token_stats(hidden, weight, target, shift=1, **options)
    dense = token_stats(logits[:-1], target[1:], **options)
    assert_close(getattr(shifted, statistic)[:-1], getattr(dense, statistic), 1e-5)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "reduction", "token_weight"])
def test_log_probs_take_no_option_of_the_loss(option):
    with pytest.raises(TypeError, match=option):
        linear_log_probs(*problem(), **{option: 0.1})


@pytest.mark.parametrize("function", ["loss", "rows", "log_probs"])
def test_the_weights_gradient_is_accumulated_in_the_dtype_asked_for(function):
    """16-bit sums of many equal parts stand still; float32's do not."""
    hidden = torch.ones(1024, D, dtype=torch.bfloat16)
    target = torch.zeros(1024, dtype=torch.long)
    grads = {}
    for dtype in (None, torch.bfloat16):
        weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
        options = {"chunk_tokens": 1, "weight_grad_dtype": dtype}
        if function == "loss":
            options["reduction"] = "sum"
        FUNCTIONS[function](hidden, weight, target, **options).sum().backward()
        grads[dtype] = float(weight.grad[0].abs().mean())
    assert grads[None] == pytest.approx(1024 * (1 - 1 / V), rel=1e-2)
    assert grads[torch.bfloat16] < 0.6 * grads[None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_what_it_should_and_nothing_else(dtype):
    """Hidden states and weights are rounded to its dtype, the sums over chunks are not."""
    hidden, weight, target = problem()
    rounded = [t.to(dtype) for t in (hidden, weight)]
    teacher = (torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype))
    for loss in (
        lambda h, w: linear_cross_entropy(h, w, target, chunk_tokens=2),
        lambda h, w: linear_cross_entropy(h, w, target, chunk_tokens=2, reduction="none").sum(),
        lambda h, w: linear_kl_div(h, w, *teacher, target=target, chunk_tokens=2),
    ):
        results = []
        for inputs, enabled in ((rounded, False), ([hidden, weight], True)):
            leaves = [t.clone().requires_grad_() for t in inputs]
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                value = loss(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        # The same values; float32 parameters get gradients that were not rounded at the end.
        assert torch.equal(results[0][0], results[1][0])
        for once, never in zip(results[0][1:], results[1][1:], strict=True):
            # Far below a rounding; float16's subnormal numbers may be rounded twice.
            assert_close(once, never.to(dtype), 1e-6)


def test_distillation_in_float16_keeps_small_gradients():
    """1 / N is subnormal; the loss scale comes after the matrix products."""
    tokens, scale = 65536, 4096.0
    student, teacher = torch.randn(2, tokens, 4).half()
    heads = torch.randn(2, 9, 4).half()
    weight = heads[0].clone().requires_grad_()
    (linear_kl_div(student, weight, teacher, heads[1]) * scale).backward()
    exact = heads[0].double().requires_grad_()
    q = F.log_softmax(student.double() @ exact.t(), -1)
    p = F.log_softmax(teacher.double() @ heads[1].double().t(), -1)
    (F.kl_div(q, p, reduction="batchmean", log_target=True) * scale).backward()
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-3


def test_distillation_from_logits_works_on_a_chunk_at_a_time(monkeypatch):
    """The copies of a chunk, and not one of them, are as large as a linear loss's buffer."""
    from llmloss_ext import rowwise

    seen = []
    right = rowwise.masked

    def masked(function, valid, student, *others, **shared):
        seen.append(student.shape[0])
        return right(function, valid, student, *others, **shared)

    monkeypatch.setattr(rowwise, "masked", masked)
    student = torch.randn(600, 100_000, requires_grad=True)
    losses.distillation_loss(student, torch.randn(600, 100_000)).backward()
    assert max(seen) <= 256 // rowwise.COPIES
    assert sum(seen) == 2 * 600


def test_distillation_has_second_order_and_transforms():
    student, teacher = torch.randn(2, 3, 7).double()
    student.requires_grad_()

    def loss(x):
        return losses.distillation_loss(x, teacher, direction="jsd")

    assert torch.autograd.gradgradcheck(loss, student)
    (grad,) = torch.autograd.grad(loss(student), student)
    assert_close(torch.func.grad(loss)(student.detach()), grad, 1e-12)


def test_reductions_and_ignored_labels_of_distillation():
    student, teacher = torch.randn(2, 4, 6)
    target = torch.tensor([1, 7, 2, 7])
    values, ids = torch.log_softmax(teacher, -1).topk(3)
    for each in (
        lambda **k: losses.distillation_loss(student, teacher, **k),
        lambda **k: losses.top_k_distillation_loss(student, ids, values, **k),
    ):
        rows = each(reduction="none", target=target, ignore_index=7)
        assert (rows != 0).tolist() == [True, False, True, False]
        assert_close(each(reduction="sum", target=target, ignore_index=7), rows.sum(), 1e-6)
        assert_close(each(target=target, ignore_index=7), rows.sum() / 2, 1e-6)
        assert (each(reduction="none") != 0).all()


def test_options_of_the_loss_family():
    logits, target = torch.randn(10, V), torch.arange(10)
    one = F.cross_entropy(logits[1:], target[1:])
    assert_close(losses.confidence_penalty_loss(logits, target, 0.0, ignore_index=0), one, 1e-6)
    assert_close(metrics.top_k_accuracy(logits, target, V, ignore_index=0), torch.tensor(1.0), 0)
    lonely = torch.full((10,), 3)
    assert metrics.accuracy(logits, lonely, ignore_index=3).isnan()
    for reduction in ("sum", "none"):
        ours = losses.LabelSmoothingCrossEntropy(0.1, reduction=reduction)(logits, target)
        theirs = F.cross_entropy(logits, target, label_smoothing=0.1, reduction=reduction)
        assert_close(ours, theirs, 1e-5)
    mask = torch.ones(1, 10)
    mask[0, 5:] = 0
    ours = losses.causal_lm_loss(logits[None], target[None], attention_mask=mask)
    assert_close(ours, F.cross_entropy(logits[:4], target[1:5]), 1e-6)
    assert losses.create_causal_mask(3, dtype=torch.float16).dtype == torch.float16
    assert losses.create_causal_mask(3, device="meta").is_meta


def test_options_of_masked_and_contrastive_losses():
    ids = torch.arange(10, 40)
    hidden, labels = losses.mask_tokens(
        ids, 3, 50, probability=1.0, mask_share=0.0, random_share=1.0, ignore_index=-7
    )
    assert torch.equal(labels, ids)
    assert not torch.equal(hidden, ids)
    assert (hidden != 3).sum() > 20
    _, none = losses.mask_tokens(ids, 3, 50, probability=0.0, ignore_index=-7)
    assert (none == -7).all()
    states, weight, bias = torch.randn(30, D), torch.randn(V, D), torch.randn(V)
    labels = torch.where(torch.arange(30) < 9, ids, -7)
    ours = losses.mlm_loss(
        states, labels, weight, linear_bias=bias, ignore_index=-7, label_smoothing=0.2
    )
    logits = states[:9] @ weight.t() + bias
    theirs = F.cross_entropy(logits, ids[:9], label_smoothing=0.2)
    assert_close(ours, theirs, 1e-5)
    whole = states @ weight.t() + bias
    dense = losses.mlm_loss(whole, labels, ignore_index=-7, label_smoothing=0.2)
    assert_close(dense, theirs, 1e-5)
    views = torch.randn(2, 6, D)
    wide, narrow = losses.ClipLoss(0.01), losses.ClipLoss(0.2, max_scale=5.0)
    narrow.load_state_dict(wide.state_dict())  # as if training had led there
    at_five = losses.contrastive_loss(*views, logit_scale=torch.tensor(5.0), symmetric=True)
    assert_close(narrow(*views), at_five, 1e-6)
    assert wide(*views) != narrow(*views)


def test_counts_are_added_over_the_group(monkeypatch):
    seen = []

    def all_reduce(total, group):
        seen.append(group)
        total += 5

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    targets = [torch.tensor([1, -100])]
    assert training.count_items(targets) == 1
    assert training.count_items(targets, group="ranks") == 6
    assert seen == ["ranks"]
    items = []
    leaf = torch.zeros((), requires_grad=True)
    training.accumulate_gradients(
        lambda batch, n: items.append(int(n)) or leaf * 1, [(None, torch.tensor([1, 2, 2]))], 2
    )
    assert items == [1]


def test_options_of_the_plan(capsys):
    base = plan(8192, 64, 50257, torch.bfloat16)
    cheap = plan(8192, 64, 50257, torch.bfloat16, weight_grad_dtype=torch.bfloat16)
    assert cheap.peak_bytes < base.peak_bytes
    assert plan(8192, 64, 50257, device="cuda").chunk_tokens > plan(8192, 64, 50257).chunk_tokens
    frozen = plan(8192, 64, 50257, needs_grad=(True, False))
    assert frozen.gradient_bytes == 8192 * 64 * 4
    outputs = []
    for options in ([], ["float32"], ["--device", "cuda"], ["--chunk-tokens", "100"],
                    ["--max-chunk-bytes", "30000000"], ["--recompute"], ["--frozen", "hidden"],
                    ["--frozen", "weight"], ["--frozen", "weight", "--frozen", "hidden"],
                    ["--weight-grad-dtype", "bfloat16"], ["--weight-dtype", "float32"],
                    ["--drop-ignored"]):  # fmt: skip
        assert main.main(["plan", "8192", "64", "50257", *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == len(outputs)
    assert "82 of 100 tokens" in outputs[3]
    assert "\nproducts           4 of" in outputs[5]
