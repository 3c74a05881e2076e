"""The package with the CUDA operators on CPU tensors: the kernels run in the emulator.

The sources are the package's own and those of csrc/ops, under another name of the operators, so
that both can be in one process. Only what asks torch for a device is replaced (operators.cpp).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

from csrc.ops.abi import TORCH_TARGET
from simt import build

NAMESPACE = "llmloss_emulated"
OPERATORS = build.ROOT / "csrc" / "ops"
SOURCES = {
    build.HERE / "operators.cpp": (),
    OPERATORS / "cuda_ops.cpp": ("-DLLMLOSS_CUDA=1", "-DUSE_CUDA"),
    OPERATORS / "library.cpp": (f"-DLLMLOSS_NAMESPACE={NAMESPACE}",),
    OPERATORS / "fields.cpp": (),
    OPERATORS / "plan_ops.cpp": (),
}
# Not optimised, which compiles in a third of the time. Names are visible, for dladdr.
FLAGS = (
    *("-std=c++20", "-fPIC", "-fno-gnu-unique", "-O0", "-w", "-DLLMLOSS_SIMT"),
    TORCH_TARGET,
)


class Emulated:
    """The package, and what it has launched."""

    def __init__(self) -> None:
        folder = build.CACHE / _digest()
        package = folder / NAMESPACE
        library = package / "_C.so"
        if not library.is_file():
            shutil.rmtree(package, ignore_errors=True)
            shutil.copytree(build.ROOT / "llmloss_ext", package,
                            ignore=shutil.ignore_patterns("_C*", "__pycache__", "cli"))  # fmt: skip
            names = package / "ops" / "namespace.py"
            names.write_text(names.read_text().replace('"llmloss"', f'"{NAMESPACE}"'))
            _compile(library)
        sys.path.insert(0, str(folder))
        try:
            self.package: ModuleType = importlib.import_module(NAMESPACE)
        finally:
            sys.path.remove(str(folder))
        self._library = ctypes.CDLL(str(library))
        self._library.llmloss_launches.restype = ctypes.c_char_p

    def forget(self) -> None:
        """Forgets what was launched."""
        self._library.llmloss_forget_launches()

    def launches(self) -> list[str]:
        """The kernels launched since, such as "row_stats"."""
        return re.findall(r"cuda::(\w+)_kernel", self._library.llmloss_launches().decode())


def _digest() -> str:
    files = [path for path in (build.ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]
    files += [*(build.ROOT / "llmloss_ext").rglob("*.py"), *SOURCES, *build.HERE.glob("*.h")]
    digest = hashlib.sha256(repr((build.COMPILER, FLAGS, torch.__version__)).encode())
    for path in (*sorted(files), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(library: Path) -> None:
    of_torch = Path(torch.__file__).parent
    includes = (of_torch / "include", build.ROOT / "csrc", build.HERE)
    objects = []
    for source, flags in SOURCES.items():
        objects.append(library.with_suffix(f".{source.stem}.o"))
        build.run(build.COMPILER, "-c", *FLAGS, *flags, *(f"-I{path}" for path in includes), source,
                  "-o", objects[-1])  # fmt: skip
    unfinished = library.with_suffix(".tmp")
    libraries = (f"-L{of_torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl")
    build.run(build.COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", unfinished)
    unfinished.replace(library)
