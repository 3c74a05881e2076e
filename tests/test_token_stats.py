"""token_stats: values, and gradients of any combination, against float64."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from helpers import FLOATS, GRADIENT, VALUE, assert_close

from llmloss_ext import token_stats

EXTRA = ("log_sum_sq_probs",)
NAMES = ("log_prob", "lse", "entropy", "mean_log_prob", *EXTRA)
OPTIONS = [
    {},
    {"weight": True},
    {"softcap": 2.0},
    {"logit_scale": 0.4},
    {"temperature": 0.6, "softcap": 4.0, "logit_scale": 1.2},
    {"vocab_size": 50, "softcap": 5.0, "logit_scale": 1.5, "weight": True, "ignore_index": 3},
]


def make(device, dtype, options, shape=(2, 4, 61)):
    input = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype).to(device)
    target = torch.randint(0, 50, shape[:-1], device=device)
    target[0, 1] = options.get("ignore_index", -100)
    if "weight" in options:
        options = {**options, "weight": torch.rand(shape[-1], device=device)}
    return input, target, options


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("dtype", FLOATS)
def test_values(device, dtype, options):
    input, target, options = make(device, dtype, options)
    expected = reference.stats(input, target, **options)
    actual = token_stats(input, target, **options, with_rank=True, extra=EXTRA)
    for name in NAMES:
        assert_close(getattr(actual, name), expected[name], VALUE[dtype] * 2)
        assert getattr(actual, name).shape == target.shape
    assert torch.equal(actual.argmax, expected["argmax"])
    if dtype == torch.float64 or "softcap" not in options:  # a rounded tanh makes equals
        assert torch.equal(actual.rank, expected["rank"])
    plain = token_stats(input, target, **options)
    assert plain.argmax is None
    assert plain.rank is None
    assert plain.log_sum_sq_probs is None
    assert torch.equal(plain.log_prob, actual.log_prob)


@pytest.mark.parametrize("used", [c for n in (1, 2, 5) for c in itertools.combinations(NAMES, n)])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=["plain", "all"])
def test_gradients_of_any_combination(device, used, options):
    input, target, options = make(device, torch.float64, options)
    upstream = {name: torch.randn(target.shape, dtype=torch.float64) for name in used}
    grads = []
    for function in (token_stats, reference.stats):
        leaf = input.clone().requires_grad_()
        scale = torch.tensor(options.get("logit_scale", 1.0), dtype=torch.float64, device=device)
        scale.requires_grad_()
        extra = {"extra": EXTRA} if function is token_stats else {}
        result = function(leaf, target, **{**options, "logit_scale": scale}, **extra)
        result = result if isinstance(result, dict) else result._asdict()
        total = sum((result[name] * upstream[name].to(device)).sum() for name in used)
        grads.append(torch.autograd.grad(total, (leaf, scale)))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_dtypes(device, dtype):
    input, target, _ = make(device, dtype, {})
    leaf, double = input.clone().requires_grad_(), input.double().requires_grad_()
    actual = token_stats(leaf, target)
    expected = reference.stats(double, target)
    factor = torch.rand(target.shape, device=device)
    (actual.entropy * factor + actual.log_prob).sum().backward()
    (expected["entropy"] * factor.double() + expected["log_prob"]).sum().backward()
    assert leaf.grad.dtype == dtype
    assert_close(leaf.grad, double.grad, GRADIENT[dtype])
    assert (leaf.grad[0, 1] == 0).all()


def test_stride_zero_and_broadcast_upstream(device):
    """The gradient of .sum() is an expanded scalar; that of a transposed use has strides."""
    input, target, _ = make(device, torch.float64, {})
    leaf, other = input.clone().requires_grad_(), input.clone().requires_grad_()
    token_stats(leaf, target).lse.sum().backward()
    reference.stats(other, target)["lse"].sum().backward()
    assert_close(leaf.grad, other.grad, 1e-12)
    leaf.grad = other.grad = None
    factor = torch.randn(4, 2, dtype=torch.float64, device=device)
    (token_stats(leaf, target).lse.t() * factor).sum().backward()
    (reference.stats(other, target)["lse"].t() * factor).sum().backward()
    assert_close(leaf.grad, other.grad, 1e-12)


def test_rank_counts_what_comes_before(device):
    input = torch.tensor([[1.0, 3.0, 3.0, 2.0]], device=device).expand(3, 4).contiguous()
    stats = token_stats(input, torch.tensor([1, 2, 3], device=device), with_rank=True)
    assert stats.rank.tolist() == [0, 1, 2]
    assert stats.argmax.tolist() == [1, 1, 1]


def test_softcapped_ties_are_ordered_by_column(device):
    """Saturated logits are equal after the cap; the target's must come out with the same bits."""
    input = torch.full((1, 40), 1e6, device=device)
    stats = token_stats(input, torch.tensor([17], device=device), softcap=30.0, with_rank=True)
    assert stats.rank.item() == 17
    random = torch.randn(50, 333, device=device) * 40
    target = random.argmax(-1)
    stats = token_stats(random, target, softcap=7.0, logit_scale=1.1, with_rank=True)
    assert torch.equal(stats.rank == 0, stats.argmax == target)
    assert (stats.rank == 0).any()


