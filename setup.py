"""Builds llmloss_ext._C: the CPU kernels always, the CUDA kernels where nvcc is found.

LLMLOSS_CUDA=0 leaves CUDA out. MAX_JOBS limits the compilers that run at once.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
os.chdir(ROOT)

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "llmloss_ext builds against the torch you use: install it first (pip install "
        "'torch>=2.11'), then pip install --no-build-isolation ."
    )


def require_cxx20() -> None:
    """Stops with one line where the compiler cannot build the sources."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "test.cpp"
        source.write_text("#include <span>\nstd::span<int> s; template <class T> concept C = true;")
        command = [*compiler.split(), "-std=c++20", "-fsyntax-only", str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            sys.exit(f"llmloss_ext needs a C++20 compiler (g++ 11 or later); {compiler}: {detail}")


def load_cuda_build():
    """csrc/cuda/build.py, or None with a line that says why CUDA is left out."""
    if os.environ.get("LLMLOSS_CUDA") == "0":
        print("llmloss_ext: CUDA is left out (LLMLOSS_CUDA=0)")
        return None
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda)
    if cuda.find_nvcc() is None:
        print("llmloss_ext: CUDA is left out (no nvcc on PATH or in CUDA_HOME)")
        return None
    return cuda


def torch_target() -> str:
    """The oldest torch whose stable ABI the sources need: 2.13's where it is there, else 2.11's."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    minor = 13 if (major, minor) >= (2, 13) else 11
    return f"0x{2:02x}{minor:02x}000000000000"


def extension() -> CppExtension:
    """The one extension module; it has no Python in it, so one build serves every version."""
    sources = [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/ops").glob("*.cpp")]
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030A0000"]
    flags += [f"-DTORCH_TARGET_VERSION={torch_target()}"]
    objects, libraries = [], []
    cuda = load_cuda_build() if Path("csrc/cuda").exists() else None
    if cuda is None:
        sources = [path for path in sources if not path.name.startswith("cuda_")]
    else:
        objects = [str(path) for path in cuda.compile_cuda(ROOT / "build" / "cuda")]
        libraries = cuda.link_flags()
        flags += ["-DUSE_CUDA", *cuda.include_flags()]
    return CppExtension(
        "llmloss_ext._C",
        sorted(str(path) for path in sources),
        extra_objects=objects,
        extra_link_args=libraries,
        extra_compile_args=flags,
        py_limited_api=True,
    )


require_cxx20()
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
