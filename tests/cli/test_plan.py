"""llmloss plan."""

from __future__ import annotations

from llmloss_ext.cli import main


def test_the_command(capsys):
    assert main.main(["plan", "8192", "4096", "128256"]) == 0
    out = capsys.readouterr().out
    assert "3 of 8,192 x 4,096 x 128,256" in out
    assert "peak beyond inputs" in out
    assert main.main(["plan", "8192", "4096", "128256", "--max-chunk-bytes", "10"]) == 1
    assert "the logits of one token" in capsys.readouterr().err
