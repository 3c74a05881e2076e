"""``llmloss verify``: every operator, dtype and option against float64 on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cross_entropy, linear_cross_entropy, token_stats
from ..tolerances import GRADIENT, VALUE
from .devices import open_device
from .info import ISAS, instruction_set

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS, COLUMNS = 24, 5003  # a prime width, so that only the first row is aligned
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reduction sum": {"reduction": "sum"},
    "reduction none": {"reduction": "none"},
    "class weights": {"weight": True},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-3},
    "focal": {"focal_gamma": 2.0},
    "softcap": {"softcap": 15.0},
    "logit scale": {"logit_scale": 0.7},
    "token weights": {"token_weight": True},
    "num_items": {"num_items": 40},
    "vocab_size": {"vocab_size": 4990},
    "probabilities": {"probabilities": True, "label_smoothing": 0.1},
    "offset 1e4": {"offset": 1e4},
    "confident": {"peak": 25.0},
    "in place": {"inplace": True},
}
LINEAR_OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "one token per chunk": {"chunk_tokens": 1},
    "no reduction": {"reduction": "none", "chunk_tokens": 7},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 1e-3, "chunk_tokens": 7},
}
FEATURES = 32
EXTRA = ("log_sum_sq_probs",)
STATISTICS = ("log_prob", "lse", "entropy", "mean_log_prob", *EXTRA)


def add_parser(subparsers: Any) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("verify", help="check every operator against float64")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


class Check(NamedTuple):
    """One row of the table: the largest errors, relative to max(1, |expected|)."""

    what: str
    dtype: torch.dtype
    value: float
    gradient: float
    torch_value: float
    torch_gradient: float

    @property
    def passed(self) -> bool:
        """Whether the errors are within the tolerances, or no larger than torch's own."""
        value = max(VALUE[self.dtype], self.torch_value)
        gradient = max(GRADIENT[self.dtype], self.torch_gradient)
        return self.value <= value and self.gradient <= gradient


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if a check failed."""
    device = open_device(args.device)
    failed = total = 0
    print(f"{'check':<40} {'dtype':<9} {'value':>9} {'torch':>9} {'gradient':>9} {'torch':>9}")
    for check in checks(device):
        total += 1
        failed += not check.passed
        kind = str(check.dtype).removeprefix("torch.")
        figures = (check.value, check.torch_value, check.gradient, check.torch_gradient)
        line = " ".join(f"{f:9.1e}" for f in figures)
        print(f"{check.what:<40} {kind:<9} {line}  {'ok' if check.passed else 'FAILED'}")
    print(f"{total - failed} of {total} checks passed (largest error relative to float64)")
    return 1 if failed else 0


def checks(device: torch.device) -> Iterator[Check]:
    """Runs every option with every dtype, then every instruction set."""
    for name, options in OPTIONS.items():
        for dtype in DTYPES:
            yield _check_loss(name, dtype, device, dict(options))
    for dtype in DTYPES:
        for statistic in STATISTICS:
            yield _check_statistic(statistic, dtype, device)
    for name, options in LINEAR_OPTIONS.items():
        for dtype in DTYPES:
            yield _check_linear(name, dtype, device, options)
    if device.type != "cpu":
        return
    before = os.environ.get("LLMLOSS_CPU_ISA")
    try:
        for isa in ISAS:
            os.environ["LLMLOSS_CPU_ISA"] = isa
            if instruction_set() != isa:
                continue  # this processor lacks it
            for dtype in DTYPES:
                check = _check_loss("plain", dtype, device, {"label_smoothing": 0.1})
                yield check._replace(what=f"instruction set {isa}")
    finally:
        if before is None:
            os.environ.pop("LLMLOSS_CPU_ISA", None)
        else:
            os.environ["LLMLOSS_CPU_ISA"] = before


def _inputs(dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) * 3
    target = torch.randint(0, 4990, (ROWS,), generator=generator)
    logits[torch.arange(ROWS), target] += options.pop("peak", 0.0)
    logits += options.pop("offset", 0.0)
    target[3] = -100
    return logits.to(dtype), target


def torch_stats(
    logits: Tensor, target: Tensor, softcap: float, scale: float, vocab: int, weight: Tensor | None
) -> dict[str, Tensor]:
    """Computes the statistics in plain torch, in the dtype of the logits throughout."""
    x = logits[:, :vocab] * scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    log_p = torch.log_softmax(x, -1)
    valid = target != -100
    at_target = log_p.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    terms = log_p if weight is None else log_p * weight[:vocab].to(log_p.dtype)
    stats = {
        "log_prob": at_target,
        "lse": torch.logsumexp(x, -1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_log_prob": terms.sum(-1) / vocab,
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
    }
    return {name: torch.where(valid, s, 0.0) for name, s in stats.items()}


def torch_loss(logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Computes the loss in plain torch, in the dtype of the logits throughout."""
    eps, weight = options.get("label_smoothing", 0.0), options.get("weight")
    if target.is_floating_point():
        q = target.to(logits.dtype) * (1 - eps) + eps / COLUMNS
        return -(q * torch.log_softmax(logits, -1)).sum(-1).mean()
    vocab = options.get("vocab_size", COLUMNS)
    stats = torch_stats(
        logits, target, options.get("softcap", 0.0), options.get("logit_scale", 1.0), vocab, weight
    )
    tokens = (target != -100).to(logits.dtype)
    w_y = tokens if weight is None else weight[target.clamp_min(0)].to(logits.dtype) * tokens
    rows = -(1 - eps) * w_y * stats["log_prob"] - eps * stats["mean_log_prob"]
    rows = rows * (1 - stats["log_prob"].exp()) ** options.get("focal_gamma", 0.0)
    rows = rows + options.get("z_loss", 0.0) * stats["lse"].square()
    if "token_weight" in options:
        tokens = options["token_weight"].to(logits.dtype)
        rows, w_y = rows * tokens, w_y * tokens
    if options.get("reduction", "mean") == "none":
        return rows
    if options.get("reduction") == "sum":
        return rows.sum()
    return rows.sum() / options.get("num_items", w_y.sum())


