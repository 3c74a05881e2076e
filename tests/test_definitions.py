"""What stands in one place agrees with what mirrors it: signatures, documentation, C++ structs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.nn.functional as F

import llmloss_ext
from llmloss_ext import composite, losses, nn
from llmloss_ext.integrations import transformers
from llmloss_ext.ops.library import MEAN_DENOMINATOR, STATE, fields
from llmloss_ext.options import OPTIONS, LogitOptions, LossOptions, pack, unpack
from llmloss_ext.sequences import Sequences
from llmloss_ext.statistics import STATISTICS, FloatStats, RowStats, TokenStats, asked, is_asked

FUNCTIONS = [
    llmloss_ext.cross_entropy,
    llmloss_ext.token_stats,
    llmloss_ext.linear_cross_entropy,
    llmloss_ext.linear_token_stats,
    llmloss_ext.linear_log_probs,
]
NOT_OPTIONS = {"input", "target", "linear_weight", "options"}
TORCHS_ORDER = (
    "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
)  # fmt: skip
SHIFTS = {"shift", *Sequences._fields}
# Torch's F.linear_cross_entropy has None, which means -100.
OTHER_DEFAULTS = {("linear", "ignore_index"): None}


def names_of(function):
    return [name for name in inspect.signature(function).parameters if name not in NOT_OPTIONS]


def kind(function):
    return "linear" if "linear" in function.__name__ else "dense"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_signatures_are_those_of_the_definitions(function):
    for name in names_of(function):
        parameter = inspect.signature(function).parameters[name]
        default = OTHER_DEFAULTS.get((kind(function), name), OPTIONS[name].default)
        assert parameter.default == default, name
        wanted = OPTIONS[name].type
        if default is None and "None" not in wanted:
            wanted += " | None"
        assert parameter.annotation == wanted, name
        is_torchs = function is llmloss_ext.cross_entropy and name in TORCHS_ORDER
        kinds = inspect.Parameter
        assert parameter.kind is (kinds.POSITIONAL_OR_KEYWORD if is_torchs else kinds.KEYWORD_ONLY)


@pytest.mark.parametrize("ours", [llmloss_ext.cross_entropy, nn.CrossEntropyLoss])
def test_positional_arguments_are_torchs(ours):
    theirs = F.cross_entropy if inspect.isfunction(ours) else torch.nn.CrossEntropyLoss
    ordered = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(ours).parameters)[: len(ordered)] == ordered
    assert set(TORCHS_ORDER) <= set(ordered)


OF_LOSSES = [
    losses.linear_gumbel_embeddings,
    losses.multi_token_prediction_loss,
    losses.unlikelihood_loss,
    llmloss_ext.linear_distillation_loss,
    losses.cosine_distillation_loss,
    losses.distillation_loss,
    losses.hard_soft_distillation_loss,
    losses.linear_selected_log_probs,
    losses.sampled_reverse_kl,
    losses.selected_log_probs,
    losses.top_k_distillation_loss,
]


@pytest.mark.parametrize(
    "function", [*FUNCTIONS, llmloss_ext.linear_kl_div, *OF_LOSSES], ids=lambda f: f.__name__
)
def test_help_describes_every_argument(function):
    text = inspect.getdoc(function)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    described = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
    assert sorted(described) == sorted(inspect.signature(function).parameters)
    assert all(len(line) <= 100 for line in function.__doc__.splitlines())


def test_what_a_function_of_the_whole_has_a_function_of_hidden_states_has():
    dense, linear = (set(names_of(f)) for f in (FUNCTIONS[0], FUNCTIONS[2]))
    # The classes of a projection are where they are, and torch's has no deprecated options.
    assert dense - linear == {"inplace", "class_dim", "size_average", "reduce"}
    assert set(names_of(FUNCTIONS[1])) - set(names_of(FUNCTIONS[3])) == {"class_dim"}


def test_every_function_that_shifts_knows_the_sequences():
    for function in FUNCTIONS:
        assert SHIFTS & set(names_of(function)) in (set(), SHIFTS)
    shifting = [losses.next_token_targets, losses.causal_lm_loss, transformers.causal_lm_loss]
    for function in (*shifting, losses.LanguageModelLoss.compute_loss, *FUNCTIONS[2:]):
        assert set(Sequences._fields) <= set(inspect.signature(function).parameters), function
    for function in (transformers.causal_lm_loss, losses.causal_lm_loss):
        assert "token_weight" in inspect.signature(function).parameters


def test_every_option_is_somebodys():
    assert set(OPTIONS) == {name for function in FUNCTIONS for name in names_of(function)}


@pytest.mark.parametrize("name", LossOptions._fields)
def test_an_option_of_the_loss_is_offered_wherever_there_is_one(name):
    takers = [FUNCTIONS[0], FUNCTIONS[2], nn.CrossEntropyLoss, nn.LinearCrossEntropyLoss]
    if name != "reduction":
        takers.append(losses.LanguageModelLoss)
    for taker in (*takers, llmloss_ext.parallel.cross_entropy):
        assert name in inspect.signature(taker).parameters, taker


@pytest.mark.parametrize("name", [f.__name__ for f in FUNCTIONS])
def test_parallel_has_the_same_functions(name):
    ordinary = set(inspect.signature(getattr(llmloss_ext, name)).parameters)
    over_ranks = set(inspect.signature(getattr(llmloss_ext.parallel, name)).parameters)
    assert over_ranks - ordinary == {"group", "vocab_start", "sum_input_grad"}
    assert ordinary - over_ranks == {"shard"}


def test_options_are_packed_in_the_order_of_the_kernels():
    assert fields("logit_floats") + fields("logit_ints") == LogitOptions._fields
    assert fields("loss_floats") + fields("loss_ints") == LossOptions._fields
    logits = LogitOptions(*range(1, 1 + len(LogitOptions._fields)))
    loss = LossOptions(*range(11, 11 + len(LossOptions._fields)))
    floats, ints = pack(logits, loss)
    by_name = logits._asdict() | loss._asdict()
    assert floats == tuple(by_name[n] for n in (*fields("logit_floats"), *fields("loss_floats")))
    assert ints == tuple(by_name[n] for n in (*fields("logit_ints"), *fields("loss_ints")))
    assert unpack(floats, ints) == (logits, loss)
    assert pack(logits) == (
        floats[: len(fields("logit_floats"))],
        ints[: len(fields("logit_ints"))],
    )


def test_statistics_are_those_of_the_kernels():
    assert fields("statistics") == STATISTICS
    assert fields("float_statistics") == FloatStats._fields
    assert set(TokenStats._fields) == set(STATISTICS)
    assert set(fields("shard")) >= {*STATE, *FloatStats._fields, "has_target", "argmax", "columns"}
    for name in STATISTICS:
        assert [is_asked(asked([name]), n) for n in STATISTICS] == [n == name for n in STATISTICS]


def test_a_denominator_has_the_numbers_of_the_kernels():
    loss, ones = LossOptions(z_loss=0.1), torch.ones(2)
    assert len(composite.denominator(2 * ones, ones, loss)) == len(MEAN_DENOMINATOR)
    of_items = composite.items_denominator(torch.tensor(3.0), torch.float32)
    assert dict(zip(MEAN_DENOMINATOR, of_items.tolist(), strict=True)) == {
        "value": 3.0, "z_factor": 1.0,
    }  # fmt: skip


def test_results_come_back_as_they_were():
    results = tuple(range(1 + len(STATISTICS)))
    assert RowStats.of(results).results() == results
