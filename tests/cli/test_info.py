"""llmloss info, with the launch plan of a size."""

from __future__ import annotations

import pytest
import torch

from llmloss_ext.cli import info
from llmloss_ext.cli.main import main


def test_info(capsys, isa):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert f"{isa} (LLMLOSS_CPU_ISA={isa})" in output
    assert "_C" in output
    assert {name for name, _ in info.facts()} >= {"CUDA kernels", "CUDA device", "llmloss train",
                                                 "llmloss eval"}  # fmt: skip


def test_info_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--plan", "8192", "128256", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "8,192 x 128,256 bfloat16 on " in out
    assert "fused: " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["8192", "many", "bfloat16"], "must be integers"),
        (["8192", "0", "bfloat16"], "columns >= 1"),
        (["8192", "128256", "int8"], "must be one of"),
        (["8192", str(1 << 31), "bfloat16"], "too many columns"),
    ],
)
def test_a_wrong_plan_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
