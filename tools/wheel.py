"""Builds a wheel and a source distribution from what `make build` has left, and checks both.

    python -m tools.wheel --out build/dist

The objects are linked once more, for an older C library than this machine's (`old_glibc`).
auditwheel gives the wheel its tag, of the oldest Linux that it runs on. torch's libraries stay
outside: torch has loaded them by then.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from csrc.cuda.build import find_nvcc
from tools import old_glibc, sdist_check, wheel_check

ROOT = Path(__file__).resolve().parents[1]


def with_cuda() -> bool:
    """Whether setup.py compiles the CUDA kernels."""
    return os.environ.get("LLMLOSS_CUDA") != "0" and find_nvcc() is not None


def run(*command: str | Path, **variables: str) -> None:
    """Runs a command in the checkout, with these variables in its environment.

    Raises:
        SystemExit: It failed; its output is shown.
    """
    environment = os.environ | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel in a folder, and returns it. Its tag is of this machine alone."""
    # Not in build/lib*, where modules stay that the package has no longer.
    build = ("build", "--build-lib", folder / "lib", "--build-scripts", folder / "scripts")
    bdist = ("bdist_wheel", "--bdist-dir", folder / "content", "--dist-dir", folder / "wheel")
    flags = old_glibc.link_flags(ROOT / "build" / "glibc") if old_glibc.is_newer() else []
    linking = {"LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {shlex.join(flags)}"}
    run(sys.executable, "setup.py", "-q", *build, "egg_info", "-e", folder, *bdist, **linking)
    return only(folder / "wheel", "*.whl")


def build_sdist(folder: Path) -> Path:
    """Builds the source distribution in a folder, and returns it."""
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder / "sdist")
    return only(folder / "sdist", "*.tar.gz")


def repair(wheel: Path, folder: Path) -> Path:
    """Tags a wheel for the oldest Linux that it runs on; returns the new file, in a folder."""
    excluded = [word for name in wheel_check.OF_TORCH for word in ("--exclude", name)]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", folder, wheel)
    return only(folder, "*.whl")


def only(folder: Path, pattern: str) -> Path:
    """The one file of a folder that fits a pattern."""
    (found,) = folder.glob(pattern)
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Builds and checks a wheel and an sdist.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "dist")
    out = parser.parse_args().out
    with TemporaryDirectory() as folder:
        wheel = repair(build_wheel(Path(folder)), Path(folder, "repaired"))
        sdist = build_sdist(Path(folder))
        wheel_check.report(wheel, with_cuda())
        sdist_check.report(sdist)
        out.mkdir(parents=True, exist_ok=True)
        for path in (wheel, sdist):
            print(shutil.copy(path, out))


if __name__ == "__main__":
    main()
