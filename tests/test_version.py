"""The version is written once; what repeats it says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llmloss_ext
from llmloss_ext.cli.main import main

ROOT = Path(__file__).parent.parent


def test_version(capsys):
    assert re.fullmatch(r"\d+\.\d+\.\d+", llmloss_ext.__version__)
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"llmloss {llmloss_ext.__version__}\n"


def test_other_files_say_the_same():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == llmloss_ext.__version__
    released = re.findall(
        r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert not released or released[0] == llmloss_ext.__version__


def test_the_metadata_take_it_from_there():
    setuptools = pytest.importorskip("setuptools")
    from setuptools.config.pyprojecttoml import apply_configuration

    distribution = apply_configuration(setuptools.Distribution(), str(ROOT / "pyproject.toml"))
    assert distribution.get_version() == llmloss_ext.__version__
