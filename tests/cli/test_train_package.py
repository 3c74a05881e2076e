"""The training demo is a package of its own, over the public API, and found on demand."""

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
