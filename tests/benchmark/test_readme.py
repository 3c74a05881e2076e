"""The committed results, their report and the README belong together."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from bench import curve, demo, readme
from llmloss_bench.results import Results
from llmloss_ext.cli.errors import UserError


@pytest.mark.parametrize("page", readme.PAGES)
def test_a_page_holds_the_committed_figures(page):
    assert page not in readme.outdated(), "run: python -m bench.readme"
    path = readme.ROOT / page
    for plot in re.findall(r"\(([\w./-]+\.svg)\)", path.read_text()):
        assert (path.parent / plot).exists()


def test_every_block_has_a_page():
    assert sorted(name for names in readme.PAGES.values() for name in names) == sorted(
        readme.BLOCKS
    )
    assert "bench/results/cpu/peers.svg" in (readme.ROOT / "docs" / "speed.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/speed.md"])
def test_a_figure_that_drifts_is_noticed(page):
    text = (readme.ROOT / page).read_text()
    results = Results.load(readme.CPU_RESULTS)
    for row in results.rows:
        ours = row.contenders["llmloss"]
        ours.seconds = [t * 2 for t in ours.seconds]
    assert readme.render(page, text, results) != text
    name = readme.PAGES[page][0]
    with pytest.raises(UserError, match="each of its blocks once"):
        readme.render(page, text.replace(f"bench:{name} ", "speed "), results)
    with pytest.raises(UserError, match="unknown block"):
        readme.render(page, text.replace(f"bench:{name} ", "bench:wishes "), results)


def test_figures_are_written_where_they_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", {"a.md": ("summary",), "b.md": ("demo",)})
    for page, (name,) in readme.PAGES.items():
        (tmp_path / page).write_text(f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->\n")
    assert readme.update() == ["a.md", "b.md"]
    assert "eager torch" in (tmp_path / "a.md").read_text()
    assert readme.update() == []
    (tmp_path / "b.md").write_text((tmp_path / "b.md").read_text().replace("minutes", "hours"))
    assert list(readme.outdated()) == ["b.md"]


def test_the_curve_is_that_of_its_data():
    text = (demo.KEPT.parent / curve.DATA).read_text()
    assert len(json.loads(text)["points"]) > 20
    plot = demo.KEPT.parent / curve.PLOT
    assert curve.digest(text) in plot.read_text()
    assert curve.digest(text) in curve.draw(text)
    assert "curve.svg" in (readme.ROOT / "docs" / "training-demo.md").read_text()


def test_the_demo_keeps_what_a_run_says(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "KEPT", tmp_path / "kept" / "summary.json")
    with pytest.raises(UserError, match="make demo"):
        demo.keep(tmp_path)
    losses = [{"kind": "linear", "loss": 7.1, "seconds": 0.5, "peak_bytes": 192 << 20}]
    summary = {"run": "2 layers", "steps": 180, "seconds": 133.6, "validation_loss": [11.81, 6.5],
               "losses": losses, "peak_bytes": 766 << 20, "micro_batch_tokens": 1024}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="metrics.jsonl"):
        demo.keep(tmp_path)
    records = [
        {"kind": "train", "step": 5, "loss": 11.5},
        {"kind": "validation", "step": 5, "loss": 11.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    demo.keep(tmp_path)
    kept = json.loads((tmp_path / "kept" / curve.DATA).read_text())
    assert kept["points"] == [["train", 5, 11.5], ["validation", 5, 11.25]]
    ET.parse(tmp_path / "kept" / curve.PLOT)
    text = demo.render()
    assert "180 steps in 2:14 minutes" in text
    # By the command, which then writes README.
    demo.KEPT.unlink()
    monkeypatch.setattr(readme, "update", list)
    assert readme.main(["--demo", str(tmp_path)]) == 0
    assert demo.render() == text
    with pytest.raises(SystemExit):
        readme.main(["--demo", str(tmp_path), "--check"])
    assert "(perplexity 134,592 to 665), 766 MiB at the peak" in text
    assert "| `linear` | 7.10000 | 500 ms | 192 MiB |" in text
