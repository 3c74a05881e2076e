"""bench/gpu.sh, with programs in place of Python and the GPU's that note how they are called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PYTHON = """#!/bin/sh
echo "python $*" >> "$CALLS"
case $* in
  *info) echo "CUDA kernels       $KERNELS" ;;
  *capability*) echo 90 ;;
  *"$FAILS"*) echo "no luck"; exit 1 ;;
esac
"""
COMPUTE_SANITIZER = """#!/bin/sh
echo "$*" >> "$CALLS"
"""


@pytest.fixture
def run(tmp_path):
    """Runs it; returns its status, what it printed and the calls."""
    for name, text in (
        ("python", PYTHON),
        ("compute-sanitizer", COMPUTE_SANITIZER),
        ("nvidia-smi", "#!/bin/sh\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*phases, kernels="built", fails="nothing"):
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", SCRIPT, tmp_path / "out", *phases], capture_output=True, text=True,
            env=os.environ | {
                "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
                "CALLS": str(calls), "KERNELS": kernels, "FAILS": fails,
            },
        )  # fmt: skip
        assert not done.stderr
        return done.returncode, done.stdout, calls.read_text()

    return run


def test_everything_but_a_build_that_is_there(run):
    status, out, calls = run()
    assert status == 0
    assert "the library that is there loads" in out
    for call in ("-n ", "--tool memcheck", "--tool racecheck", "-m llmloss_ext bench run"):
        assert call in calls
    assert "setup.py" not in calls
    assert "setup.py build_ext" in run(kernels="not built")[2]
    assert "setup.py build_ext" in run("build")[2]


def test_the_others_run_when_one_fails(run, tmp_path):
    status, out, calls = run(fails="-m pytest")
    assert status == 1
    assert out.endswith(f"failed: pytest (see {tmp_path / 'out'})\n")
    assert "no luck" in (tmp_path / "out" / "pytest.log").read_text()
    assert "-m llmloss_ext bench run" in calls


def test_phases_by_name(run):
    status, _, calls = run("test")
    assert status == 0
    assert "-m pytest" in calls
    assert not any(word in calls for word in ("bench run", "--tool", "setup.py"))
    assert run("tests")[:2] == (2, "gpu.sh: no phase tests\n")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_it_is_clean():
    subprocess.run(["shellcheck", SCRIPT], check=True)
