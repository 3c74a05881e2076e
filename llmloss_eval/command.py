"""``llmloss eval``: perplexity, calibration and ranking under a model."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmloss_ext.cli import INTERRUPTED, UserError, open_device

from . import missing_packages
from .config import DTYPES, FORMATS, LARGEST_DEFAULT_WINDOW, EvalConfig

if TYPE_CHECKING:
    import torch

    from .evaluation import Task
    from .inputs import Inputs
    from .language_model import LanguageModel
    from .partial import Partial

_TOP_K = (1, 5, 10)
_BINS = 15
_ALPHA = 0.6


def add_parser(subparsers: Any) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a model on a text or on questions with choices",
        description="Perplexity, bits per byte, top-k accuracy and calibration of a text; the "
        "ranking of choices after a context.",
    )
    parser.add_argument(
        "model",
        type=_name,
        help="a folder of transformers, the folder of a run of llmloss train, or module:factory",
    )
    parser.add_argument(
        "input",
        type=_path,
        help='a text, or JSON lines: {"text": ...}, or {"context": ..., "choices": [...], '
        '"label": index}',
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="auto",
        help="of the input (default: auto, JSON lines by the ending .jsonl, .ndjson or .json)",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=_window,
        help="tokens that the model sees at once (default: its context, at most "
        f"{LARGEST_DEFAULT_WINDOW})",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=_positive,
        help="new tokens in each window: the fewer, the more context (default: half a window)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=_positive, nargs="+", metavar="K",
        help="count how often the token is among the k likeliest (default: "
        f"{' '.join(map(str, _TOP_K))})",
    )  # fmt: skip
    parser.add_argument("--bins", type=_bins, help=f"of the reliability diagram (default: {_BINS})")
    parser.add_argument(
        "--alpha", type=_finite,
        help="rank choices by the sum of log p divided by length^alpha, too (default: "
        f"{_ALPHA})",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=_positive, default=8, help="windows or choices at once (default: 8)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto",
        help="of the weights (default: auto, as they are stored)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=_path, help="write the result as JSON; needed to continue after Ctrl-C"
    )
    parser.add_argument(
        "--plot", type=_path, help="draw the reliability diagram: .svg, .pdf, else PNG"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out and --plot")


def run(args: argparse.Namespace) -> int:
    """Evaluates, and prints the table."""
    _require_packages(args)
    _require_files(args)
    from .evaluation import Interrupted, evaluate
    from .inputs import read_inputs
    from .opening import open_model
    from .progress import Progress
    from .report import print_table, save_json, save_plot

    inputs = read_inputs(args.input, args.format)
    _require_used(args, inputs)
    device = open_device(args.device)
    model = open_model(args.model, device, args.dtype)
    config = _config(args, model)
    task = _task(inputs, model, config, device)
    done, partial = _continued(args, model, inputs, task, config)
    how = "from hidden states" if model.from_hidden else "from the model's logits"
    print(f"{args.model}: vocabulary of {model.vocab_size:,}, scored {how}", flush=True)
    if done:
        print(f"continues after {done:,} of {len(task.pieces):,}", flush=True)
    started = time.perf_counter()
    try:
        with Progress(task, done) as progress:
            evaluate(model, task, config.batch_size, device, done, partial, progress.show)
    except Interrupted as stop:
        if partial is None:
            raise KeyboardInterrupt from stop
        print(f"stopped after {stop.done:,} of {len(task.pieces):,}; the same command continues")
        return INTERRUPTED
    seconds = None if done else time.perf_counter() - started
    result = {
        "kind": task.kind,
        "model": args.model,
        "input": str(args.input),
        "settings": config.to_dict(),
        **task.result(),
    }
    if args.out is not None:
        save_json(args.out, result)
    print_table(result, seconds)
    if args.plot is not None:
        save_plot(args.plot, result)
        print(f"reliability  {args.plot}")
    if args.out is not None:
        print(f"result       {args.out}")
    if partial is not None:
        partial.remove()
    return 0


def _require_packages(args: argparse.Namespace) -> None:
    missing = missing_packages()
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        missing.append("matplotlib")
    if missing:
        raise UserError(f"llmloss eval needs {', '.join(missing)}: pip install 'llmloss_ext[eval]'")


def _require_files(args: argparse.Namespace) -> None:
    from .partial import Partial
    from .report import require_new

    # realpath takes a link to itself as it is, which Path.resolve() does not before Python 3.13.
    taken = {os.path.realpath(args.input): "the input"}
    for option in ("out", "plot"):
        path = getattr(args, option)
        if path is None:
            continue
        require_new(path, f"--{option}", overwrite=args.overwrite)
        written = {path: f"--{option} {path}"}
        if option == "out":
            sums = Partial.path_beside(path)
            written[sums] = f"{sums}, which keeps the sums for --out,"
        for file, name in written.items():
            if (other := taken.setdefault(os.path.realpath(file), name)) is not name:
                raise UserError(f"{name} is {other}")


def _require_used(args: argparse.Namespace, inputs: Inputs) -> None:
    """Raises a `UserError` for an option that says nothing about such an input."""
    of_texts, of_choices = ("stride", "top_k", "bins", "plot"), ("alpha",)
    unused = of_texts if inputs.questions else of_choices
    for name in unused:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            what = ("a text", "choices") if inputs.questions else ("choices", "a text")
            raise UserError(f"{option} is for {what[0]}, and the input holds {what[1]}")


def _config(args: argparse.Namespace, model: LanguageModel) -> EvalConfig:
    """The settings, by what the model can read.

    Raises:
        UserError: The window is too long for the model, or the stride for the window.
    """
    window = args.window
    if window is None:
        window = min(model.context or LARGEST_DEFAULT_WINDOW, LARGEST_DEFAULT_WINDOW)
        window = max(window, 2)
    # The last token of a window is predicted, and not read.
    if model.context is not None and window > model.context + 1:
        raise UserError(
            f"--window {window} is longer than the model's context of {model.context} tokens, and "
            "the one that follows"
        )
    stride = window // 2 if args.stride is None else args.stride
    if stride >= window:
        raise UserError(
            f"--stride {stride} must be below --window {window}: the first new token needs context"
        )
    return EvalConfig(
        window=window,
        stride=stride,
        top_k=tuple(sorted(set(args.top_k or _TOP_K))),
        bins=_BINS if args.bins is None else args.bins,
        alpha=_ALPHA if args.alpha is None else args.alpha,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )


def _task(inputs: Inputs, model: LanguageModel, config: EvalConfig, device: torch.device) -> Task:
    """What is scored, and what is made of it.

    Raises:
        UserError: There is no token to score, or the model is not causal.
    """
    from .evaluation import require_causal
    from .pieces import Piece, choices, windows
    from .ranking import RankingTask
    from .texts import TextTask

    task: Task
    if inputs.questions:
        of_each = (choices(question, model, config.window) for question in inputs.questions)
        pieces: list[Piece] = [piece for several in of_each for piece in several]
        task = RankingTask(inputs.questions, pieces, config)
    else:
        texts = map(model.tokens, inputs.documents)
        pieces = [p for ids in texts for p in windows(ids, config.window, config.stride)]
        task = TextTask(pieces, inputs.text_bytes, config)
    if not pieces:
        raise UserError("the input is too short: nothing predicts its only token")
    require_causal(model, max((p.ids for p in pieces[:8]), key=len)[:16].to(device))
    return task


def _continued(
    args: argparse.Namespace,
    model: LanguageModel,
    inputs: Inputs,
    task: Task,
    config: EvalConfig,
) -> tuple[int, Partial | None]:
    """How many pieces are scored already, and where the sums are kept."""
    from .evaluation import resumed_at
    from .partial import Partial, key_of

    if args.out is None:
        return 0, None
    labels = [(question.label, len(question.choices)) for question in inputs.questions]
    partial = Partial(args.out, key_of(model, task.pieces, config, [inputs.text_bytes, labels]))
    return resumed_at(task, partial, discard_others=args.overwrite), partial


def _checked(text: str, kind: Callable[[str], Any], right: Callable[[Any], bool], what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not right(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _positive(text: str) -> int:
    what = "a whole number of at least 1, and below 2^31"
    return int(_checked(text, int, lambda v: 1 <= v < 2**31, what))


def _window(text: str) -> int:
    what = "a whole number of at least 2, and below 2^31"
    return int(_checked(text, int, lambda v: 2 <= v < 2**31, what))


def _bins(text: str) -> int:
    return int(_checked(text, int, lambda v: 1 <= v <= 1000, "a whole number from 1 to 1,000"))


def _finite(text: str) -> float:
    return float(_checked(text, float, math.isfinite, "a finite number"))


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a name must not be empty")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))
