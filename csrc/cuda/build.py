"""Compiles the CUDA kernels with nvcc, for setup.py, and keeps the compiler's report on each.

The objects hold machine code for compute capability 8.0, 9.0 and 10.0, and PTX of 10.0 for
what has no code of its own, such as 12.0: made for that, two of the statistics kernels would spill.
LLMLOSS_CUDA_ARCHS="90" (or "80;90") compiles for fewer, which is quicker while developing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent
ARCHITECTURES = ("80", "90", "100")
PTX = 100
# No product is fused with a sum but by fma_of: see csrc/cuda/kernels/tasks.cuh.
FLAGS = ("-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-c")
REPORT = "cuda_kernels.json"


def find_nvcc() -> str | None:
    """Of CUDA_HOME, else on PATH, else where the toolkit is installed by default."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (
        [str(Path(home, "bin"))] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    )
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def toolkit() -> Path:
    """The folder that holds the toolkit's include and lib folders."""
    nvcc = find_nvcc()
    assert nvcc is not None
    # nvcc may be a script that calls another: ask the compiler where it looks.
    done = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull],
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.M)
    return Path(found.group(1).strip() if found else Path(nvcc).parents[1]).resolve()


def toolkit_version() -> str:
    """Such as "13.0"."""
    nvcc = find_nvcc()
    assert nvcc is not None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    assert found is not None, done.stdout
    return found.group(1)


def include_flags() -> list[str]:
    """None: only .cu files see CUDA's headers."""
    return []


def link_flags() -> list[str]:
    """The static run-time library, so that one build loads with and without CUDA installed."""
    names = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    archive = next(
        (path for name in names if (path := toolkit() / name / "libcudart_static.a").exists()), None
    )
    if archive is None:
        raise SystemExit(f"llmloss_ext: no libcudart_static.a in {toolkit()}")
    # Its symbols stay inside: torch may bring a run-time library of its own.
    return [str(archive), "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]


def compile_cuda(folder: Path) -> list[Path]:
    """Compiles what has changed, and returns the objects; the report lies beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = sorted([*HERE.rglob("*.cuh"), *HERE.rglob("*.h"), *(CSRC / "core").glob("*.h")])
    command = _command()
    common = hashlib.sha256(repr(command).encode())
    for path in headers:
        common.update(path.read_bytes())

    def compile_one(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}.o")
            done = subprocess.run(
                [*command, str(source), "-o", str(unfinished)], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(command)} {source}\n{done.stdout}{done.stderr}")
            target.with_suffix(".log").write_text(done.stderr)
            unfinished.rename(target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, sorted((HERE / "launch").glob("*.cu"))))
    for old in folder.iterdir():
        if old.suffix in (".o", ".log") and old.with_suffix(".o") not in objects:
            old.unlink()
    kernels = [kernel for o in objects for kernel in read_report(o.with_suffix(".log").read_text())]
    (folder / REPORT).write_text(json.dumps(kernels, indent=1) + "\n")
    return objects


def _command() -> list[str]:
    asked = re.findall(r"\d+", os.environ.get("LLMLOSS_CUDA_ARCHS", "")) or list(ARCHITECTURES)
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [nvcc, *FLAGS]
    known = known_architectures(nvcc)
    chosen = [arch for arch in asked if not known or arch in known]
    if not chosen:
        raise SystemExit(f"llmloss_ext: {nvcc} compiles for none of {', '.join(asked)}")
    if chosen != asked:
        left_out = ", ".join(f"sm_{arch}" for arch in asked if arch not in chosen)
        print(f"llmloss_ext: {left_out} is left out: this nvcc is too old for it")
    for arch in chosen:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    newest = max(
        (arch for arch in chosen if int(arch) <= PTX), key=int, default=max(chosen, key=int)
    )
    command += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
    return [*command, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"]


def known_architectures(nvcc: str) -> list[str]:
    """What a compiler can compile for; nothing where it does not say."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    return re.findall(r"compute_(\d+)\b", done.stdout)


def read_report(text: str) -> list[dict[str, str | int]]:
    """What ptxas -v says of each kernel: registers, spills, stack frame, by architecture."""
    text = subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout
    pattern = re.compile(
        r"Compiling entry function '(?P<name>.*?)' for 'sm_(?P<arch>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?:[^\n]*? (?P<shared>\d+) bytes smem)?",
        re.S,
    )
    return [
        {
            "kernel": re.sub(r"^void |llmloss::(cuda::)?|\(.*", "", found["name"]),
            "architecture": found["arch"],
            "registers": int(found["registers"]),
            "shared_bytes": int(found["shared"] or 0),  # besides what a launch asks for
            "stack_bytes": int(found["stack"]),
            "spill_bytes": int(found["stores"]) + int(found["loads"]),
        }
        for found in pattern.finditer(text)
    ]