def _errors(
    function: Callable[[Tensor], Tensor], logits: Tensor, value: Tensor, gradient: Tensor
) -> tuple[float, float]:
    """The largest errors of value and gradient, relative to max(1, |expected|)."""
    actual_value, actual_gradient = _value_and_gradient(function, logits)

    def largest(actual: Tensor, expected: Tensor) -> float:
        error = (actual.double() - expected).abs() / expected.abs().clamp_min(1.0)
        return float(torch.nan_to_num(error, nan=float("inf")).max())

    return largest(actual_value, value), largest(actual_gradient, gradient)


def _value_and_gradient(
    function: Callable[[Tensor], Tensor], logits: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    result = function(leaf)
    upstream = torch.linspace(0.5, 1.5, max(result.numel(), 1)).reshape(result.shape)
    (gradient,) = torch.autograd.grad(result, leaf, upstream.to(result))
    return result.detach(), gradient


def _check_loss(
    name: str, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> Check:
    logits, target = _inputs(dtype, options)
    inplace = options.pop("inplace", False)
    if options.pop("probabilities", False):
        target = torch.softmax(logits.double().flip(0), -1).to(dtype)
    if "weight" in options:
        options["weight"] = torch.linspace(0.1, 2.0, COLUMNS, dtype=torch.float64).to(device)
    if "token_weight" in options:
        options["token_weight"] = torch.linspace(0.1, 2.0, ROWS, dtype=torch.float64).to(device)
    logits, target = logits.to(device), target.to(device)

    def ours(z: Tensor) -> Tensor:
        z = z * 1 if inplace else z
        return cross_entropy(z, target, inplace=inplace, **options)

    def plain(z: Tensor) -> Tensor:
        return torch_loss(z, target, options)

    expected = _value_and_gradient(plain, logits.double())
    return Check(
        f"cross_entropy, {name}",
        dtype,
        *_errors(ours, logits, *expected),
        *_errors(plain, logits, *expected),
    )


def _check_statistic(name: str, dtype: torch.dtype, device: torch.device) -> Check:
    logits, target = _inputs(dtype, {})
    logits, target = logits.to(device), target.to(device)

    def ours(z: Tensor) -> Tensor:
        stats = token_stats(z, target, softcap=20.0, logit_scale=1.1, extra=EXTRA)
        result: Tensor = getattr(stats, name)
        return result

    def plain(z: Tensor) -> Tensor:
        return torch_stats(z, target, 20.0, 1.1, COLUMNS, None)[name]

    expected = _value_and_gradient(plain, logits.double())
    return Check(
        f"token_stats, {name}",
        dtype,
        *_errors(ours, logits, *expected),
        *_errors(plain, logits, *expected),
    )


def _check_linear(
    name: str, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> Check:
    """Puts hidden states and weight into one leaf, so that both gradients are checked."""
    generator = torch.Generator().manual_seed(2)
    both = torch.randn(ROWS + COLUMNS, FEATURES, generator=generator, dtype=torch.float64)
    both[ROWS:] *= 0.5
    both = both.to(dtype).to(device)
    target = _inputs(dtype, {})[1].to(device)

    def ours(z: Tensor) -> Tensor:
        return linear_cross_entropy(z[:ROWS], z[ROWS:], target, **options)

    def plain(z: Tensor) -> Tensor:
        # In the same chunks: the order in which a matrix library sums depends on the shape.
        size = options.get("chunk_tokens", ROWS)
        chunks = [z[begin : min(begin + size, ROWS)] for begin in range(0, ROWS, size)]
        logits = torch.cat([chunk @ z[ROWS:].t() for chunk in chunks])
        return torch_loss(logits, target, options)

    expected = _value_and_gradient(plain, both.double())
    return Check(
        f"linear_cross_entropy, {name}",
        dtype,
        *_errors(ours, both, *expected),
        *_errors(plain, both, *expected),
    )