def test_rows_without_statistics(device):
    input = torch.randn(4, 9, device=device)
    input[0, 2] = torch.nan
    input[1, 2] = torch.inf
    input[2] = -torch.inf
    stats = token_stats(input, torch.zeros(4, dtype=torch.long, device=device), with_rank=True)
    assert stats.log_prob[:3].isnan().all()
    assert stats.entropy[:3].isnan().all()
    assert stats.lse[2] == -torch.inf
    assert (stats.rank[:2] == 9).all()  # in no top-k
    assert (stats.argmax[:2] == -1).all()
    assert torch.isfinite(stats.log_prob[3])


def test_masked_columns_have_no_entropy(device):
    """0 log 0 = 0."""
    input = torch.full((1, 8), -torch.inf, device=device)
    input[0, :2] = 0.0
    stats = token_stats(input, torch.tensor([1], device=device))
    assert_close(stats.entropy, torch.tensor([2.0]).log(), 1e-6)
    assert_close(stats.log_prob, -torch.tensor([2.0]).log(), 1e-6)


@pytest.mark.parametrize("columns", [1, 2, 3, 15, 17, 31, 33, 2047, 2048, 2049, 4099])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_any_width_and_alignment(device, columns, start):
    """Widths around the vector (16), the unrolled step (64) and the block (2048)."""
    whole = torch.randn(3, columns + start, device=device)
    target = torch.randint(0, columns, (3,), device=device)
    expected = reference.stats(whole[:, start:], target)
    actual = token_stats(whole[:, start:], target, with_rank=True, extra=EXTRA)
    for name in NAMES:
        assert_close(getattr(actual, name), expected[name], 3e-6)
    assert torch.equal(actual.rank, expected["rank"])
    assert torch.equal(actual.argmax, expected["argmax"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(isa, dtype):
    input, target, _ = make(torch.device("cpu"), dtype, {}, (2, 3, 2063))
    leaf, double = input.clone().requires_grad_(), input.double().requires_grad_()
    actual = token_stats(leaf, target, softcap=8.0, with_rank=True, extra=EXTRA)
    expected = reference.stats(double, target, softcap=8.0)
    for name in NAMES:
        assert_close(getattr(actual, name), expected[name], VALUE[dtype] * 2)
    (actual.log_prob + actual.entropy + actual.mean_log_prob * actual.lse).sum().backward()
    total = expected["log_prob"] + expected["entropy"]
    (total + expected["mean_log_prob"] * expected["lse"]).sum().backward()
    assert_close(leaf.grad, double.grad, GRADIENT[dtype])


@pytest.mark.parametrize("name", ["argmax", "rank", *EXTRA])
def test_extra_statistics_by_name(device, name):
    logits, target = torch.randn(6, 33, device=device), torch.arange(6, device=device)
    every = token_stats(logits, target, extra=("argmax", "rank", *EXTRA))
    stats = token_stats(logits, target, extra=(name,))
    assert torch.equal(getattr(stats, name), getattr(every, name))
    missing = {f for f in stats._fields if getattr(stats, f) is None}
    assert missing == {"argmax", "rank", *EXTRA} - {name}
    for wrong in ("rank", ("median",), ["rank", "x"]):
        with pytest.raises(ValueError, match="extra must hold names of statistics"):
            token_stats(logits, target, extra=wrong)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": -0.5}, {"softcap": 1.5}, {"vocab_size": 60}]
)
def test_equal_logits_are_ordered_by_column(device, dtype, options):
    """rank is 0 exactly where argmax is the target, and k are among the k largest."""
    columns = 61
    logits = torch.randint(-2, 3, (columns, columns)).to(dtype).to(device)
    logits[0] = 0
    if "logit_scale" not in options:  # a negative one makes +inf of it
        logits[1] = -torch.inf
        logits[1, 7:9] = 1.0
    classes = options.get("vocab_size", columns)
    target = torch.arange(columns, device=device) % classes
    stats = token_stats(logits, target, with_rank=True, **options)
    assert torch.equal(stats.rank == 0, stats.argmax == target)
    x = options.get("logit_scale", 1.0) * logits[:, :classes].float()
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    assert torch.equal(stats.rank, (order == target.unsqueeze(-1)).int().argmax(-1))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_temperature_divides_what_the_model_returns(device, softcap):
    """Trainers divide the model's logits, which it has capped (Gemma 2's in transformers)."""
    z = torch.randn(5, 61, dtype=torch.float64, device=device)
    target = torch.randint(0, 61, (5,), device=device)
    scale = torch.tensor(1.3, dtype=torch.float64, device=device)
    leaves = [z.clone().requires_grad_(), scale.clone().requires_grad_()]
    theirs = [z.clone().requires_grad_(), scale.clone().requires_grad_()]
    actual = token_stats(
        leaves[0], target, logit_scale=leaves[1], softcap=softcap, temperature=0.7,
        with_rank=True, extra=EXTRA,
    )  # fmt: skip
    returned = theirs[0] * theirs[1]
    if softcap is not None:
        returned = softcap * torch.tanh(returned / softcap)
    x = returned / 0.7
    log_p = torch.log_softmax(x, -1)
    expected = {
        "log_prob": log_p.gather(-1, target[:, None])[:, 0],
        "lse": torch.logsumexp(x, -1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_log_prob": log_p.mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logit": x.mean(-1),
    }
    factors = torch.randn(len(expected), 5, dtype=torch.float64, device=device)
    for name, value in expected.items():
        assert_close(getattr(actual, name), value, 1e-10)
    assert torch.equal(actual.argmax, x.argmax(-1))
    pairs = list(zip(expected, factors, strict=True))
    ours = sum((getattr(actual, name) * f).sum() for name, f in pairs)
    wanted = sum((expected[name] * f).sum() for name, f in pairs)
    for grad, want in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(wanted, theirs), strict=True
    ):
        assert_close(grad, want, 1e-10)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_out_of_range(device, temperature):
    logits, target = torch.randn(2, 3, device=device), torch.zeros(2, dtype=int, device=device)
    with pytest.raises(TypeError, match="temperature must be a number"):
        token_stats(logits, target, temperature=torch.tensor(temperature))
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        token_stats(logits, target, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_over_a_temperature_is_not_rounded(device, dtype):
    x, y = torch.randn(6, 31, device=device, dtype=dtype) * 5, torch.arange(6, device=device)
    exact = (x.double() * 1.5 / 0.7).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for of_scale in (torch.bfloat16, torch.float16, torch.float32):
        scale = torch.tensor(1.5, dtype=of_scale, device=device, requires_grad=True)
        found = token_stats(x, y, logit_scale=scale, temperature=0.7).log_prob
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(found.sum(), scale)
        assert gradient.dtype == of_scale
