"""``llmloss bench``: the losses beside torch, other libraries and the machine's limits.

``llmloss bench --vocab V --tokens N --hidden D`` measures a shape; ``run`` measures a suite.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmloss_ext.cli import INTERRUPTED, UserError, open_device

from . import missing_packages

if TYPE_CHECKING:
    from .results import Results

ROUNDS = {"smoke": 3, "quick": 5, "cpu": 9, "steps": 7, "gpu": 7, "full": 5}


def add_parser(subparsers: Any) -> None:
    """Adds the command's options, and the commands below it."""
    from .suites import SUITES

    parser = subparsers.add_parser(
        "bench",
        help="time the losses beside torch, others and the machine's limits",
        description="Times the losses beside torch, other libraries and the machine's limits: for "
        "a shape of your own, or by one of the commands.",
    )
    _add_shape(parser)
    commands = parser.add_subparsers(title="commands", dest="action", metavar="COMMAND")

    run = commands.add_parser("run", help="measure a suite, and write results and a report")
    run.add_argument("--suite", choices=SUITES, default="quick", help="default: quick")
    run.add_argument(
        "--peers",
        metavar="A,B",
        help='contenders besides llmloss (default: all, or torch in smoke); "none" for none',
    )
    run.add_argument(
        "--rounds",
        type=_at_least(1),
        help="measurements of each contender; slow ones get fewer, at least 3",
    )
    run.add_argument(
        "--only", default="", metavar="TEXT", help="only the cases whose name contains this"
    )
    run.add_argument("--out", type=Path, default=Path("runs/bench"), help="default: runs/bench")
    run.add_argument("--overwrite", action="store_true", help="replace earlier results")
    run.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    run.add_argument("--list", action="store_true", help="print the cases, measure nothing")
    run.set_defaults(work=_run)

    report = commands.add_parser("report", help="write a page, Markdown and plots for a run")
    report.add_argument("results", type=Path, help="results.json, or its folder")
    report.add_argument("--out", type=Path, help="default: the folder of the results")
    report.set_defaults(work=_report)

    compare = commands.add_parser(
        "compare", help="compare two runs; exit status 1 after a regression"
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument(
        "--tolerance", type=_share, help="relative change of time to tolerate (default: 0.1)"
    )
    compare.add_argument(
        "--other-machine", action="store_true", help="allow results from different machines"
    )
    compare.set_defaults(work=_compare)

    trainer = commands.add_parser(
        "trainer",
        help="time a step of transformers.Trainer: stock, from logits, from hidden states",
    )
    for name, default in (("vocab", 131072), ("hidden", 256), ("layers", 2), ("tokens", 512),
                          ("steps", 4), ("rounds", 3)):  # fmt: skip
        least = 2 if name == "steps" else 1  # the first step is not counted
        trainer.add_argument(f"--{name}", type=_at_least(least), default=default,
                             help=f"default: {default}")  # fmt: skip
    trainer.add_argument("--out", type=Path, default=Path("runs/bench"), help="default: runs/bench")
    trainer.set_defaults(work=_trainer)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0; 1 after a wrong result of this library, or a regression; 130 after Ctrl-C.
    """
    given = [name for name, value in vars(args).items() if name in _OF_SHAPE and value is not None]
    if args.action and given:
        option = given[0].removeprefix("shape_").replace("_", "-")
        raise UserError(f"--{option} before {args.action}: a shape needs no command")
    return int(args.work(args))


_OF_SHAPE = tuple(
    f"shape_{name}"
    for name in ("vocab", "tokens", "hidden", "dtype", "device", "peers", "rounds", "no_memory",
                 "out", "overwrite")
)  # fmt: skip
"""Where the options of a shape are, which must not be those of a command of the same name."""


def _add_shape(parser: argparse.ArgumentParser) -> None:
    from .shape import DTYPES

    shape = parser.add_argument_group("a shape of your own, forward and backward")
    add = functools.partial(shape.add_argument, default=None)
    for name, what in (("vocab", "classes, V"), ("tokens", "tokens, N"),
                       ("hidden", "features, D (default: from logits alone)")):  # fmt: skip
        least = 2 if name == "vocab" else 1
        add(f"--{name}", type=_at_least(least), dest=f"shape_{name}", help=what)
    add("--dtype", choices=DTYPES, dest="shape_dtype", help="default: bfloat16")
    add("--device", dest="shape_device", help="cpu or cuda (default: cuda where there is one)")
    add("--peers", metavar="A,B", dest="shape_peers",
        help='contenders besides llmloss (default: all); "none" for none')  # fmt: skip
    add("--rounds", type=_at_least(1), dest="shape_rounds",
        help="measurements of each (default: 7)")  # fmt: skip
    add("--no-memory", action="store_const", const=True, dest="shape_no_memory",
        help="do not measure peak memory")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", dest="shape_out",
        help="also measure fewer classes and fewer tokens beside eager torch, and write the "
        "results there, with a report that plots time and memory")  # fmt: skip
    add("--overwrite", action="store_const", const=True, dest="shape_overwrite",
        help="replace earlier results there")  # fmt: skip
    parser.set_defaults(work=_shape)


def _shape(args: argparse.Namespace) -> int:
    if args.shape_vocab is None or args.shape_tokens is None:
        raise UserError(
            "llmloss bench needs a command (run, report, compare, trainer), or a shape: --vocab "
            "and --tokens, and --hidden for a loss from hidden states"
        )
    import torch

    from .report.tables import missing
    from .results import FILE
    from .run import Runner
    from .shape import cases_of, curves_of, end_curves, table
    from .terminal import progress, show

    out = args.shape_out
    if args.shape_overwrite and out is None:
        raise UserError("--overwrite needs --out: there is nothing to replace")
    name = args.shape_device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = open_device(name).type
    cases = cases_of(args.shape_vocab, args.shape_tokens, args.shape_hidden,
                     args.shape_dtype or "bfloat16", device)  # fmt: skip
    if out is not None:
        cases += curves_of(cases[0])
    runner = Runner("shape", args.shape_rounds or 7, out, _names(args.shape_peers),
                    not args.shape_no_memory, bool(args.shape_overwrite))  # fmt: skip
    with progress(len(cases)) as say:
        results = runner.run(cases, say)
    if out is not None:
        end_curves(results)
        results.save(out / FILE)
    show([table(results)])
    for line in missing(results):
        print(line)
    if out is not None:
        print(f"results  {out / FILE}\nreport   {_try_report(out / FILE)}")
    return _status(results)


def _run(args: argparse.Namespace) -> int:
    import torch

    from .report.tables import missing, tables
    from .results import FILE
    from .run import Runner
    from .suites import suite
    from .terminal import progress, show

    try:
        cases = suite(args.suite, torch.cuda.is_available())
    except ValueError as error:
        raise UserError(str(error)) from error
    cases = [case for case in cases if args.only in case.label or args.only == case.figure]
    if not cases:
        raise UserError(f"--only {args.only}: no case of the suite {args.suite} matches")
    if args.list:
        for case in cases:
            print(f"{case.figure:<8} {case.label}")
        return 0
    wanted = _names("torch" if args.peers is None and args.suite == "smoke" else args.peers)
    rounds = args.rounds or ROUNDS[args.suite]
    runner = Runner(args.suite, rounds, args.out, wanted, not args.no_memory, args.overwrite)
    try:
        with progress(len(cases)) as say:
            runner.run(cases, say)
    except KeyboardInterrupt:
        print("llmloss: interrupted; the results hold the finished cases", file=sys.stderr)
        return INTERRUPTED
    finally:
        # Also after an interruption: the finished cases count.
        report = _try_report(args.out / FILE)
    results = runner.results
    made = tables(results)
    show([made[0], made[-1]])
    for line in missing(results):
        print(line)
    print(f"results  {args.out / FILE}\nreport   {report}")
    return _status(results)


def _names(peers: str | None) -> set[str] | None:
    return None if peers is None else set(peers.split(",")) - {"", "none"}


def _status(results: Results) -> int:
    """1, and a line for each, if a loss of this library is wrong or failed."""
    bad = [f"{row.case.label}, {name}: {m.reason}" for row in results.rows
           for name, m in row.contenders.items()
           if name.startswith("llmloss") and m.status in ("wrong", "failed")]  # fmt: skip
    for line in bad:
        print(f"llmloss: error: llmloss is wrong or failed: {line}", file=sys.stderr)
    return 1 if bad else 0


def _try_report(results: Path) -> str:
    """Writes the report, and returns its path, or else why there is none: results come first."""
    try:
        from .report.page import write_report
    except ImportError as error:
        return f"not made: {error}; to make it elsewhere: llmloss bench report {results}"
    return str(write_report(results, results.parent)[0])


def _trainer(args: argparse.Namespace) -> int:
    import torch

    from .terminal import progress, show
    from .trainer import CONTENDERS, Sizes, compare

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = Sizes(args.vocab, args.hidden, args.layers, args.tokens, args.steps, device)
    with progress(args.rounds * len(CONTENDERS)) as say:
        table = compare(sizes, args.rounds, args.out, say)
    show([table])
    print(f"results  {args.out / 'trainer.json'}")
    return 0


def _report(args: argparse.Namespace) -> int:
    missing = missing_packages()
    if missing:
        names = ", ".join(missing)
        raise UserError(f"llmloss bench report needs {names}: pip install 'llmloss_ext[bench]'")
    from .report.page import write_report

    folder = args.results if args.results.is_dir() else args.results.parent
    for path in write_report(args.results, args.out or folder):
        print(path)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from .compare import TOLERANCE, compare
    from .results import Results

    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    before, after = Results.load(args.before), Results.load(args.after)
    changes = compare(before, after, tolerance, args.other_machine)
    print(f"{'case':<64} {'contender':<16} {'ratio':>6} {'95 %':>13}  verdict")
    for change in changes:
        ratio = "" if change.ratio is None else f"{change.ratio:.2f}"
        low_high = "" if change.interval is None else "{:.2f} to {:.2f}".format(*change.interval)
        print(f"{change.case:<64} {change.name:<16} {ratio:>6} {low_high:>13}  {change.verdict}")
    worse = sum(change.is_regression for change in changes)
    better = sum(change.verdict in ("faster", "less memory") for change in changes)
    print(f"{worse} worse, {better} better, {len(changes)} compared (tolerance "
          f"{tolerance:.0%})")  # fmt: skip
    return 1 if worse else 0


def _at_least(least: int):  # type: ignore[no-untyped-def]
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text}")
    return value
