"""The model of the dense kernels' time: near what one H200 measured, and what it says of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmloss_ext import roofline
from llmloss_ext.chips import B200, CHIPS, H200
from llmloss_ext.cli.main import main

# Milliseconds by rows, columns, bytes of an element: forward, backward, fused in place.
MEASURED = {
    (8192, 32000, 2): (0.142, 0.2629, None),
    (8192, 50257, 2): (0.230, 0.4165, 0.539),
    (8192, 128256, 2): (0.484, 1.0194, 1.21),
    (8192, 262144, 2): (0.986, 2.0875, 2.48),
    (8192, 32000, 4): (0.256, 0.565, 0.644),
    (8192, 50257, 4): (0.399, 0.8665, 1.04),
    (8192, 128256, 4): (0.935, 2.169, 2.22),
    (1, 128256, 2): (0.0142, None, None),
    (16, 128256, 2): (0.0152, None, None),
    (128, 128256, 2): (0.0243, None, None),
}
WITHIN = 1 / 12


def predict(chip, rows: int, columns: int, element_bytes: int) -> list[roofline.Prediction]:
    plan = torch.ops.llmloss.launch_plan(rows, columns, element_bytes, *chip.limits)
    return roofline.predict(chip, plan, rows, columns, element_bytes)


@pytest.mark.parametrize("shape", MEASURED)
def test_predictions_are_near_what_was_measured(shape: tuple[int, int, int]) -> None:
    for predicted, measured in zip(predict(H200, *shape), MEASURED[shape], strict=True):
        if measured is not None:
            assert predicted.seconds * 1e3 == pytest.approx(measured, rel=WITHIN), predicted


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_more_work_takes_longer_and_none_beats_a_copy(chip, element_bytes: int) -> None:
    before = [0.0, 0.0, 0.0]
    for rows, columns in ((64, 4096), (1024, 32000), (8192, 32000), (8192, 262144)):
        predicted = predict(chip, rows, columns, element_bytes)
        assert [p.seconds for p in predicted] > before
        before = [p.seconds for p in predicted]
        assert all(0 < p.fraction < roofline.CALIBRATION.read_over_copy for p in predicted)


def test_what_limits_a_call_is_named() -> None:
    names = {p.name: p.limit for p in predict(H200, 8192, 128256, 2)}
    assert names == {"forward": "memory", "backward": "memory", "fused": "memory"}
    assert predict(H200, 1, 1000, 2)[0].limit == "starting"
    slow = H200._replace(clock=H200.clock / 3)
    assert predict(slow, 8192, 128256, 2)[0].limit == "MUFU"
    slow = H200._replace(clock=H200.clock / 5)
    assert predict(slow, 8192, 128256, 4)[0].limit == "issue"


def test_a_b200_waits_for_memory_before_its_exponentials() -> None:
    """Else a part of them would be worth computing as polynomials: docs/gpu-model.md."""
    for predicted in predict(B200, 8192, 128256, 2):
        assert predicted.limit == "memory"
    exponentials = 8192 * 128256 * roofline.REDUCE[2].mufu
    seconds = exponentials / (B200.multiprocessors * B200.clock * roofline.MUFU_RATE)
    assert seconds * 1e3 == pytest.approx(0.26, abs=0.005)  # as the page says


def test_what_a_factor_costs_in_place_is_what_the_page_says() -> None:
    text = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text()
    table = text.partition("## A factor of the loss, in place")[2].partition("\n## ")[0]
    said = [float(ms) for ms in re.findall(r"\| (\d\.\d+) \|$", table, re.M)]
    forward, backward, fused = (p.seconds * 1e3 for p in predict(H200, 8192, 128256, 2))
    again = 2 * 8192 * 128256 * 2 / H200.copy_bandwidth * 1e3
    assert said == pytest.approx([fused, fused + again, fused, forward + backward], rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "printed"), [("bfloat16", True), ("float32", True), ("float64", False)]
)
def test_info_prints_predictions(capsys: pytest.CaptureFixture[str], dtype: str, printed) -> None:
    assert main(["info", "--plan", "8192", "128256", dtype]) == 0
    out = capsys.readouterr().out
    assert ("prediction" in out) == printed
    for name, chip in CHIPS.items():
        found = [line for line in out.splitlines() if line.startswith(name)]
        assert len(found) == printed
        assert not printed or ("(estimated)" in found[0]) == (not chip.is_measured)
