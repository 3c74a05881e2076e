"""The table of docs/losses.md is complete and true, and the examples run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmloss_ext

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "losses.md"
LIST = ROOT / "tests" / "losses_list.txt"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def table_rows(path: Path) -> list[list[str]]:
    """The cells of every table row but the heads."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [c for c in cells if c[0] not in ("name", "what") and not set(c[0]) <= {"-"}]


ROWS = table_rows(TABLE)


def attribute(name: str) -> object:
    found: object = llmloss_ext
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_every_row_of_the_list_is_there():
    """What the project set out to have: a row that is lost, or renamed, is noticed."""
    wanted = LIST.read_text().splitlines()
    assert len(wanted) > 30
    assert [row[0] for row in ROWS] == wanted


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_what_exists(row):
    _, functions, tests, example = row
    names = re.findall(r"`([\w.]+)`", functions)
    assert names
    for name in names:
        if name != "clip_grad_norm_":  # torch's
            assert callable(attribute(name)), name
            assert (attribute(name).__doc__ or "").strip()
    files = re.findall(r"`([\w/]*test_\w+\.py)`", tests)
    assert files
    sources = "".join((ROOT / "tests" / file).read_text() for file in files)
    known = [name.split(".")[-1].removeprefix("clip_").rstrip("_") for name in names]
    assert any(name in sources for name in known)
    for file in re.findall(r"`(\w+\.py)`", example):
        shown = (ROOT / "examples" / file).read_text()
        assert any(name.split(".")[-1] in shown for name in names)


def test_every_public_function_is_in_the_table():
    text = TABLE.read_text()
    public = [f"losses.{name}" for name in llmloss_ext.losses.__all__]
    public += [f"metrics.{name}" for name in llmloss_ext.metrics.__all__]
    public += [f"training.{name}" for name in llmloss_ext.training.__all__]
    results = {"losses.Advantages", "losses.CombinedLoss", "losses.LossStats", "losses.PolicyLoss",
               "losses.PolicyMetrics", "losses.PreferenceLoss", "losses.UnpairedLoss",
               "losses.ValueLoss",
               "losses.next_token_targets", "losses.BalancedLoss",
               "losses.DiscriminatorLoss", "losses.DistillationLoss", "losses.GeneratorLoss",
               "losses.GradNormLoss",
               "losses.GumbelEmbeddings", "losses.MultiTokenLoss",
               "losses.PolicyGradientLoss", "losses.SampledKL"}  # fmt: skip
    assert [name for name in public if f"`{name}`" not in text and name not in results] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_runs(path):
    of_others = r"^(?:from|import) (transformers|lightning|trl)\b"
    for package in re.findall(of_others, path.read_text(), re.MULTILINE):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, check=False,
        timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = {
        "adversarial": r"softmax +distance 0\.[67]\d -> 0\.[2-4]\d.*\n.*0\.[67]\d -> 0\.[2-4]\d",
        "clip": r"of 256 unseen pairs, (9\d|100)%",
        "distillation": r"student: [\d,]+ parameters, cross entropy 0\.0.*\n.*\n.* samples 0\.0",
        "dpo": r"prefers downwards for (9\d|100)%",
        "drop_in": r"step  59  loss [01]\.",
        "evaluate_text": r"top-10 accuracy",
        "gradient_accumulation": r"error with num_items +\d\.\de-1\d",
        "grpo": r"step 100  reward (?:0\.9|1\.0)\d.*\n.*4 3 2 1 0 8 .*\n.*rightly from [78] of 8",
        "hugging_face": r"kept for backward: [\d.]{3} and \d{3}\.\d MiB",
        "lightning_module": r"with num_items +: off by \d\.\de-0[678] of that",
        "options": r"F1 of two texts +0\.8571",
        "packed_documents": r"position_ids .*loss (\d\.\d{6})\n.*\1\n.*\1\n[\s\S]*219 of 224",
        "preference": r"accuracy [1-4]?\d%\n(\w+ .*(9\d|100)%\n){3}",
        "pretraining": r"step  90 .* is a spike: skipped\n.*\nstep 119  next 0\.",
        "tensor_parallel": r"same bits: True\n.*(\d\.\d{3})\d\d  one device \1",
        "trl_grpo": r"step 15  reward 0\.9\d.*\nlargest difference in 16 steps: \d\.\de-0[4-7]",
    }
    assert re.search(wanted[path.stem], done.stdout), done.stdout


def test_an_example_says_what_it_lacks(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    command = [sys.executable, str(ROOT / "examples" / "evaluate_text.py"), str(short)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "is too short: 9 bytes" in done.stderr
