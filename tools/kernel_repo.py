"""Lays out a repository for Hugging Face's kernel hub, from what `make build` has left.

    python -m tools.kernel_repo --out build/kernel-repo

It has a folder for each of the build's backends (CPU; CUDA where nvcc was found):

    build/torch-stable-abi211-cpu-x86_64-linux/
        __init__.py, functional.py, ...   the package without its command line
        ops/namespace.py                  says that the operators are torch.ops.<id>
        _C.abi3.so                        linked once more, so that they are
        metadata.json                     the id, what it runs on, and a digest of every file

The id is made of the contents, so two versions, or one beside the installed package, can be loaded
in one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from csrc.cuda.build import REPORT, toolkit_version
from csrc.ops.abi import STABLE_ABI
from llmloss_ext.ops import has_cuda
from llmloss_ext.ops.namespace import NAMESPACE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmloss_ext"
COMMAND_LINE = ("cli", "__main__.py")
NAME = "llmloss-ext"
VERSION = 0
"""Of the interface, as the hub counts: 0 may still change."""
LEAST_KERNELS = "0.17.0"
"""The oldest `kernels` that was seen to load it."""


class Backend(NamedTuple):
    """What a variant's kernels run on."""

    kind: str
    """As metadata.json names it."""
    tag: str
    """As the variant's folder does."""
    architectures: tuple[str, ...] = ()
    """Of CUDA."""

    @property
    def metadata(self) -> dict[str, object]:
        """Its entry in metadata.json."""
        archs = {"archs": self.architectures} if self.architectures else {}
        return {"type": self.kind, **archs}


CPU = Backend("cpu", "cpu")


def cuda_backend(toolkit: str, architectures: Iterable[int]) -> Backend:
    """The CUDA kernels of a toolkit ("13.0"), compiled for architectures such as 90."""
    *older, newest = sorted(architectures)
    names = [f"{arch // 10}.{arch % 10}" for arch in (*older, newest)]
    names[-1] += "+PTX"
    return Backend("cuda", "cu" + toolkit.replace(".", ""), tuple(names))


def built_backends() -> list[Backend]:
    """Those whose kernels the build in this checkout has."""
    if not has_cuda():
        return [CPU]
    kernels = json.loads((PACKAGE / REPORT).read_text())
    return [CPU, cuda_backend(toolkit_version(), {int(k["architecture"]) for k in kernels})]


def variant_name(backend: Backend) -> str:
    """The folder in which `kernels` looks for a backend, on this platform."""
    major, minor = STABLE_ABI
    system = f"{platform.machine()}-{platform.system().lower()}"
    return f"torch-stable-abi{major}{minor}-{backend.tag}-{system}"


def python_files() -> list[Path]:
    """The modules of the package that a kernel has."""
    every = sorted(PACKAGE.rglob("*.py"))
    return [path for path in every if path.relative_to(PACKAGE).parts[0] not in COMMAND_LINE]


def identity(backend: Backend) -> str:
    """The name of a variant's module and of its operators, which other contents do not have."""
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.*")) if path.suffix != ".pyc"]
    digest = hashlib.sha256(repr((variant_name(backend), backend, torch.__version__)).encode())
    for path in (*python_files(), *sources, ROOT / "setup.py"):
        digest.update(path.read_bytes())
    return f"_{NAME.replace('-', '_')}_{backend.kind}_{digest.hexdigest()[:12]}"


def link(namespace: str, backend: Backend, folder: Path) -> Path:
    """Links the built objects as operators ``torch.ops.<namespace>``, and returns the library.

    Raises:
        SystemExit: There is no build to link, or the compiler says no.
    """
    with_cuda = str(int(backend != CPU))
    environment = {**os.environ, "LLMLOSS_NAMESPACE": namespace, "LLMLOSS_CUDA": with_cuda}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-temp", str(folder / "objects"), "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    (library,) = (folder / PACKAGE.name).glob("_C*.so")
    return library


def lay_out(repository: Path, backend: Backend, namespace: str, library: Path) -> Path:
    """Writes the variant that a library is for, and returns its folder."""
    variant = repository / "build" / variant_name(backend)
    shutil.rmtree(variant, ignore_errors=True)
    for source in python_files():
        target = variant / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    said = variant / "ops" / "namespace.py"
    said.write_text(said.read_text().replace(f'"{NAMESPACE}"', f'"{namespace}"'))
    shutil.copy(library, variant)
    metadata = {
        "name": NAME,
        "id": namespace,
        "version": VERSION,
        "license": "Apache-2.0",
        "kernels-minver": LEAST_KERNELS,
        "python-depends": [],
        "backend": backend.metadata,
        "digest": {"algorithm": "sha256", "files": digests(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def digests(folder: Path) -> dict[str, str]:
    """Of the files in a folder, by their paths in it: SHA-256 in base 64."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }


def build(repository: Path, backends: Iterable[Backend]) -> list[Path]:
    """Writes a repository with a variant for each backend, and returns their folders."""
    variants = []
    for backend in backends:
        namespace = identity(backend)
        with TemporaryDirectory() as folder:
            library = link(namespace, backend, Path(folder))
            variants.append(lay_out(repository, backend, namespace, library))
    return variants


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Lays out a repository for the kernel hub.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernel-repo")
    for variant in build(parser.parse_args().out, built_backends()):
        print(variant)


if __name__ == "__main__":
    main()
