"""A run: wrong results get no speed, and nothing that was measured is lost."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from llmloss_bench import contenders as table
from llmloss_bench.cases import Case
from llmloss_bench.report.tables import missing, tables
from llmloss_bench.results import FILE, Results
from llmloss_bench.run import Runner
from llmloss_ext.cli.errors import UserError
from llmloss_ext.linear import cpu_products

from .runs import DENSE, LINEAR, PREFERENCE, TRAINING, measured, replaced, scaled


@pytest.mark.parametrize("case", [DENSE, LINEAR, PREFERENCE, TRAINING])
@pytest.mark.parametrize(("value", "gradient"), [(1.001, 1.0), (1.0, 1.001), (1.0, float("nan"))])
def test_a_wrong_kernel_gets_no_speed(tmp_path, monkeypatch, case, value, gradient):
    if case is TRAINING:
        pytest.importorskip("transformers")
    replaced(monkeypatch, "llmloss", scaled(value, gradient))
    results = measured(tmp_path, [case])
    ours = results.rows[0].contenders["llmloss"]
    assert ours.status == "wrong"
    assert ours.seconds == []
    assert results.rows[0].contenders["torch"].seconds
    assert results.rows[0].times_faster("torch") is None
    assert results.rows[0].share_of_ceiling() is None
    times = tables(results)[0]
    assert times.rows[0][times.columns.index("llmloss")] == "wrong"
    assert any("llmloss: wrong" in line for line in missing(results))


def test_a_wrong_row_is_seen_among_right_ones(tmp_path, monkeypatch):
    """As a bfloat16 softmax less 1 is wrong: where the target is almost certain."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.view_as(logits)

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0] *= 1.3
            return grad

    def make(case: Case):
        return lambda logits, target: table.ours(case)(Spoilt.apply(logits), target)

    replaced(monkeypatch, "llmloss", make)
    assert measured(tmp_path, [DENSE]).rows[0].contenders["llmloss"].status == "wrong"


def test_what_was_measured_before_an_interruption_is_there(tmp_path, monkeypatch):
    runner = Runner("quick", 1, tmp_path, set(), with_memory=False)
    one = runner._measure(DENSE, lambda line, share: None)

    def interrupted(case, progress):
        if case is LINEAR:
            raise KeyboardInterrupt
        return one

    monkeypatch.setattr(runner, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run([DENSE, LINEAR])
    found = Results.load(tmp_path)
    assert [row.case for row in found.rows] == [DENSE]
    assert not found.complete


def test_earlier_results_are_not_overwritten(tmp_path):
    (tmp_path / FILE).write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        Runner("quick", 1, tmp_path)
    assert (tmp_path / FILE).read_text() == "precious"
    Runner("quick", 1, tmp_path, overwrite=True)
    assert Results.load(tmp_path).rows == []


def test_a_package_that_a_step_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    results = measured(tmp_path, [TRAINING, DENSE])
    assert results.complete
    assert results.rows[0].contenders["llmloss"].status == "unsupported"
    assert "transformers is not installed" in "\n".join(missing(results))
    assert results.rows[1].contenders["llmloss"].seconds


def test_an_unknown_contender_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown contenders: megatron"):
        Runner("quick", 1, tmp_path, wanted={"megatron"})
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("has_products", [False, True])
def test_what_torch_would_emulate_for_minutes_is_left_out(tmp_path, monkeypatch, has_products):
    monkeypatch.setattr(cpu_products, "has_products_of", lambda dtype: has_products)
    monkeypatch.setattr(table, "_MOST_EMULATED_FLOPS", 1e5)
    results = measured(tmp_path, [replace(LINEAR, dtype="bfloat16")])
    found = results.rows[0].contenders
    assert found["llmloss"].status == "ok"
    torchs = found["torch"]
    assert (torchs.status != "unsupported") == has_products
    assert has_products or "emulates products of bfloat16" in torchs.reason
    assert results.rows[0].ceilings  # of float32 products where there are no others
