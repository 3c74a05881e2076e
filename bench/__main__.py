"""``python -m bench run | report | compare | trainer | readme``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmloss_ext.cli.errors import OneLineParser, UserError, run_command

ROUNDS = {"quick": 5, "cpu": 9, "gpu": 7, "full": 5}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 after an error, a wrong result of this library, or a regression; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    interrupted = "interrupted; the results hold the finished cases"
    return run_command("bench", lambda: int(args.command(args)), interrupted)


class BenchParser(OneLineParser):
    """Reports a wrong option in one line."""

    program = "bench"


def _parser() -> BenchParser:
    from bench.suites import SUITES

    parser = BenchParser(prog="python -m bench", description="Benchmarks the losses.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure a suite, and write results and a report")
    run.add_argument("--suite", choices=SUITES, default="quick", help="default: quick")
    run.add_argument(
        "--peers", metavar="A,B", help='contenders besides llmloss (default: all); "none" for none'
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
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="write a page, Markdown and plots for a run")
    report.add_argument("results", type=Path, help="results.json, or its folder")
    report.add_argument("--out", type=Path, help="default: the folder of the results")
    report.set_defaults(command=_report)

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
    compare.set_defaults(command=_compare)

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
    trainer.set_defaults(command=_trainer)

    readme = commands.add_parser("readme", help="write the measured figures into README and docs/")
    how = readme.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only check that they are up to date")
    how.add_argument("--demo", type=Path, metavar="RUN",
                     help="first store the figures of this run of llmloss train")  # fmt: skip
    readme.set_defaults(command=_readme)
    return parser


def _run(args: argparse.Namespace) -> int:
    import torch

    from bench.report.tables import missing, tables
    from bench.run import Runner
    from bench.suites import suite
    from bench.terminal import progress, show

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
    wanted = None if args.peers is None else set(args.peers.split(",")) - {"", "none"}
    rounds = args.rounds or ROUNDS[args.suite]
    runner = Runner(args.suite, rounds, args.out, wanted, not args.no_memory, args.overwrite)
    try:
        with progress(len(cases)) as say:
            runner.run(cases, say)
    finally:
        # Also after an interruption: the finished cases count.
        report = _try_report(runner.path)
    results = runner.results
    made = tables(results)
    show([made[0], made[-1]])
    for line in missing(results):
        print(line)
    print(f"results  {runner.path}\nreport   {report}")
    bad = [f"{row.case.label}, {name}: {m.reason}" for row in results.rows
           for name, m in row.contenders.items()
           if name.startswith("llmloss") and m.status in ("wrong", "failed")]  # fmt: skip
    for line in bad:
        print(f"bench: llmloss is wrong or failed: {line}", file=sys.stderr)
    return 1 if bad else 0


def _try_report(results: Path) -> str:
    """Writes the report, and returns its path, or else why there is none: results come first."""
    try:
        from bench.report.page import write_report
    except ImportError as error:
        return f"not made: {error}; to make it elsewhere: python -m bench report {results}"
    return str(write_report(results, results.parent)[0])


def _trainer(args: argparse.Namespace) -> int:
    import torch

    from bench.terminal import progress, show
    from bench.trainer import CONTENDERS, Sizes, compare

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = Sizes(args.vocab, args.hidden, args.layers, args.tokens, args.steps, device)
    with progress(args.rounds * len(CONTENDERS)) as say:
        table = compare(sizes, args.rounds, args.out, say)
    show([table])
    print(f"results  {args.out / 'trainer.json'}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from bench.report.page import write_report

    folder = args.results if args.results.is_dir() else args.results.parent
    for path in write_report(args.results, args.out or folder):
        print(path)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from bench.compare import TOLERANCE, compare
    from bench.results import Results

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


def _readme(args: argparse.Namespace) -> int:
    from bench.demo import keep
    from bench.readme import outdated, update

    if args.demo:
        print(keep(args.demo))
    if args.check:
        if pages := ", ".join(outdated()):
            raise UserError(f"not of the committed figures: {pages}; run python -m bench readme")
        return 0
    print(f"written: {', '.join(update()) or 'nothing, all were up to date'}")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
