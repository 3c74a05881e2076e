"""Training, evaluation and the benchmark are packages over the public API, found on demand."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmloss_ext.cli.main import main

ROOT = Path(__file__).parents[2]
_PUBLIC = (("llmloss_ext", "cli"), ("llmloss_ext", "integrations"), ("llmloss_ext", "tolerances"))
"""What is imported by name only."""


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
            at = (found.__name__, part)
            in_all = part in getattr(found, "__all__", [])
            if not in_all and at not in _PUBLIC and found.__name__ != "llmloss_ext.integrations":
                return False
        elif part.startswith("_"):
            return False
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")  # not imported by its package
        found = getattr(found, part)
    return True


SOURCES = [
    path
    for name in ("bench", "eval", "train")
    for path in sorted((ROOT / f"llmloss_{name}").rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_commands_use_the_public_interface_only(path):
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


WORDS = {"train": [], "eval": ["model", "text"], "bench": ["report", "nowhere"]}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("asks", [False, True], ids=["itself", "info"])
def test_a_command_says_what_it_lacks(capsys, monkeypatch, name, asks):
    """Without the packages of its extra: one line, and what to install."""
    package = importlib.import_module(f"llmloss_{name}")
    monkeypatch.setattr(package, "_PACKAGES", ("numpy", "no_such_package"))
    assert main(["info"] if asks else [name, *WORDS[name]]) == (0 if asks else 1)
    output = "".join(capsys.readouterr())
    assert re.search(rf"needs no_such_package: pip install 'llmloss_ext\[{name}\]'\n", output)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("asks", ["itself", "info", "--help"])
def test_the_library_without_a_command(capsys, monkeypatch, name, asks):
    """Where only llmloss_ext is there, as when somebody has copied it."""

    class Nowhere:
        @staticmethod
        def find_spec(found, path=None, target=None):
            if found == f"llmloss_{name}":
                raise ModuleNotFoundError(f"No module named {found!r}", name=found)

    for module in [m for m in sys.modules if m.partition(".")[0] == f"llmloss_{name}"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    if asks == "itself":
        assert main([name, *WORDS[name]]) == 1
        error = capsys.readouterr().err
        begins = f"llmloss: error: llmloss {name} needs the package llmloss_{name}"
        assert error.startswith(begins)
        assert error.count("\n") == 1
    elif asks == "info":
        assert main(["info"]) == 0
        assert re.search(rf"llmloss {name} +not installed", capsys.readouterr().out)
    else:
        with pytest.raises(SystemExit) as stop:
            main([asks])
        assert stop.value.code == 0
        summaries = {
            "train": "train a small GPT",
            "eval": "evaluate a model",
            "bench": "time the losses",
        }
        summary = summaries[name]
        assert re.search(rf"{name} +{summary}", capsys.readouterr().out)
