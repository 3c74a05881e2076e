"""The inputs: cold, confident and ignored where asked for."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmloss_bench import inputs
from llmloss_bench.contenders import make_inputs

from .runs import DENSE


def test_logits_are_cold_and_whole_again():
    made = make_inputs(DENSE)
    assert len(made._sets) * DENSE.logits_bytes >= 2 * inputs.last_level_cache()
    assert len(make_inputs(replace(DENSE, warm=True))._sets) == 1
    few = make_inputs(replace(DENSE, warm=True))
    for _ in range(3):
        arguments = few.overwritable()
        assert torch.equal(arguments, few.logits)
        with torch.no_grad():
            arguments.detach().fill_(7.0)
    assert torch.equal(few.next(), few.logits)


def test_some_rows_are_confident_and_the_asked_share_is_ignored():
    made = make_inputs(replace(DENSE, ignored=0.25))
    assert int((made.target == -100).sum()) == 12
    whole = make_inputs(DENSE)
    p = torch.softmax(whole.logits.double(), -1)[0, whole.target[0]]
    assert 0.98 < float(p) < 0.995  # 0.99 in the mean over draws
