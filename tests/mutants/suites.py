"""Which tests watch which source: one test file for each, and those that run its code besides."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from .cpp_trial import CppTest, CppTrial
from .python_trial import PythonTrial
from .sandbox import Sandbox
from .trial import Trial


class Suite(NamedTuple):
    """Tests of some sources.

    Attributes:
        sources: A pattern of paths from the repository's root.
        tests: Test files and folders; ``{name}`` is the source's name, and a file that is not there
            is left out. Those that notice most come first.
        sanitized: C++ tests to run under the sanitizers as well.
        machine: The processor that C++ tests are for, if not this one.
        deselected: An expression of pytest's ``-k`` for the tests to leave out.
    """

    sources: str
    tests: tuple[str, ...]
    sanitized: tuple[str, ...] = ()
    machine: str = ""
    deselected: str = ""

    def tests_of(self, source: str, root: Path) -> list[str]:
        """The tests of one source that there are."""
        named = [test.format(name=Path(source).stem) for test in self.tests]
        return [test for test in named if (root / test).exists()]

    def trial(self, source: str, sandbox: Sandbox) -> Trial:
        """Makes ready to run the tests of one source."""
        tests = self.tests_of(source, sandbox.root)
        if source.endswith(".py"):
            return PythonTrial(sandbox, tests, self.deselected)
        plain = [CppTest(test) for test in tests]
        sanitized = [CppTest(test, True) for test in self.sanitized]
        return CppTrial(sandbox, [*plain, *sanitized], self.machine)


_CORE, _ROWS = "tests/cpp/test_core.cpp", "tests/cpp/test_loss_rows.cpp"
_NO_PART = "tests/test_no_part.py"
_EDGES, _KERNELS = "tests/cpp/test_cpu_edges.cpp", "tests/cpp/test_cpu_kernels.cpp"
# They compile, measure memory or take seconds, and hold little that the others do not.
_SLOW = "compil or the_peak or no_more_memory or data_parallel or do_not_overflow"
SUITES = (
    Suite("csrc/core/*.h", (_CORE, _ROWS, _EDGES, _KERNELS), sanitized=(_CORE,)),
    Suite("csrc/cpu/*neon*", (_EDGES, _KERNELS), machine="aarch64"),
    Suite("csrc/cpu/*", (_EDGES, _KERNELS), sanitized=(_EDGES, _KERNELS)),
    Suite(
        "llmloss_ext/linear/*.py",
        (
            "tests/linear/test_{name}.py", "tests/linear", "tests/losses/test_distillation.py",
            _NO_PART,
        ),
        deselected=_SLOW,
    ),
    Suite(
        "llmloss_ext/losses/*.py", ("tests/losses/test_{name}.py", "tests/losses", _NO_PART),
        deselected=_SLOW,
    ),
    Suite(
        "llmloss_ext/divergence.py",
        (
            "tests/losses/test_distillation.py", "tests/linear/test_divergence.py",
            "tests/linear/test_distillation.py",
        ),
        deselected=_SLOW,
    ),
    Suite(
        "llmloss_ext/composite.py",
        (
            "tests/test_transforms.py", "tests/test_token_stats.py", "tests/test_cross_entropy.py",
            _NO_PART, "tests/linear/test_functional.py", "tests/test_confident.py",
        ),
        deselected=_SLOW,
    ),
    Suite("llmloss_ext/columns.py", ("tests/test_columns.py",)),
    Suite("llmloss_ext/sequences.py", ("tests/test_sequences.py",)),
    Suite("llmloss_ext/shard.py", ("tests/parallel",), deselected=_SLOW),
)  # fmt: skip


def sources(root: Path, suites: Sequence[Suite], only: Sequence[str]) -> dict[str, Suite]:
    """The sources that suites watch, of ``only`` these files and folders if there are any."""
    found: dict[str, Suite] = {}
    for suite in suites:
        for path in sorted(root.glob(suite.sources)):
            name = path.relative_to(root).as_posix()
            if not only or any(fnmatch(name, f"{o.rstrip('/')}*") for o in only):
                found.setdefault(name, suite)
    return found
