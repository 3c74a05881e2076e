"""Results are written, read, and refused when damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmloss_bench import machine
from llmloss_bench.results import FILE, Ceiling, Measurement, Results, Row
from llmloss_ext.cli.errors import UserError

from .runs import DENSE, LINEAR, measured


def test_results_are_written_and_read(tmp_path):
    results = measured(tmp_path, [DENSE, LINEAR])
    again = Results.load(tmp_path)
    assert again.complete
    assert [row.case for row in again.rows] == [DENSE, LINEAR]
    for row, other in zip(results.rows, again.rows, strict=True):
        ours, theirs = row.contenders["llmloss"], other.contenders["llmloss"]
        assert theirs.median == pytest.approx(ours.median, rel=1e-3)
        assert theirs.gradient_error == pytest.approx(ours.gradient_error, rel=1e-2)
        assert set(row.ceilings) == set(other.ceilings)
        assert other.share_of_ceiling() == pytest.approx(row.share_of_ceiling(), rel=1e-2)
    assert set(again.rows[0].ceilings) == {"copy", "read"}


def test_the_share_of_the_ceiling():
    """Of made-up times: a loss may take as long as the machine needs to move its bytes."""
    size = DENSE.logits_bytes
    ceilings = {"copy": Ceiling([2e-3], bytes=2 * size), "read": Ceiling([1e-3], bytes=size)}
    row = Row(DENSE, {"llmloss": Measurement(seconds=[6e-3])}, ceilings)
    assert row.share_of_ceiling() == pytest.approx(1 / 3)
    forward = replace(DENSE, passes="forward")
    assert replace(row, case=forward).share_of_ceiling() == pytest.approx(1 / 6)
    products = {"products/8": Ceiling([1e-3], flops=LINEAR.flops // 2)}
    row = Row(LINEAR, {"llmloss": Measurement(seconds=[4e-3])}, products)
    assert row.share_of_ceiling() == pytest.approx(1 / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result"),
        ('{"schema": 1}', "is not a result"),
        ('{"schema": 2, "rows": [{"case": {}}]}', "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / FILE
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        Results.load(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        Results.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: other\n",
            "AMD EPYC",
        ),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n\nCPU part\t: 0xd40", "0x41 0xd4f"),
        ("processor\t: 0\n", ""),
        ("", ""),
    ],
)
def test_the_name_of_a_cpu(info, name):
    found = machine.cpu_named_in(info)
    assert found.endswith(name)
    assert bool(found) == bool(name)
