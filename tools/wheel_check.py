"""What is wrong with a wheel: its name, its size, its files, and what its library asks for.

    python -m tools.wheel_check WHEEL

It prints each fault in a line, or the wheel's name and size.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from elftools.elf.dynamic import DynamicSection, DynamicTag
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from csrc.cuda.build import ARCHITECTURES, REPORT
from tools import old_glibc

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 30_000_000
"""Bytes."""
NEWEST_GLIBC = old_glibc.OLDEST
"""The newest that a wheel may ask for."""
LIBRARY = "llmloss_ext/_C.abi3.so"
REPORT_IN_WHEEL = f"llmloss_ext/{REPORT}"
OF_TORCH = ("libc10.so", "libtorch*.so")
"""What the library finds in torch's folder, since torch has loaded it."""
OF_THE_SYSTEM = ("ld-linux-*.so.*", "libc.so.*", "libdl.so.*", "libgcc_s.so.*", "libm.so.*",
                 "libpthread.so.*", "librt.so.*", "libstdc++.so.*")  # fmt: skip


def faults(wheel: Path, with_cuda: bool = True) -> list[str]:
    """What is wrong with a wheel that this checkout built, in a line each.

    Args:
        wheel: The file.
        with_cuda: Whether it shall have the CUDA kernels, for every architecture of a release.
    """
    return [*_of_the_name(wheel), *_of_the_size(wheel), *_of_the_contents(wheel, with_cuda)]


def _of_the_name(wheel: Path) -> Iterator[str]:
    try:
        tags = parse_wheel_filename(wheel.name)[3]
    except InvalidWheelFilename as error:
        yield str(error)
        return
    for tag in sorted(tags, key=str):
        if (tag.interpreter, tag.abi) != ("cp310", "abi3"):
            yield f"{tag}: not for every Python since 3.10 (cp310-abi3)"
        glibc = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", tag.platform)
        if tag.platform.startswith("manylinux") and not glibc:
            continue  # an older system's other name, such as manylinux2014
        if not glibc or (int(glibc[1]), int(glibc[2])) > NEWEST_GLIBC:
            yield f"{tag}: not for every Linux since glibc {NEWEST_GLIBC[0]}.{NEWEST_GLIBC[1]}"


def _of_the_size(wheel: Path) -> Iterator[str]:
    size = wheel.stat().st_size
    if size > LARGEST:
        yield f"{size:,} bytes: more than {LARGEST:,}"


def sources() -> set[str]:
    """The files of the packages, as a wheel has them, but for those that a build makes."""
    files = [path for path in ROOT.glob("llmloss_*/**/*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    return {
        name for name in names if name != REPORT_IN_WHEEL and not fnmatch(name, "llmloss_ext/_C*")
    }


def _of_the_contents(wheel: Path, with_cuda: bool) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        wanted = sources() | {LIBRARY} | ({REPORT_IN_WHEEL} if with_cuda else set())
        yield from (f"{name} is missing" for name in sorted(wanted - names))
        others = {name for name in names - wanted if ".dist-info/" not in name}
        yield from (f"{name} does not belong there" for name in sorted(others))
        if LIBRARY in names:
            yield from library_faults(archive.read(LIBRARY))
        if with_cuda and REPORT_IN_WHEEL in names:
            kernels = json.loads(archive.read(REPORT_IN_WHEEL))
            lacking = set(ARCHITECTURES) - {kernel["architecture"] for kernel in kernels}
            yield from (f"no CUDA kernels for sm_{arch}" for arch in sorted(lacking))


def _text(tag: DynamicTag) -> str:
    """A dynamic tag's, which is an attribute of its name: DT_NEEDED's is `needed`."""
    return str(getattr(tag, tag.entry.d_tag.removeprefix("DT_").lower()))


def may_need(name: str) -> bool:
    """Whether a library of this name is there wherever torch is loaded."""
    return any(fnmatch(name, pattern) for pattern in OF_TORCH + OF_THE_SYSTEM)


def library_faults(content: bytes) -> Iterator[str]:
    """What is wrong with the library: paths, libraries, Python, versions that it asks for."""
    elf = ELFFile(io.BytesIO(content))
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                kind = tag.entry.d_tag
                if kind in ("DT_RPATH", "DT_RUNPATH"):
                    yield f"{LIBRARY} looks for libraries in {_text(tag)}"
                elif kind == "DT_NEEDED" and not may_need(_text(tag)):
                    yield f"{LIBRARY} needs {_text(tag)}"
        elif isinstance(section, GNUVerNeedSection):
            for _, versions in section.iter_versions():
                for version in versions:
                    glibc = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version.name)
                    if glibc and (int(glibc[1]), int(glibc[2])) > NEWEST_GLIBC:
                        yield f"{LIBRARY} needs {version.name}"
        elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            python = [s.name for s in section.iter_symbols() if re.match(r"_?Py", s.name)]
            yield from (f"{LIBRARY} asks Python for {name}" for name in python)
    if str(ROOT).encode() in content:
        yield f"{LIBRARY} names {ROOT}, where it was built"


def report(wheel: Path, with_cuda: bool = True) -> None:
    """Prints the wheel's name and size.

    Raises:
        SystemExit: Something is wrong with it.
    """
    found = faults(wheel, with_cuda)
    if found:
        sys.exit(f"{wheel.name}:\n" + "\n".join(f"  {fault}" for fault in found))
    print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB, checked")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Checks a wheel.")
    parser.add_argument("wheel", type=Path)
    report(parser.parse_args().wheel)


if __name__ == "__main__":
    main()
