"""The command: what it prints, what it refuses."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from llmloss_bench import peers, terminal
from llmloss_bench.results import FILE, Measurement, Results, Row
from llmloss_bench.run import Runner
from llmloss_ext.cli.main import main

from .runs import replaced, scaled


def test_the_command_fails_where_this_library_is_wrong(tmp_path, monkeypatch, capsys):
    replaced(monkeypatch, "llmloss", scaled(1.01, 1.0))
    command = ["bench", "run", "--only", "forward, 8 x 1000", "--rounds", "1", "--no-memory"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "llmloss is wrong" in capsys.readouterr().err


def test_an_interrupted_run_leaves_results_and_report(tmp_path, monkeypatch, capsys):
    def interrupted(self, case, progress):
        if case.has_backward:
            raise KeyboardInterrupt
        return Row(case, {"llmloss": Measurement(seconds=[1e-3])})

    monkeypatch.setattr(Runner, "_measure", interrupted)
    assert main(["bench", "run", "--only", "8 x 1000", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(Results.load(tmp_path).rows) == 1
    assert "interrupted" in (tmp_path / "report.html").read_text()


def test_without_rich_and_matplotlib_there_are_results_all_the_same(tmp_path, monkeypatch, capsys):
    """As on a machine that has torch and little else."""
    monkeypatch.setattr(terminal, "_HAS_RICH", False)
    for name in ("rich", "matplotlib", "matplotlib.pyplot", "llmloss_bench.report.page",
                 "llmloss_bench.report.plots"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
    command = ["bench", "run", "--only", "forward, 8 x 1000", "--rounds", "1", "--no-memory"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "[1/1] forward, 8 x 1000, float32, warm" in printed
    assert "| forward, 8 x 1000, float32, warm |" in printed
    assert "report   not made: " in printed
    assert Results.load(tmp_path).complete


def test_the_whole_command(tmp_path, capsys):
    command = ["bench", "run", "--only", "forward+backward, 8 x 1000", "--rounds", "2",
               "--no-memory", "--out", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "forward+backward, 8 x 1000, float32, warm" in printed
    for name in (FILE, "report.html", "report.md"):
        assert (tmp_path / name).stat().st_size > 100
    assert json.loads((tmp_path / FILE).read_text())["settings"]["rounds"] == 2
    assert main(command) == 1  # the results are there
    assert "--overwrite" in capsys.readouterr().err


SHAPE = ["bench", "--vocab", "500", "--tokens", "32", "--dtype", "float32", "--device", "cpu"]


def test_a_shape_of_ones_own(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "PACKAGES", {"liger": ("liger-kernel", "no_such_module")})
    options = ["--hidden", "16", "--rounds", "2", "--peers", "torch,torch chunked"]
    assert main([*SHAPE, *options]) == 0
    printed = capsys.readouterr().out
    assert "Forward and backward, N 32, D 16, V 500, float32" in printed
    for name in ("llmloss, from hidden states", "torch chunked, from hidden states",
                 "llmloss inplace, from logits", "torch, from logits"):  # fmt: skip
        (line,) = (line for line in printed.splitlines() if name in line)
        if "unsupported" not in line:  # torch chunked, by an older torch
            assert re.search(r" [\d.,]+ ms .* [\d.]+ MiB .* \d+% .* \de-\d\d", line), line
    assert "liger: not measured" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_shape_without_hidden_states(capsys):
    assert main([*SHAPE, "--rounds", "1", "--peers", "none", "--no-memory"]) == 0
    printed = capsys.readouterr().out
    assert "N 32, V 500" in printed
    assert "llmloss, from logits" in printed
    assert "hidden states" not in printed
    assert "torch" not in printed
    assert "MiB" not in printed


@pytest.mark.parametrize("hidden", [[], ["--hidden", "8"]])
def test_a_report_of_a_shape(capsys, tmp_path, hidden):
    """It has curves up to the shape, over V and over N, and keeps what was there."""
    out = tmp_path / "out"
    command = [
        *SHAPE,
        *hidden,
        "--rounds",
        "1",
        "--no-memory",
        "--peers",
        "torch",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"report   {out / 'report.html'}" in printed
    assert printed.count("torch, from ") == 1 + len(hidden) // 2  # the shape alone
    results = Results.load(out)
    for figure, size, wanted in (
        ("V", lambda case: case.columns, [7, 31, 125, 500]),
        ("N", lambda case: case.rows, [1, 2, 8, 32]),
    ):
        rows = list(results.of_figure(figure))
        assert [size(row.case) for row in rows] == wanted
        assert all(row.contenders["torch"].median for row in rows)
        assert all(row.case.is_linear == bool(hidden) for row in rows)
    assert {"scaling-v.svg", "scaling-n.svg"} <= {path.name for path in out.iterdir()}
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_shape_in_which_this_library_is_wrong(capsys, monkeypatch):
    replaced(monkeypatch, "llmloss", scaled(1.01, 1.0))
    assert main([*SHAPE, "--rounds", "1", "--peers", "none", "--no-memory"]) == 1
    captured = capsys.readouterr()
    assert "wrong" in captured.out
    assert captured.err.startswith("llmloss: error: llmloss is wrong or failed: forward+backward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab", "8"], "or a shape: --vocab and --tokens"),
        (["--vocab", "8", "run", "--list"], "--vocab before run"),
        (["--no-memory", "report", "nowhere"], "--no-memory before report"),
        (["--vocab", "8", "--tokens", "8", "--peers", "megatron"], "unknown contenders: megatron"),
        (["--vocab", "8", "--tokens", "8", "--device", "meta"], "--device must be cpu or cuda"),
        (["--vocab", "999999", "--tokens", "999999", "--device", "cpu"], "GiB: lower --tokens"),
        (["--vocab", "8", "--tokens", "8", "--overwrite"], "--overwrite needs --out"),
        (["--overwrite", "report", "nowhere"], "--overwrite before report"),
        (["run", "--only", "no such case"], "no case of the suite"),
        (["run", "--peers", "megatron"], "unknown contenders"),
        ([], "needs a command (run, report, compare, trainer), or a shape"),
        (["report", "nowhere"], "cannot read"),
        (["compare", "nowhere", "nowhere"], "cannot read"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_list_of_cases(capsys):
    assert main(["bench", "run", "--suite", "cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "linear, forward+backward, 2048 x 768 x 50257, bfloat16, 75% ignored" in printed
