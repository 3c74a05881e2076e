"""A peer that is missing or fails is told, and keeps nobody from being measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.nn.functional as F

from llmloss_bench import contenders as table
from llmloss_bench import peers
from llmloss_bench.cases import Case
from llmloss_bench.contenders import Contender
from llmloss_bench.report.tables import missing

from .runs import DENSE, measured


def test_a_peer_that_fails_is_reported(tmp_path, monkeypatch):
    def broken(case: Case):
        def loss(*tensors):
            raise RuntimeError("no kernel image\nand more")

        return loss

    monkeypatch.setitem(table.DENSE, "liger", Contender("liger", broken))
    monkeypatch.setattr(peers, "PACKAGES", {})
    results = measured(tmp_path, [DENSE])
    liger = results.rows[0].contenders["liger"]
    assert (liger.status, liger.reason) == ("failed", "RuntimeError: no kernel image")
    assert results.rows[0].contenders["llmloss"].seconds
    assert "liger: failed" in "\n".join(missing(results))


def test_a_missing_peer_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PACKAGES", {"liger": ("liger-kernel", "no_such_module")})
    results = measured(tmp_path, [replace(DENSE, passes="forward")])
    assert "liger" not in results.rows[0].contenders
    assert results.peers["liger"].startswith("not measured: ModuleNotFoundError")
    assert "liger: not measured" in "\n".join(missing(results))


def test_a_peer_without_the_option_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.setitem(table.DENSE, "quack", Contender("quack", table._peer(_needs_no_option)))
    monkeypatch.setattr(peers, "PACKAGES", {})
    monkeypatch.setattr(table, "_NOT_COMPARED", set())
    results = measured(tmp_path, [replace(DENSE, option="softcap")])
    quack = results.rows[0].contenders["quack"]
    assert (quack.status, quack.reason) == ("unsupported", "no softcap")


def _needs_no_option(settings):
    peers._named(settings)
    return F.cross_entropy


def test_peers_get_the_options_by_their_own_names():
    assert peers._named({"z_loss": 0.5}, z_loss="lse_square_scale") == {"lse_square_scale": 0.5}
    with pytest.raises(peers.UnknownOptionError):
        peers._named({"entropy": 0.5}, z_loss="lse_square_scale")
