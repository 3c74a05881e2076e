"""Runs the emulated kernels' tests under AddressSanitizer and UBSan.

bfloat16 and float64 have every kind of misalignment between them, and both types of arithmetic; the
other two types of logits run two families that reach every kernel. The sanitizers' run-time must be
in the process before anything else: this starts pytest with it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from simt import build  # noqa: E402


def main() -> int:
    if any(importlib.util.find_spec(name) is None for name in ("pytest", "numpy", "pybind11")):
        print("pytest, numpy or pybind11 is not installed: skipped")
        return 0
    environment = os.environ | {
        "LD_PRELOAD": build.runtime_of(),
        "LLMLOSS_SIMT_SANITIZE": "1",
        # Python itself leaks; a test that reads unmapped memory on purpose is not among these.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(TESTS / "test_simt_kernels.py"), "-k"]
    # The other schedules run the same code in another order.
    command += [
        "(bfloat16 or float64 or in_place_with_options or int32) and not reverse and not random"
    ]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
