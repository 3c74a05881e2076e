"""Builds llmloss_ext._C: the CPU kernels always, the CUDA kernels where nvcc is found.

LLMLOSS_CUDA=0 leaves CUDA out. MAX_JOBS limits the compilers that run at once.
LLMLOSS_DEBUG=1 builds for gdb: not optimised, with symbols and assertions. It leaves CUDA out, for
which nvcc takes minutes, unless LLMLOSS_CUDA=1 asks for it.
LLMLOSS_NAMESPACE=name links what was built once more, as operators torch.ops.name.*: the first step
of tools/kernel_repo.py.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
os.chdir(ROOT)
DEBUG = os.environ.get("LLMLOSS_DEBUG", "0") not in ("", "0")
# Separate folders, so that switching between the two builds only has to link.
OBJECTS = "build/debug/objects" if DEBUG else "build/objects"
CUDA_OBJECTS = ROOT / ("build/debug/cuda" if DEBUG else "build/cuda")
NAMESPACE = os.environ.get("LLMLOSS_NAMESPACE")

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    sys.exit(
        f"llmloss_ext is built with torch ({error}): install it first (pip install torch==2.13.0), "
        "then pip install --no-build-isolation ."
    )


def require_cxx20() -> None:
    """Stops with one line where the compiler cannot build the sources."""
    compiler = os.environ.get("CXX", "c++")
    command = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-xc++", "-"]
    program = "#include <span>\nstd::span<int> s; template <class T> concept C = true;"
    try:
        subprocess.run(command, input=program, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        sys.exit(f"llmloss_ext needs a C++20 compiler (g++ 11 or later); {compiler}: {detail}")


def load(script: Path):
    """A module of the sources, which are no package."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_cuda_build():
    """csrc/cuda/build.py, or None with a line that says why CUDA is left out."""
    script = Path("csrc/cuda/build.py")
    if os.environ.get("LLMLOSS_CUDA") == "0":
        reason = "LLMLOSS_CUDA=0"
    elif DEBUG and os.environ.get("LLMLOSS_CUDA") != "1":
        reason = "a debug build; LLMLOSS_CUDA=1 adds it"
    elif not script.exists():
        reason = "no CUDA sources"
    else:
        cuda = load(script)
        if cuda.find_nvcc() is not None:
            if DEBUG:
                # Line numbers for cuda-gdb and compute-sanitizer. Not -G, which changes registers
                # and timing, and with them the failure that one is looking for.
                given = os.environ.get("NVCC_APPEND_FLAGS", "")
                os.environ["NVCC_APPEND_FLAGS"] = f"{given} -lineinfo"
            return cuda
        reason = "no nvcc on PATH or in CUDA_HOME"
    print(f"llmloss_ext: CUDA is left out ({reason})")
    return None


def left_by_build(source: Path) -> str:
    """The object that a build has made of a source."""
    found = Path(OBJECTS, source).with_suffix(".o")
    if not found.exists():
        sys.exit(f"LLMLOSS_NAMESPACE links what make build leaves: {found} is not there")
    return str(found)


def extension() -> CppExtension:
    """The one extension module; it has no Python in it, so one build serves every version."""
    sources = [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/ops").glob("*.cpp")]
    flags = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # Errors name csrc/... and torch/..., wherever these were.
    flags += [f"-fmacro-prefix-map={path}/=" for path in (ROOT.resolve(), *include_paths())]
    # Python's own flags, which come first, have -DNDEBUG.
    flags += ["-O0", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"] if DEBUG else ["-O3", "-g0"]
    flags += ["-DPy_LIMITED_API=0x030A0000", load(Path("csrc/ops/abi.py")).TORCH_TARGET]
    objects, libraries = [], []
    cuda = load_cuda_build()
    if cuda is None:
        if not NAMESPACE:  # which leaves the library in place as it is
            Path("llmloss_ext/cuda_kernels.json").unlink(missing_ok=True)
        sources = [path for path in sources if not path.name.startswith("cuda_")]
    else:
        flags += ["-DLLMLOSS_CUDA=1", "-DUSE_CUDA", *cuda.include_flags()]
        objects = [str(path) for path in cuda.compile_cuda(CUDA_OBJECTS)]
        shutil.copy(CUDA_OBJECTS / cuda.REPORT, ROOT / "llmloss_ext")
        libraries = cuda.link_flags()
    if NAMESPACE:
        flags.append(f"-DLLMLOSS_NAMESPACE={NAMESPACE}")
        named = Path("csrc/ops/library.cpp")  # the only source that reads it
        objects += [left_by_build(path) for path in sources if path != named]
        sources = [named]
    return CppExtension(
        "llmloss_ext._C",
        sorted(map(str, sources)),
        extra_objects=objects,
        extra_link_args=libraries,
        extra_compile_args=flags,
        py_limited_api=True,
    )


require_cxx20()
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={
        # One place for objects, whoever builds (make, pip, an editable install): all re-use them.
        "build_ext": {"build_temp": OBJECTS},
        "bdist_wheel": {"py_limited_api": "cp310"},
    },
)
