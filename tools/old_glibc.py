"""Links for an older C library than this machine's, so that a wheel runs on an older Linux.

Objects stay as the compiler has made them. Only their names of the C library are found in that of
glibc 2.28, which torch's own wheels ask for, too: zig, of the package ziglang, writes its libraries
for the linker, from lists of what each version has.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

OLDEST = (2, 28)

_LIBRARIES = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1")
# What newer headers ask for. A variable of glibc 2.32 spares atomics where there is one thread; it
# is 0 where there may be several. A function of GCC 11 came with C++20; a library of torch may
# happen to have it, none of torch 2.11 for AArch64 does.
_SHIM = """\
#include <sstream>
extern "C" { char __libc_single_threaded = 0; }
template std::string std::stringbuf::str() const&;
"""


def is_newer() -> bool:
    """Whether what is linked here asks for a newer one."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) > OLDEST


def link_flags(folder: Path) -> list[str]:
    """What the linker of a library is told, before its objects.

    Args:
        folder: Where to keep what it makes, which takes half a minute the first time.
    """
    folder = folder / f"zig-{importlib.metadata.version('ziglang')}"
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [str(_folder_of_zig(folder) / name) for name in _LIBRARIES]
    return [str(shim(folder)), "-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]


def shim(folder: Path) -> Path:
    """An object, made in a folder, of what newer headers ask for and older systems lack."""
    made = folder / "shim.o"
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"]
    command = [*compiler, *flags, "-xc++", "-c", "-", "-o", str(made)]
    subprocess.run(command, input=_SHIM, check=True, text=True)
    return made


def _folder_of_zig(folder: Path) -> Path:
    """Where zig has left its C library, in its cache."""
    source = folder / "empty.c"
    source.touch()
    caches = {f"ZIG_{kind}_CACHE_DIR": str(folder / kind.lower()) for kind in ("GLOBAL", "LOCAL")}
    target = f"{platform.machine()}-linux-gnu.{OLDEST[0]}.{OLDEST[1]}"
    linking = ["-target", target, "-shared", source.name, "-o", "empty.so"]
    command = [sys.executable, "-m", "ziglang", "cc", *linking]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | caches, capture_output=True, text=True, check=False
    )
    found = list(folder.glob("global/o/*/libc.so.6"))
    if done.returncode != 0 or len(found) != 1:
        sys.exit(f"{' '.join(command)} makes no C library:\n{done.stdout}{done.stderr}")
    return found[0].parent
