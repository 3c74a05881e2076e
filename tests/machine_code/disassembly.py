"""The instructions of the kernels in a library or an object, as nvdisasm prints them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "machine_code"
KEPT_SECONDS = 7 * 24 * 3600
FORMAT = b"2"  # of the files that are kept
INSTRUCTION_BYTES = 16  # since compute capability 7.0


class Instruction(NamedTuple):
    predicate: str
    """Such as "@!P0", or ""."""
    opcode: str
    """Such as "LDG.E.128"."""
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.predicate} {self.opcode} {', '.join(self.operands)}".strip()


class Kernel(NamedTuple):
    name: str
    """Such as "row_stats_kernel<BFloat16, true>": as the compiler's report has it."""
    architecture: str
    """Such as "90"."""
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.architecture}"


def find(tool: str) -> str | None:
    """Of the wheels nvidia-cuda-nvdisasm and -cuobjdump: an older toolkit's knows no JSON."""
    found = (place for f in sys.path for place in sorted(Path(f).glob(f"nvidia/*/bin/{tool}")))
    return next((str(place) for place in found if os.access(place, os.X_OK)), None)


def missing() -> str:
    """Why nothing can be read here; "" if it can."""
    for tool in ("nvdisasm", "cuobjdump"):
        if find(tool) is None:
            return f"{tool} is not installed: pip install nvidia-cuda-{tool}"
    return "" if shutil.which("c++filt") else "c++filt is not installed"


def read(binary: Path, cache: Path = CACHE, without: tuple[bytes, ...] = ()) -> list[Kernel]:
    """The kernels of a library or an object, for each architecture that it was compiled for.

    Args:
        binary: The file.
        cache: A folder that keeps what was read, by the machine code's hash.
        without: What is compiled together with a kernel of such a mangled name is left out.
    """
    cuobjdump = find("cuobjdump")
    assert cuobjdump is not None
    cache.mkdir(parents=True, exist_ok=True)
    _drop_old(cache)
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump, "-xelf", "all", str(binary.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        # The largest first: they take longest.
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda path: -path.stat().st_size)
        cubins = [path for path in cubins if not any(n in path.read_bytes() for n in without)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            read = list(pool.map(lambda cubin: _functions(cubin, cache), cubins))
    names = _short_names([f["name"] for functions in read for f in functions])
    return [
        Kernel(names[f["name"]], f["architecture"], f["code"])
        for functions in read
        for f in functions
    ]


def _functions(cubin: Path, cache: Path) -> list[dict[str, Any]]:
    """The functions of one file, which is for one architecture."""
    kept = cache / f"{hashlib.sha256(FORMAT + cubin.read_bytes()).hexdigest()[:24]}.json.gz"
    if not kept.exists():
        nvdisasm = find("nvdisasm")
        assert nvdisasm is not None
        command = [nvdisasm, "-json", "-ndf", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True).stdout
        unfinished = kept.with_suffix(f".{os.getpid()}")
        with gzip.open(unfinished, "wt", compresslevel=1) as file:
            json.dump(_compact(json.loads(text)), file)
        unfinished.rename(kept)
    kept.touch()
    with gzip.open(kept, "rt") as file:
        held = json.load(file)
    words = [Instruction(p, opcode, tuple(rest)) for p, opcode, rest in held["words"]]
    for function in held["functions"]:
        function["code"] = tuple(words[i] for i in function["code"])
    functions: list[dict[str, Any]] = held["functions"]
    return functions


def _compact(listing: list[Any]) -> dict[str, Any]:
    """Of nvdisasm's JSON, what `Kernel` needs: most instructions stand there many times."""
    version = listing[0]["SM"]["version"]
    words: dict[tuple[str, str, str], int] = {}
    functions = [
        {
            "name": function["function-name"],
            "architecture": f"{version['major']}{version['minor']}",
            "code": [
                words.setdefault(
                    (i.get("predicate", ""), i["opcode"], i.get("operands", "")), len(words)
                )
                for i in function["sass-instructions"]
            ],
        }
        for function in listing[1]
    ]
    split = [(p, opcode, operands.split(",") if operands else []) for p, opcode, operands in words]
    return {"words": split, "functions": functions}


def _drop_old(cache: Path) -> None:
    for kept in cache.iterdir():
        if time.time() - kept.stat().st_mtime > KEPT_SECONDS:
            kept.unlink(missing_ok=True)


def _short_names(mangled: list[str]) -> dict[str, str]:
    """As read_report of csrc/cuda/build.py names kernels."""
    text = "\n".join(mangled)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return dict(zip(mangled, map(short_name, done.stdout.splitlines()), strict=True))


def short_name(name: str) -> str:
    """Of a demangled function: without its result, namespaces and arguments."""
    name = re.sub(r"^void |llmloss::(cuda::)?|\(anonymous namespace\)::", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name
