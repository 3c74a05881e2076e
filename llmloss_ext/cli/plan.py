"""``llmloss plan``: the cost of a linear loss of a given size, without running it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    import torch

    from ..chips import Chip
    from ..linear.planning import Plan

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_parser(subparsers: Any) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "plan",
        help="print the cost of a linear loss: chunks, FLOPs and memory",
        description="Prints the cost of linear_cross_entropy, forward and backward, and then of "
        "each loss from hidden states, with a reference's where it has one.",
    )
    for name, text in (("N", "tokens"), ("D", "features per token"), ("V", "vocabulary size")):
        parser.add_argument(name, type=_integer, help=text)
    parser.add_argument(
        "dtype", choices=DTYPES, nargs="?", default="bfloat16",
        help="of the matrix products (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument(
        "--gpu",
        help="the GPU whose time to predict, such as h100 (default: this machine's); implies "
        "--device cuda",
    )
    parser.add_argument("--chunk-tokens", type=_integer, help="tokens per chunk")
    parser.add_argument("--max-chunk-bytes", type=_integer, help="upper limit for a chunk's logits")
    parser.add_argument(
        "--recompute", action="store_true",
        help="backward computes the logits again, as with reduction=\"none\" and with losses from "
        "the token statistics",
    )  # fmt: skip
    parser.add_argument(
        "--sequence-tokens", type=_integer, default=2048, metavar="S",
        help="tokens of a sequence, for the losses that have to see all of one, or of a pair "
        "(default: 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--frozen", choices=("hidden", "weight"), action="append", default=[],
        help="an operand without a gradient; may be given twice",
    )  # fmt: skip
    parser.add_argument(
        "--weight-grad-dtype",
        choices=DTYPES,
        help="dtype in which the weight's gradient is accumulated",
    )
    parser.add_argument(
        "--weight-dtype", choices=DTYPES, help="dtype of the weight before autocast"
    )
    parser.add_argument(
        "--float32-logits", action="store_true",
        help="products of 16 bits keep their logits in float32, as with logits_dtype=torch.float32",
    )  # fmt: skip
    parser.add_argument(
        "--drop-ignored", action="store_true", help="some tokens are ignored and skipped"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one fact per line."""
    import torch

    from .. import plan
    from ..linear.cost import chip_named, frontier
    from ..linear.planning import LOSS_WALKS

    if args.sequence_tokens < 1:
        raise UserError(f"--sequence-tokens must be at least 1, got {args.sequence_tokens}")
    n, d, v, dtype = args.N, args.D, args.V, _dtype(args.dtype) or torch.float32
    device = "cuda" if args.gpu else args.device
    options: dict[str, Any] = {
        "weight_grad_dtype": _dtype(args.weight_grad_dtype),
        "weight_dtype": _dtype(args.weight_dtype),
        "needs_grad": ("hidden" not in args.frozen, "weight" not in args.frozen),
        "recompute": args.recompute,
        "drop_ignored": args.drop_ignored,
        "logits_dtype": torch.float32 if args.float32_logits else None,
    }
    chunks = {"chunk_tokens": args.chunk_tokens, "max_chunk_bytes": args.max_chunk_bytes}
    try:
        planned = plan(n, d, v, dtype, device, **chunks, **options)
        chip = chip_named(args.gpu)
    except ValueError as error:
        raise UserError(str(error)) from error
    saved = planned.unfused_bytes / planned.peak_bytes
    for name, value in (
        ("chunks", f"{planned.chunks} of {planned.chunk_tokens} tokens"),
        ("products", f"{planned.products} of {args.N:,} x {args.D:,} x {args.V:,}"),
        ("work", f"{planned.flops / 1e12:.2f} TFLOP"),
        ("chunk's logits", _mebibytes(planned.chunk_bytes)),
        ("gradients", _mebibytes(planned.gradient_bytes)),
        ("peak beyond inputs", _mebibytes(planned.peak_bytes)),
        ("with whole logits", f"{_mebibytes(planned.unfused_bytes)}, {saved:.1f} times as much"),
    ):
        print(f"{name:<18} {value}")
    print(f"\n{'products':>8}  {'of references':>13}  {'peak beyond inputs':>18}  loss")
    length = max(min(args.sequence_tokens, n), 1)
    for loss, recompute, references, sequences in LOSS_WALKS:
        how = options | {"recompute": recompute, "references": references}
        if sequences:
            how |= {"group_tokens": min(sequences * length, max(n, 1))}
        other = plan(n, d, v, dtype, device, **chunks, **how)
        peak, what = _mebibytes(other.peak_bytes), f", {length:,} tokens each" if sequences else ""
        print(f"{other.products:>8}  {references:>13}  {peak:>18}  {loss}{what}")
    if device == "cuda" and planned.dtype.itemsize == 2:  # what the model knows
        _print_predictions([planned, *frontier(n, d, v, dtype, **options)], chip)
    return 0


def _print_predictions(plans: Iterable[Plan], chip: Chip) -> None:
    """The memory and the time of the plan that comes first, and of others."""
    from ..linear.cost import predict

    chosen, *others = plans
    by_chunk = {plan.chunk_tokens: plan for plan in (*others, chosen)}
    products = predict(chosen, chip).products_seconds * 1e3
    print(
        f"\nPredicted, not measured, on an {chip.name}: time / {products:.2f} ms of products alone"
    )
    print(f"{'tokens of a chunk':>17}  {'peak beyond inputs':>18}  {'time':>5}")
    for tokens, plan in sorted(by_chunk.items()):
        mark = "  this plan" if plan is chosen else ""
        peak, ratio = _mebibytes(plan.peak_bytes), predict(plan, chip).ratio
        print(f"{tokens:>17,}  {peak:>18}  {ratio:>5.2f}{mark}")


def _integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 2**63
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below 2^63")
    return value


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
