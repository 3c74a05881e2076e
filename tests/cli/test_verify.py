"""llmloss verify."""

from __future__ import annotations

from llmloss_ext.cli import verify
from llmloss_ext.cli.main import main


def test_verify_passes(capsys):
    assert main(["verify"]) == 0
    output = capsys.readouterr().out
    assert "FAILED" not in output
    for name in (*verify.OPTIONS, *verify.STATISTICS, *verify.LINEAR_OPTIONS):
        assert name in output
    for kind in ("float32", "bfloat16", "float16", "float64"):
        assert kind in output


def test_verify_fails_on_a_wrong_gradient(capsys, monkeypatch):
    """A gradient that is off by a thousandth is noticed."""
    right = verify.cross_entropy

    def wrong(z, *args, **options):
        loss = right(z, *args, **options)
        return loss + (loss - loss.detach()) * 1e-3

    monkeypatch.setattr(verify, "cross_entropy", wrong)
    monkeypatch.setattr(verify, "OPTIONS", {"plain": {}, "peak": {"peak": 2.0}})
    assert main(["verify"]) == 1
    assert "FAILED" in capsys.readouterr().out
