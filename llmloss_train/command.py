"""``llmloss train``: trains a small GPT on real text with a large vocabulary."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmloss_ext.cli import INTERRUPTED, UserError

from . import missing_packages

if TYPE_CHECKING:
    from .loop import Run
    from .world import World


def add_parser(subparsers: Any) -> None:
    """Adds the command's options. The defaults are those of the demo."""
    from .config import DTYPES, LOSSES, PARALLEL, SPIKES, TrainConfig

    defaults = TrainConfig()
    parser = subparsers.add_parser(
        "train",
        help="train a small GPT on real text with a large vocabulary",
        argument_default=argparse.SUPPRESS,  # so that --resume knows what was given
    )

    def add(name: str, kind: Callable[[str], Any], text: str, **options: Any) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {default})", **options)

    parser.add_argument(
        "--text",
        nargs="+",
        type=_name,
        metavar="PATH",
        help="files and folders to train on (default: Python's reference and library sources)",
    )
    add("max-tokens", _positive, "use this many tokens from the start of the text")
    add("steps", _positive, "optimiser steps")
    add("batch-size", _positive, "sequences per micro-batch")
    add("seq-len", _positive, "tokens per sequence")
    add("accumulate", _positive, "micro-batches per step")
    add("lr", _positive_number, "peak learning rate")
    add("clip", _positive_number, "clip the gradient to this norm")
    add("layers", _positive, "transformer blocks")
    add("heads", _positive, "attention heads")
    add("dim", _positive, "width of the model")
    add("seed", _seed, "seed of the weights and of the data order")
    add("dtype", str, "dtype of the matrix products; bfloat16 uses autocast", choices=DTYPES)
    add(
        "loss",
        str,
        "linear: from hidden states; logits: from logits; torch: torch's own",
        choices=LOSSES,
    )
    add("label-smoothing", _share, "weight of the uniform distribution in the targets")
    add("z-loss", _weight, "weight of lse^2")
    add("focal-gamma", _weight, "exponent of 1 - p, the factor of a token's cross entropy")
    add("confidence-penalty", _weight, "weight of -entropy")
    add("contrastive", _weight, "weight of a contrastive loss between the halves of each sequence")
    add("mlm", _weight, "weight of a masked language modelling loss")
    add("mtp", _count, "predict so many tokens after the next one too, with weight 0.3 in all")
    add("adversarial", _weight, "weight of a loss against a discriminator of sampled tokens, which "
        "is trained beside the model")  # fmt: skip
    add("on-spike", str, "reaction to a spike of the loss: mark it, skip the step, lower the "
        "learning rate by half, or off; a step that is not finite is always skipped",
        choices=SPIKES)  # fmt: skip
    add(
        "spike-threshold",
        _positive_number,
        "standard deviations above the recent mean at which a spike begins",
    )
    add("device", str, "cpu or cuda")
    add(
        "parallel",
        str,
        "what the processes of torchrun share: the batches (ddp), these and the weights (fsdp), or "
        "the vocabulary and the feed-forward layers (tp)",
        choices=PARALLEL,
    )
    add("threads", _threads, "CPU threads; 0: torch's default")
    add("eval-every", _positive, "steps between validations")
    add("log-every", _positive, "steps between log lines")
    add("save-every", _positive, "steps between checkpoints")
    parser.add_argument(
        "--out",
        type=lambda text: Path(_name(text)),
        default=Path("runs/train"),
        help="output folder (default: runs/train)",
    )
    parser.add_argument(
        "--compare-to",
        type=lambda text: Path(_name(text)),
        default=None,
        metavar="RUN",
        help="output folder of another run: say how far the losses are from its, and draw both",
    )
    parser.add_argument(
        "--resume", action="store_true", default=False, help="continue the run in --out"
    )
    parser.add_argument(
        "--overwrite", action="store_true", default=False, help="discard an earlier run in --out"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, and prints the closing table."""
    missing = missing_packages()
    if missing:
        needed = ", ".join(missing)
        raise UserError(f"llmloss train needs {needed}: pip install 'llmloss_ext[train]'")
    from .world import joined

    with joined(getattr(args, "parallel", "none")) as world:
        return _train(args, world)


def _train(args: argparse.Namespace, world: World) -> int:
    from .comparison import summarise
    from .loop import Interrupted
    from .report import Reference, save_curve, save_summary

    reference = None if args.compare_to is None else Reference.of(args.compare_to)
    training = _prepare(args, world)
    try:
        with _progress(training) as show:
            training.train(show)
    except Interrupted:
        how = _continuation(training)
        print(f"stopped at step {training.step}; continue with: {how}", flush=True)
        return INTERRUPTED
    checkpoint = training.save()
    print("timing the other losses on the same micro-batch", flush=True)
    summary = summarise(training)
    if world.rank:
        return 0
    records = training.metrics.records
    if reference is not None:
        summary |= reference.difference(records)
    curve = save_curve(args.out, records, training.describe(), reference)
    _print_table(summary)
    print(f"summary     {save_summary(args.out, summary)}")
    print(f"metrics     {args.out / 'metrics.jsonl'}")
    print(f"loss curve  {curve}")
    print(f"checkpoint  {checkpoint}")
    return 0


def _continuation(training: Run) -> str:
    """The command that continues a run."""
    program, options, world = "llmloss", "", training.world
    if world.is_joined:
        program = f"torchrun --nproc-per-node {world.local_size} -m llmloss_ext"
        options = f" --parallel {training.config.parallel}"
    return f"{program} train --resume{options} --out {training.folder}"


def _prepare(args: argparse.Namespace, world: World) -> Run:
    """Makes the run; checks settings, text and folder before anything is written."""
    import torch

    from . import checkpoint
    from .config import TrainConfig, resumed
    from .loop import Run
    from .text import documents
    from .tokens import load_tokens

    own = ("command", "out", "compare_to", "resume", "overwrite")
    given = {name: value for name, value in vars(args).items() if name not in own}
    if "text" in given:
        given["text"] = tuple(given["text"])
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run and --overwrite discards it: choose one")
    state = checkpoint.load(args.out) if args.resume else None
    if state is None:
        config = TrainConfig(**given)
    else:
        with checkpoint.reading(args.out):
            config = resumed(state["config"], given)
    if state is None and (args.out / checkpoint.NAME).exists() and not args.overwrite:
        raise UserError(
            f"{args.out} holds an earlier run: continue it with --resume, name another --out, or "
            "discard it with --overwrite"
        )
    device = world.open_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    print("reading the text", flush=True)
    with world.first_goes_ahead():
        text = load_tokens(documents(config.text), config.max_tokens)
    world.require_same((text.key, config), "the processes have different texts or settings")
    how = "from the cache" if text.cached else "tokenised"
    print(f"{len(text.ids):,} tokens {how}, vocabulary of {text.vocab_size:,}", flush=True)
    if state is not None and state.get("text_key") != text.key:
        raise UserError("the text differs from the one that the checkpoint was trained on")
    training = Run(config, text, args.out, state, device, world)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters; {training.describe()}", flush=True)
    return training


class _progress:  # noqa: N801
    """Shows the metrics records: with a progress bar on a terminal, as plain lines elsewhere."""

    def __init__(self, training: Run) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._training = training
        self._console = Console()
        columns = (
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=training.config.steps, completed=training.step)

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, record: dict[str, Any]) -> None:
        text = (
            f"loss {record['loss']:.4f}  ppl {record['perplexity']:.1f}  "
            f"acc {record['accuracy']:.1%}  top-5 {record['top5_accuracy']:.1%}"
        )
        if record["kind"] == "train":
            text += f"  {record['tokens_per_second']:.0f} tok/s"
            self._bar.update(self._task, completed=record["step"], description=text)
        if record["kind"] == "validation" or not self._console.is_terminal:
            self._console.print(
                f"step {record['step']:>5}  {record['kind']:<10}  {text}",
                highlight=False,
                soft_wrap=True,
            )


def _print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmloss_ext.metrics import perplexity

    table = Table(title=f"llmloss train: {summary['run']}", show_header=False)
    table.add_row("steps", str(summary["steps"]))
    for kind in ("train", "validation"):
        if f"{kind}_loss" in summary:
            before, after = summary[f"{kind}_loss"]
            table.add_row(f"{kind} loss", f"{before:.4f} before, {after:.4f} after")
    before, after = (f"{perplexity(x):,.0f}" for x in (before, after))
    if "compared_to" in summary:
        table.add_row("difference", _difference(summary))
    table.add_row("perplexity", f"{before} before, {after} after")
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("peak memory", f"{summary['peak_bytes'] / 2**20:,.0f} MiB")
    share = summary["loss_seconds"] / summary["seconds"]
    table.add_row("head and loss", f"{summary['loss_seconds']:.1f} s, {share:.1%} of training")
    console = Console()
    console.print(table)
    beside = Table(title="one micro-batch, forward and backward, the same weights")
    for column in ("--loss", "loss", "time in head and loss", "peak memory of the step"):
        beside.add_column(column, justify="left" if column == "--loss" else "right")
    for one in summary["losses"]:
        peak = "?" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:,.0f} MiB"
        time = f"{one['seconds'] * 1e3:,.0f} ms"
        beside.add_row(one["kind"], f"{one['loss']:.5f}", time, peak)
    console.print(beside)


def _difference(summary: dict[str, Any]) -> str:
    count, of = summary["compared_losses"], f"losses of {summary['compared_to']}"
    if not count:
        return f"no step in common with the {of}"
    return f"at most {summary['largest_difference']:.1e} in {count} {of}"


def _number(
    text: str, kind: Callable[[str], Any], allowed: Callable[[Any], bool], what: str
) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")  # Path("") is the folder "."
    return text


def _positive(text: str) -> int:
    what = "a whole number of at least 1, and below 2^31"
    return int(_number(text, int, lambda v: 1 <= v < 2**31, what))


def _count(text: str) -> int:
    return int(_number(text, int, lambda v: 0 <= v <= 64, "a whole number from 0 to 64"))


def _seed(text: str) -> int:
    return int(_number(text, int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1"))


def _threads(text: str) -> int:
    return int(_number(text, int, lambda v: 0 <= v <= 1024, "a whole number from 0 to 1,024"))


def _share(text: str) -> float:
    return float(_number(text, float, lambda v: 0 <= v <= 1, "a number from 0 to 1"))


def _weight(text: str) -> float:
    return float(_number(text, float, lambda v: 0 <= v < math.inf, "a number of at least 0"))


def _positive_number(text: str) -> float:
    return float(_number(text, float, lambda v: 0 < v < math.inf, "a number above 0"))
