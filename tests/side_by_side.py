"""Runs the checks of `make test`, as many at a time as there are cores, with one thread each.

    python tests/side_by_side.py MAKE [--all]

``--all`` adds those that take longest for what they find: the sanitizers, the mutants of the CUDA
kernels, and the tests marked ``slow``.

Each check's output is shown in one piece when it ends. The others go on when one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
EMULATED = sorted(TESTS.glob("test_simt_*.py"))
DOCUMENTED = [TESTS / "test_docs.py"]
OF_THE_CORE = [TESTS / "test_core.py"]
OF_LOSSES = [TESTS / "linear", TESTS / "losses"]
"""About half of the time that the Python tests take."""
FRAMEWORKS = [TESTS / "frameworks"]
"""Which `make test-frameworks` runs, in an environment of their own."""


class Check(NamedTuple):
    """Commands that run one after the other, until one fails."""

    name: str
    commands: list[list[str]]


def checks(make: str, *, every: bool) -> list[Check]:
    """The checks, or ``every`` one; the longest first, so that none is left over at the end."""
    pytest = PYTEST if every else [*PYTEST, "-m", "not slow"]
    apart = [*EMULATED, *DOCUMENTED, *OF_THE_CORE, *OF_LOSSES, *FRAMEWORKS]
    make_quietly = [make, "--no-print-directory", "-s"]
    # The sanitizers build what the other tests of the emulator build, too: not at the same time.
    sanitizers = [[*make_quietly, "sanitize"]] if every else []
    emulated = [*sanitizers, [*pytest, *map(str, EMULATED)]]
    # Which builds what the tests in numpy load.
    core = [[*make_quietly, "cpp-test", "test-aarch64"], [*pytest, *map(str, OF_THE_CORE)]]
    return [
        Check("emulated CUDA kernels", emulated),
        Check(
            "Python tests but those of losses", [[*pytest, *(f"--ignore={path}" for path in apart)]]
        ),
        Check("Python tests of losses", [[*pytest, *map(str, OF_LOSSES)]]),
        Check("documentation and examples", [[*pytest, *map(str, DOCUMENTED)]]),
        Check("style and types", [[*make_quietly, "check"]]),
        Check("C++ core", core),
    ]


class Result(NamedTuple):
    """What a check left."""

    name: str
    passed: bool
    seconds: float
    output: str


def run(check: Check) -> Result:
    """Runs a check's commands."""
    print(f"{check.name} ...", flush=True)
    begin, output, passed = time.monotonic(), "", True
    for command in check.commands:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            check=False, cwd=TESTS.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        output += done.stdout
        passed = done.returncode == 0
        if not passed:
            break
    return Result(check.name, passed, time.monotonic() - begin, output)


def main(make: str, *options: str) -> int:
    """Returns the exit status: 1 if a check failed."""
    cores = os.cpu_count() or 1
    todo, failed = checks(make, every="--all" in options), []
    print(f"{len(todo)} checks, {cores} at a time", flush=True)
    with ThreadPoolExecutor(cores) as pool:
        for future in as_completed([pool.submit(run, check) for check in todo]):
            result = future.result()
            verdict = "passed" if result.passed else "FAILED"
            print(f"--- {result.name}: {verdict} in {result.seconds:.0f} s", flush=True)
            print(result.output.rstrip(), flush=True)
            failed += [] if result.passed else [result.name]
    print(f"failed: {', '.join(failed)}" if failed else "every check passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
