"""Compiles the emulated kernels and their binding, once for each state of their sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "simt"
CACHE = ROOT / "build" / "simt"
COMPILER = os.environ.get("CXX", "g++")
# -O1 is where the compiler's seconds and the tests' seconds balance. The libraries share nothing:
# each has its own emulator.
FLAGS = (
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DLLMLOSS_SIMT"),
)
# Every access of the kernels is seen, by functions of ours and not of ThreadSanitizer's, which is
# why the linker must not know the option: see accesses.h. Line tables, for what it reports.
SEEN = ("-O1", "-g1", "-fsanitize=thread")
ACCESSES = HERE / "accesses.cpp"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
JOBS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Library:
    """One shared library: a source, compiler options, and the tree whose csrc it includes."""

    name: str
    source: Path
    flags: tuple[str, ...] = ("-O1",)
    root: Path = ROOT
    pybind: bool = False

    def includes(self) -> list[Path]:
        own = [self.root / "csrc", HERE]
        if not self.pybind:
            return own
        import pybind11

        return [*own, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]

    def sources(self) -> list[Path]:
        """The sources and every file of ours that they include, directly or not."""
        found: list[Path] = []
        todo = [self.source, *self._others()]
        while todo:
            path = todo.pop()
            if path in found:
                continue
            found.append(path)
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
                places = [path.parent, self.root / "csrc", HERE]
                todo += [p.resolve() for p in (place / name for place in places) if p.is_file()][:1]
        return found

    def _others(self) -> list[Path]:
        """What is compiled without its flags."""
        return [ACCESSES] if "-fsanitize=thread" in self.flags else []

    def path(self) -> Path:
        digest = hashlib.sha256(repr((COMPILER, FLAGS, self.flags, self.pybind)).encode())
        for source in sorted(self.sources(), key=lambda path: path.name):
            digest.update(source.read_bytes())
        suffix = sysconfig.get_config_var("EXT_SUFFIX") if self.pybind else ".so"
        return CACHE / digest.hexdigest()[:16] / f"{self.name}{suffix}"

    def build(self) -> Path:
        """The library's path, after it was compiled if need be.

        Raises:
            RuntimeError: the compiler refuses the source; the message is the compiler's.
        """
        path = self.path()
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            objects = [self._object(self.source, self.flags, unfinished)]
            objects += [self._object(source, ("-O2",), unfinished) for source in self._others()]
            flags = [flag for flag in self.flags if flag != "-fsanitize=thread"]
            run(COMPILER, "-shared", *flags, *objects, "-o", unfinished, "-ldl")
            for made in objects:
                made.unlink()
            unfinished.replace(path)
        path.parent.touch()
        return path

    def _object(self, source: Path, flags: Sequence[str], beside: Path) -> Path:
        made = beside.with_suffix(f".{source.stem}.o")
        includes = (f"-I{place}" for place in self.includes())
        run(COMPILER, "-c", *FLAGS, *flags, *includes, source, "-o", made)
        return made


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[:8000]}")


def build_all(libraries: Sequence[Library]) -> list[Path]:
    """Builds several libraries, two at a time."""
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(Library.build, libraries))


def forget_old(keep: int = 64) -> None:
    """Removes all but the libraries that were used last."""
    if CACHE.is_dir():
        for old in sorted(CACHE.iterdir(), key=lambda p: p.stat().st_mtime)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def has_compiler() -> bool:
    return shutil.which(COMPILER) is not None


def runtime_of(sanitizers: Iterable[str] = ("libasan.so", "libubsan.so")) -> str:
    """What LD_PRELOAD needs before a sanitized library can be loaded into Python."""
    paths = []
    for name in sanitizers:
        found = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        paths.append(found.stdout.strip())
    return " ".join(paths)


def load(library: Library) -> ModuleType:
    """Builds and imports a pybind11 module."""
    path = library.build()
    spec = importlib.util.spec_from_file_location(library.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
