"""The committed results, their report and the README belong together."""

from __future__ import annotations

import json
import re

import pytest

from bench import demo, readme
from llmloss_bench.results import Results
from llmloss_ext.cli.errors import UserError


def test_the_readme_holds_the_committed_figures():
    assert readme.is_current(), "run: python -m bench.readme"
    text = readme.README.read_text()
    for plot in re.findall(r"\((bench/results/[\w/-]+\.svg)\)", text):
        assert (readme.ROOT / plot).exists()
    assert "bench/results/cpu/peers.svg" in text


def test_a_figure_that_drifts_is_noticed():
    text = readme.README.read_text()
    results = Results.load(readme.CPU_RESULTS)
    ours = results.rows[0].contenders["llmloss"]
    ours.seconds = [t * 2 for t in ours.seconds]
    assert readme.render(text, results) != text
    with pytest.raises(UserError, match="each block once"):
        readme.render(text.replace("bench:speed", "speed"), results)
    with pytest.raises(UserError, match="unknown block"):
        readme.render(text.replace("bench:speed", "bench:wishes"), results)


def test_the_demo_keeps_what_a_run_says(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "KEPT", tmp_path / "kept" / "summary.json")
    with pytest.raises(UserError, match="make demo"):
        demo.keep(tmp_path)
    losses = [{"kind": "linear", "loss": 7.1, "seconds": 0.5, "peak_bytes": 192 << 20}]
    summary = {"steps": 180, "seconds": 133.6, "validation_loss": [11.81, 6.5], "losses": losses,
               "peak_bytes": 766 << 20, "micro_batch_tokens": 1024}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    demo.keep(tmp_path)
    text = demo.render()
    assert "180 steps in 2:14 minutes" in text
    # By the command, which then writes README.
    demo.KEPT.unlink()
    monkeypatch.setattr(readme, "update", lambda: False)
    assert readme.main(["--demo", str(tmp_path)]) == 0
    assert demo.render() == text
    with pytest.raises(SystemExit):
        readme.main(["--demo", str(tmp_path), "--check"])
    assert "(perplexity 134,592 to 665), 766 MiB at the peak" in text
    assert "| `linear` | 7.10000 | 500 ms | 192 MiB |" in text
