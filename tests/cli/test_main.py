"""The llmloss command: its version, and errors in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmloss_ext.cli import info
from llmloss_ext.cli.main import main
from llmloss_train import missing_packages


@pytest.mark.parametrize(
    "argv",
    [
        ["verify", "--dtype", "x"],
        ["nothing"],
        ["info", "a\nb"],
        ["plan", "1", "1", "9" * 400],
        ["plan", "1", "1", "many"],
        [],
    ],
)
def test_wrong_options_end_in_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("llmloss: error:")
    assert error.count("\n") == 1


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("llmloss: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "--device", "nonsense"], "--device must be cpu or cuda, got nonsense"),
        (["verify", "--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["verify", "--device", ""], "--device must be cpu or cuda, got nothing"),
        (["verify", "--device", "mkldnn"], "--device must be cpu or cuda, got mkldnn"),
        (["verify", "--device", "cuda:" + "9" * 30], "--device must be cpu or cuda, got cuda:9"),
        (["info", "--plan", "8", "1000", "int8"], "dtype must be one of"),
        (["info", "--plan", "8", "many", "float32"], "N and V must be integers"),
        (["info", "--plan", "8", "9" * 30, "float32"], "N and V must be below 2^63"),
        (["info", "--plan", "8", "-5", "float32"], "--plan: "),
        (["plan", "8", "8", "8", "--chunk-tokens", "0"], "chunk_tokens must be at least 1"),
    ],
)
def test_errors_end_in_one_line(capsys, argv, message):
    assert main(argv) == 1
    assert message in one_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["verify", "train", "eval"])
def test_a_device_that_is_not_there(capsys, command, tmp_path):
    argv = [command, "--device", "cuda"]
    if command == "train":
        if missing_packages():
            pytest.skip("the packages of the extra train are not installed")
        argv += ["--out", str(tmp_path)]
    if command == "eval":
        pytest.importorskip("rich")
        argv += ["module:factory", __file__]
    assert main(argv) == 1
    assert "--device cuda: " in one_line(capsys)


def test_a_build_without_kernels_for_the_device(capsys, monkeypatch):
    def absent(*_):
        raise NotImplementedError("Could not run llmloss::cross_entropy")

    monkeypatch.setattr("llmloss_ext.cli.devices.cross_entropy", absent)
    assert main(["verify"]) == 1
    assert "has no kernels for cpu" in one_line(capsys)


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), AssertionError(), MemoryError()])
def test_an_unexpected_error_ends_in_one_line(capsys, monkeypatch, error):
    def broken(_):
        raise error

    monkeypatch.setattr(info, "run", broken)
    monkeypatch.delenv("LLMLOSS_TRACEBACK", raising=False)
    assert main(["info"]) == 1
    assert type(error).__name__ in one_line(capsys)
    monkeypatch.setenv("LLMLOSS_TRACEBACK", "1")
    assert main(["info"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_an_unexpected_error_is_told_without_torchs_frames(capsys, monkeypatch):
    def broken(_):
        raise RuntimeError("\nthe reason\nframe #0: c10::Error")

    monkeypatch.setattr(info, "run", broken)
    assert main(["info"]) == 1
    assert "RuntimeError: the reason (LLMLOSS_TRACEBACK" in one_line(capsys)


@pytest.mark.parametrize("command", ["info", "verify"])
def test_an_instruction_set_that_does_not_exist(capsys, monkeypatch, command):
    monkeypatch.setenv("LLMLOSS_CPU_ISA", "avx1024")
    assert main([command]) == 1
    error = one_line(capsys)
    assert "LLMLOSS_CPU_ISA must be" in error
    assert "LLMLOSS_TRACEBACK" not in error


def test_names_that_are_not_utf8_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(info, "run", lambda _: print("a\udcffb") or 0)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "a\\udcffb\n"


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmloss_ext", "info"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "llmloss: error: No space left on device\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"llmloss (\d+\.\d+\S*|unknown .*)\n", capsys.readouterr().out)
