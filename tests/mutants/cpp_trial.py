"""Compiles mutants of C++ sources, and runs the C++ tests over them.

A test is a program of its own source and, if its name says "cpu", of the kernels. They run one
after another, and the first to fail ends the trial: most mutants cost one small compilation. What
does not include the mutated file is compiled once, for all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from .edits import Mutant
from .sandbox import Sandbox
from .trial import Outcome, Trial, TrialError

_OPTIONS = ("-std=c++20", "-O1", "-w", "-MMD", "-Icsrc")
# bounds-strict, which g++ alone has: the last member of a struct is an array of its length, too.
_SANITIZE = ("-fsanitize=address,undefined,bounds-strict", "-fno-sanitize-recover=all")
# Of these, the first that includes a mutant is compiled with it; the others would tell the same.
_KERNELS = ("portable", "avx2", "avx512", "avx512_bf16", "neon")
_LIMIT = 120  # seconds for a compilation, or for a program that takes two


class CppTest(NamedTuple):
    """A test program: its source, and whether it is built with sanitizers."""

    source: str
    sanitized: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """What compiler and linker are told."""
        return _SANITIZE if self.sanitized else ()


class CppTrial(Trial):
    """The C++ tests of one source."""

    def __init__(self, sandbox: Sandbox, tests: Sequence[CppTest], machine: str = "") -> None:
        """Builds the tests and runs them once as they are.

        Args:
            sandbox: Where the sources are.
            tests: The test programs.
            machine: Another processor than this one, such as ``"aarch64"``, for its emulator.

        Raises:
            TrialError: They do not pass, or there are no compiler and emulator for the machine.
        """
        self._sandbox, self._tests = sandbox, tests
        self._compiler = [shutil.which("g++") or "c++"]
        self._emulator: list[str] = []
        if machine:
            self._compiler = [f"{machine}-linux-gnu-g++", "-static"]
            self._emulator = [f"qemu-{machine}"]
            for program in (self._compiler[0], *self._emulator):
                if shutil.which(program) is None:
                    raise TrialError(f"{program} is not installed")
        self._objects = sandbox.root / f"objects{machine}"
        self._objects.mkdir(exist_ok=True)
        for test in tests:
            for source in self._sources(test):
                if not self._object(source, test).exists() and not self._compile(
                    source, test, self._object(source, test)
                ):
                    raise TrialError(f"{source} is not compiled without a mutant")
            if self._run(test, {}) != "survived":
                raise TrialError(f"{test.source} fails without a mutant")

    def outcome(self, mutant: Mutant) -> Outcome:
        """Compiles a mutant and runs the tests over it."""
        with self._sandbox.holding(mutant), TemporaryDirectory(dir=self._objects) as folder:
            compiled: dict[tuple[str, bool], Path] = {}
            for test in self._tests:
                for source in self._users(mutant, test):
                    key = (source, test.sanitized)
                    if key in compiled:
                        continue
                    compiled[key] = Path(folder) / f"{len(compiled)}.o"
                    if not self._compile(source, test, compiled[key]):
                        return "invalid"
                outcome = self._run(test, compiled)
                if outcome != "survived":
                    return outcome
        return "survived"

    def close(self) -> None:
        """Nothing runs between two trials."""

    def _sources(self, test: CppTest) -> list[str]:
        if "cpu" not in Path(test.source).name:
            return [test.source]
        folder = self._sandbox.root / "csrc" / "cpu"
        kernels = [f"csrc/cpu/{path.name}" for path in sorted(folder.glob("*.cpp"))]
        return [test.source, *kernels]

    def _users(self, mutant: Mutant, test: CppTest) -> list[str]:
        """The sources of a test that include the mutated file."""
        users = [s for s in self._sources(test) if mutant.path in self._included(s, test)]
        kernels = [f"csrc/cpu/kernels_{isa}.cpp" for isa in _KERNELS]
        spared = [source for source in kernels if source in users][1:]
        return [source for source in users if source not in spared]

    def _included(self, source: str, test: CppTest) -> set[str]:
        """The files that a source is made of, as the compiler listed them."""
        listed = self._object(source, test).with_suffix(".d").read_text()
        return {os.path.normpath(word) for word in listed.replace("\\\n", " ").split()[1:]}

    def _object(self, source: str, test: CppTest) -> Path:
        """Where the object of a source without a mutant is."""
        name = source.replace("/", "_") + ("_sanitized" if test.sanitized else "")
        return self._objects / f"{name}.o"

    def _compile(self, source: str, test: CppTest, to: Path) -> bool:
        command = [*self._compiler, *_OPTIONS, *test.options, "-c", source, "-o", str(to)]
        return self._call(command) == 0

    def _run(self, test: CppTest, compiled: dict[tuple[str, bool], Path]) -> Outcome:
        """Links a program, with the objects of a mutant where there are any, and runs it."""
        program = str(self._objects / "program")
        sources = self._sources(test)
        mutated = [compiled[s, test.sanitized] for s in sources if (s, test.sanitized) in compiled]
        others = [self._object(s, test) for s in sources if (s, test.sanitized) not in compiled]
        # The linker takes the first copy of a function that the kernels share: the mutant's.
        objects = list(map(str, mutated + others))
        if self._call([*self._compiler, *test.options, *objects, "-o", program]) != 0:
            return "invalid"
        status = self._call([*self._emulator, program])
        return "survived" if status == 0 else "hung" if status is None else "caught"

    def _call(self, command: list[str]) -> int | None:
        """The exit status, None if it took too long."""
        try:
            done = subprocess.run(
                command, cwd=self._sandbox.root, capture_output=True, timeout=_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return None
        return done.returncode
