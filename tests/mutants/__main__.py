"""``PYTHONPATH=.:tests python -m mutants``, which `make mutants` runs."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from llmloss_bench.report.tables import Table
from llmloss_bench.terminal import progress, show

from . import cpp_code, equivalent, python_code
from .edits import Mutant, mutant
from .results import Results
from .sandbox import Sandbox
from .suites import SUITES, Suite, sources
from .trial import OUTCOMES, Outcome, TrialError

ROOT = Path(__file__).parents[2]


def main(
    argv: Sequence[str] | None = None,
    root: Path = ROOT,
    suites: Sequence[Suite] = SUITES,
    known: Path = equivalent.FILE,
) -> int:
    """Runs the mutants and lists those that survive.

    Args:
        argv: The options.
        root: The checkout, which is only read, but for build/mutants.
        suites: Which tests watch which source.
        known: The list of equivalent mutants.

    Returns:
        0; 1 if a mutant survives, if a listed one is not there, or if tests fail without a mutant.
    """
    args = _parser().parse_args(argv)
    chosen = sources(root, suites, args.only)
    every = [m for source in chosen for m in mutants_of(root, source)]
    same = equivalent.read(known)
    found = [m for m in every if not any(entry.is_of(m) for entry in same)]
    if args.limit is not None and args.limit < len(found):
        found = sorted(random.Random(args.seed).sample(found, args.limit))
    if args.list:
        for one in found:
            _print(one)
        return 0
    try:
        outcomes = _run(found, root, chosen, args.survivors)
    except TrialError as error:
        print(f"mutants: error: {error}", file=sys.stderr)
        return 1
    _report(outcomes)
    gone = [e for e in same if e.path in chosen and not any(e.is_of(m) for m in every)]
    for entry in gone:
        print(f"{known.name} lists what is no mutant: {entry.path}: {entry.original}")
    return 1 if "survived" in outcomes.values() or gone else 0


def mutants_of(root: Path, path: str) -> list[Mutant]:
    """Every mutant of a source."""
    source = (root / path).read_text()
    code = python_code if path.endswith(".py") else cpp_code
    return [mutant(path, source, edit) for edit in code.edits(source)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATH", help="only these files and folders"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="only so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--survivors",
        action="store_true",
        help="where tests were only added: run again what survived, and nothing else",
    )
    return parser


def _run(
    mutants: list[Mutant], root: Path, chosen: dict[str, Suite], only_survivors: bool
) -> dict[Mutant, Outcome]:
    """The outcome of each mutant, from build/mutants where it is known."""
    outcomes: dict[Mutant, Outcome] = {}
    with TemporaryDirectory(prefix="llmloss-mutants-") as folder, progress(len(mutants)) as say:
        sandbox = Sandbox(root, Path(folder))
        for path, suite in chosen.items():
            own = [m for m in mutants if m.path == path]
            tests = suite.tests_of(path, sandbox.root)
            known = Results(root / "build" / "mutants", sandbox.root, path, tests, only_survivors)
            new = [m for m in own if known.get(m) is None]
            if new:
                with closing(suite.trial(path, sandbox)) as trial:
                    for one in new:
                        say(f"{path}: line {one.line}", 1.0)
                        known.put(one, trial.outcome(one))
            outcomes |= {m: outcome for m in own if (outcome := known.get(m)) is not None}
    return outcomes


def _report(outcomes: dict[Mutant, Outcome]) -> None:
    rows = []
    for path in dict.fromkeys(m.path for m in outcomes):
        counts = Counter(outcome for m, outcome in outcomes.items() if m.path == path)
        rows.append([path, *(str(counts[kind]) for kind in OUTCOMES)])
    show([Table("Mutants", ["source", *OUTCOMES], rows)])
    for one, outcome in outcomes.items():
        if outcome == "survived":
            _print(one)


def _print(one: Mutant) -> None:
    print(f"{one.path}:{one.line}\n    {one.original}\n    {one.mutated}")


if __name__ == "__main__":
    sys.exit(main())
