"""Installs a wheel where there is no compiler, and runs what a user runs first.

    python -m tools.wheel_try                                  # the newest of build/dist
    python -m tools.wheel_try --python python3.12 --python python3.13

Each Python gets an empty environment over the torch that it has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("c++", "cc", "clang", "clang++", "g++", "gcc", "nvcc")


class Command(NamedTuple):
    """What a user runs."""

    words: str
    """The first is a program of the environment; examples/ is the checkout's."""
    package: str = "llmloss_ext"
    """Whose command it is: a wheel without it leaves the command out."""
    needs: tuple[str, ...] = ()
    """What an extra brings: without one of these the command is left out, and that is said."""


COMMANDS = (
    Command("llmloss info"),
    Command("llmloss verify"),
    Command("python examples/drop_in.py"),
    Command("llmloss train --help", "llmloss_train"),
    Command("llmloss eval --help", "llmloss_eval"),
    Command(
        "llmloss bench run --suite smoke --out bench", "llmloss_bench",
        ("jinja2", "matplotlib", "rich"),
    ),
)  # fmt: skip


def call(words: list[str], **options: object) -> str:
    """Runs a command and returns what it prints.

    Raises:
        SystemExit: It failed; its output is shown.
    """
    done = subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


class Environment:
    """An environment that holds a wheel alone, over the torch of a Python, and no compiler."""

    def __init__(self, folder: Path, python: str, wheel: Path) -> None:
        self.programs = folder / "environment" / "bin"
        self.home = folder / "home"
        self.home.mkdir()
        shutil.copytree(ROOT / "examples", self.home / "examples")
        of_torch = call([python, "-c", "import torch; print(torch.__path__[0])"]).strip()
        call([python, "-m", "venv", str(self.programs.parent)])
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(self.run("python", "-c", ask).strip())
        (packages / "below.pth").write_text(f"{Path(of_torch).parent}\n")
        # Not looking at what lies below, where the checkout may be installed.
        options = ("--no-index", "--no-deps", "--ignore-installed", "--disable-pip-version-check")
        self.run("python", "-m", "pip", "install", "-q", *options, str(wheel.resolve()))
        came = self.run("python", "-c", "import llmloss_ext; print(llmloss_ext.__file__)").strip()
        if not Path(came).is_relative_to(packages):
            sys.exit(f"llmloss_ext is {came}, which is not of the wheel")

    def run(self, program: str, *arguments: str) -> str:
        """Runs a program of the environment, with nothing else on PATH; returns what it prints."""
        path = str(self.programs)
        there = [name for name in COMPILERS if shutil.which(name, path=path)]
        if there:
            sys.exit(f"{path} has {', '.join(there)}")
        variables = {"PATH": path, "HOME": str(self.home), "TMPDIR": str(self.home)}
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads:
            variables["OMP_NUM_THREADS"] = threads
        return call([str(self.programs / program), *arguments], cwd=self.home, env=variables)

    def lacks(self, modules: tuple[str, ...]) -> list[str]:
        """Those of some modules that cannot be imported."""
        find = "import sys\nfrom importlib.util import find_spec\n"
        find += "print(*(name for name in sys.argv[1:] if find_spec(name) is None))"
        return self.run("python", "-c", find, *modules).split()


def try_wheel(wheel: Path, python: str) -> None:
    """Installs a wheel over a Python's torch and runs the commands, a line each.

    Raises:
        SystemExit: One failed; its output is shown.
    """
    with zipfile.ZipFile(wheel) as archive:
        packages = {name.partition("/")[0] for name in archive.namelist()}
    with TemporaryDirectory() as folder:
        environment = Environment(Path(folder), python, wheel)
        of = (
            "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__)"
        )
        print(environment.run("python", "-c", of).strip(), flush=True)
        for command in COMMANDS:
            lacking = environment.lacks(command.needs)
            if command.package not in packages:
                print(f"  {command.words}: left out, {command.package} is not in the wheel")
            elif lacking:
                print(f"  {command.words}: left out, {', '.join(lacking)} is not installed")
            else:
                begin = time.monotonic()
                environment.run(*command.words.split())
                print(f"  {command.words}: {time.monotonic() - begin:.1f} s", flush=True)


def newest(folder: Path) -> Path:
    """The wheel that was last written to a folder.

    Raises:
        SystemExit: There is none.
    """
    wheels = sorted(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit(f"no wheel in {folder}: make wheel")
    return wheels[-1]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Installs a wheel and runs it.")
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--python", action="append", help="one that has torch; can be repeated")
    options = parser.parse_args()
    wheel = options.wheel or newest(ROOT / "build" / "dist")
    print(wheel.name, flush=True)
    for python in options.python or [sys.executable]:
        try_wheel(wheel, python)


if __name__ == "__main__":
    main()
