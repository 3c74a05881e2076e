"""The command line: info, verify, errors, and how it finds llmloss_train."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmloss_ext.cli import info, verify
from llmloss_ext.cli.main import main
from llmloss_train import missing_packages


def test_info(capsys, isa):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert f"{isa} (LLMLOSS_CPU_ISA={isa})" in output
    assert "_C" in output
    assert {name for name, _ in info.facts()} >= {"CUDA kernels", "CUDA device", "llmloss train"}


def test_verify_passes(capsys):
    assert main(["verify"]) == 0
    output = capsys.readouterr().out
    assert "FAILED" not in output
    for name in (*verify.OPTIONS, *verify.STATISTICS, *verify.LINEAR_OPTIONS):
        assert name in output
    for kind in ("float32", "bfloat16", "float16", "float64"):
        assert kind in output


def test_verify_fails_on_a_wrong_gradient(capsys, monkeypatch):
    """A gradient that is off by a thousandth is noticed."""
    right = verify.cross_entropy

    def wrong(z, *args, **options):
        loss = right(z, *args, **options)
        return loss + (loss - loss.detach()) * 1e-3

    monkeypatch.setattr(verify, "cross_entropy", wrong)
    monkeypatch.setattr(verify, "OPTIONS", {"plain": {}, "peak": {"peak": 2.0}})
    assert main(["verify"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["verify", "--dtype", "x"], ["nothing"], ["info", "a\nb"], []])
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
@pytest.mark.parametrize("command", ["verify", "train"])
def test_a_device_that_is_not_there(capsys, command, tmp_path):
    argv = [command, "--device", "cuda"]
    if command == "train":
        if missing_packages():
            pytest.skip("the packages of the extra train are not installed")
        argv += ["--out", str(tmp_path)]
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


ROOT = Path(__file__).parents[1]


def imports_of(path: Path) -> set[str]:
    """What a module takes from llmloss_ext, by full name; relative imports are its package's."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if re.fullmatch(r"llmloss_ext(\.\w+)*", name)}


def is_public(name: str) -> bool:
    """Whether every part of a dotted name is in its module's ``__all__``."""
    found = importlib.import_module("llmloss_ext")
    for part in name.split(".")[1:]:
        if isinstance(found, ModuleType):
            if part not in found.__all__ and (found.__name__, part) != ("llmloss_ext", "cli"):
                return False
        elif part.startswith("_"):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize(
    "path", sorted((ROOT / "llmloss_train").glob("*.py")), ids=lambda p: p.stem
)
def test_the_demo_uses_the_public_interface_only(path):
    assert [name for name in imports_of(path) if not is_public(name)] == []


def test_the_check_of_the_public_interface_can_fail(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("""
import llmloss_ext, llmloss_ext.ops as ops
from llmloss_ext.losses.objective import Objective
from llmloss_ext.cli.main import main
from llmloss_train import missing_packages
x = llmloss_ext.functional.FLOATS
y = llmloss_ext.losses.dpo_loss
from llmloss_ext import cross_entropy
""")
    wrong = {"llmloss_ext.losses.objective.Objective", "llmloss_ext.cli.main.main",
             "llmloss_ext.functional.FLOATS"}  # fmt: skip
    assert {name for name in imports_of(path) if not is_public(name)} == wrong


@pytest.mark.parametrize("argv", [["train"], ["info"]])
def test_the_demo_says_what_it_lacks(capsys, monkeypatch, argv):
    """Without the packages of the extra ``train``: one line, and what to install."""
    import llmloss_train

    monkeypatch.setattr(llmloss_train, "_PACKAGES", ("numpy", "no_such_package"))
    assert main(argv) == (1 if argv == ["train"] else 0)
    output = "".join(capsys.readouterr())
    assert re.search(r"needs no_such_package: pip install 'llmloss_ext\[train\]'\n", output)


@pytest.mark.parametrize("argv", [["train"], ["info"], ["--help"]])
def test_the_library_without_the_demo(capsys, monkeypatch, argv):
    """Where only llmloss_ext is there, as when somebody has copied it."""

    class Nowhere:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "llmloss_train":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "llmloss_train"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    if argv == ["train"]:
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("llmloss: error: llmloss train needs the package llmloss_train")
        assert error.count("\n") == 1
    elif argv == ["info"]:
        assert main(argv) == 0
        assert re.search(r"llmloss train +not installed", capsys.readouterr().out)
    else:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert re.search(r"train +train a small GPT", capsys.readouterr().out)
