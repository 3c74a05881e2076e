"""Runs the emulated kernels' tests under AddressSanitizer and UBSan, for two types of logits.

Between them these have every kind of misalignment, and both types of arithmetic. The sanitizers'
run-time must be in the process before anything else: this starts pytest with it.
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
    command += ["(bfloat16 or float64) and not reverse and not random"]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
