"""``llmloss bench trainer``."""

from __future__ import annotations

import json

import pytest

from llmloss_ext.cli.main import main

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.mark.slow
def test_every_contender_trains_alike(tmp_path, capsys):
    sizes = ("--vocab", "64", "--hidden", "16", "--layers", "1", "--tokens", "8", "--steps", "2")
    assert main(["bench", "trainer", *sizes, "--rounds", "1", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "trainer.json").read_text())
    assert stored["sizes"]["vocab"] == 64
    for measured in stored["runs"].values():
        assert measured[0]["seconds"] > 0
        assert len(measured[0]["losses"]) == 2
    shown = capsys.readouterr().out
    for name in ("transformers", "causal_lm_loss", "use_linear_cross_entropy"):
        assert name in shown
