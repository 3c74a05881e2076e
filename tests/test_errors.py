"""Bad input: a clear error of the kind torch users know, in the same words as what they typed."""

from __future__ import annotations

import pytest
import torch

from llmloss_ext import cross_entropy, token_stats
from llmloss_ext.options import MEAN, LogitOptions, LossOptions, pack

INPUT = torch.randn(4, 9)
TARGET = torch.tensor([0, 1, 2, 3])

CASES = [
    ({"reduction": "avg"}, ValueError, "'avg' is not a valid value for reduction"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0.0 and 1.0"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0.0 and 1.0"),
    ({"label_smoothing": float("nan")}, ValueError, "label_smoothing"),
    ({"z_loss": -1.0}, ValueError, "z_loss must be"),
    ({"z_loss": float("inf")}, ValueError, "z_loss must be"),
    ({"focal_gamma": -1.0}, ValueError, "focal_gamma must be"),
    ({"focal_gamma": float("nan")}, ValueError, "focal_gamma must be"),
    ({"softcap": 0.0}, ValueError, "softcap must be"),
    ({"softcap": -30.0}, ValueError, "softcap must be"),
    ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 9\]"),
    ({"vocab_size": 10}, ValueError, r"vocab_size must be in \[1, 9\]"),
    ({"vocab_size": 2.5}, TypeError, "vocab_size must be an integer, got 2.5"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    ({"num_items": -3}, ValueError, "num_items must be >= 0"),
    ({"num_items": float("nan")}, ValueError, "num_items must be >= 0"),
    ({"num_items": torch.tensor(-1)}, ValueError, "num_items must be >= 0"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index must fit into int64"),
    ({"class_dim": 2}, ValueError, "class_dim must be 1 or -1"),
    ({"num_items": torch.ones(2)}, ValueError, "num_items must be a number"),
    ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items replaces the denominator"),
    ({"weight": torch.ones(8)}, RuntimeError, "weight tensor should be defined either for all 9"),
    ({"weight": torch.ones(9).long()}, RuntimeError, "weight to be floating point"),
    ({"weight": torch.ones(9, requires_grad=True)}, RuntimeError, "weight has no gradient"),
    ({"token_weight": torch.ones(5)}, ValueError, "token_weight must have one number per token"),
    ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must be a number"),
    ({"logit_scale": torch.tensor(1)}, ValueError, "logit_scale must be a number"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), CASES)
@pytest.mark.parametrize("inplace", [False, True])
def test_options(options, kind, message, inplace):
    logits = INPUT.clone().requires_grad_() * 1
    before = logits.detach().clone()
    with pytest.raises(kind, match=message):
        cross_entropy(logits, TARGET, **options, inplace=inplace)
    assert torch.equal(logits.detach(), before)


SHAPES = [
    ((4, 9), (5,), r"batch_size \(4\) to match target batch_size \(5\)"),
    ((4, 9), (4, 1), "does not fit logits of shape"),
    ((9,), (1,), "target without dimensions"),
    ((4, 9, 2), (4, 3), r"\(4, 9\) \(classes last\)"),
    ((2, 3, 9), (2, 4), "classes last"),
    ((), (), "at least one dimension"),
]


@pytest.mark.parametrize(("input", "target", "message"), SHAPES)
@pytest.mark.parametrize("function", [cross_entropy, token_stats])
def test_shapes(function, input, target, message):
    with pytest.raises(ValueError, match=message):
        function(torch.randn(input), torch.zeros(target, dtype=torch.long))


def test_probability_targets_of_another_shape_or_dtype():
    with pytest.raises(ValueError, match="must have the input's shape"):
        cross_entropy(INPUT, torch.rand(4))
    with pytest.raises(RuntimeError, match="the input's dtype"):
        cross_entropy(INPUT, torch.rand(4, 9).double())
    with pytest.raises(RuntimeError, match="class indices"):
        token_stats(INPUT, torch.rand(4, 9))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.bool])
def test_target_dtypes(dtype):
    with pytest.raises(RuntimeError, match="expected class indices of int64, int32 or uint8"):
        cross_entropy(INPUT, TARGET.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_input_dtypes(dtype):
    with pytest.raises(RuntimeError, match="expected logits of float32"):
        cross_entropy(torch.zeros(4, 9, dtype=dtype), TARGET)


@pytest.mark.parametrize("function", [cross_entropy, token_stats])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [9, -1, -101, 2**31 - 1])
def test_target_out_of_range(function, dtype, bad):
    target = TARGET.to(dtype, copy=True)
    target[2] = bad
    with pytest.raises(IndexError, match=f"Target {bad} at position 2 is out of bounds"):
        function(INPUT, target)
    with pytest.raises(IndexError, match=rf"Target {bad} at position \(1, 0\)"):
        function(INPUT.view(2, 2, 9), target.view(2, 2))


def test_target_beyond_the_vocabulary():
    with pytest.raises(IndexError, match=r"Target 3 at position 3 .* \[0, 3\)"):
        cross_entropy(INPUT, TARGET, vocab_size=3)


def test_target_out_of_range_in_a_compiled_graph():
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True)
    with pytest.raises(IndexError, match="Target 9 at position 0"):
        compiled(INPUT, TARGET + 9)


def test_devices():
    meta = torch.zeros(4, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="same device"):
        cross_entropy(INPUT, meta)
    with pytest.raises(RuntimeError, match="expected weight to be floating point on cpu"):
        cross_entropy(INPUT, TARGET, weight=torch.ones(9, device="meta"))
    with pytest.raises(RuntimeError, match="expected logit_scale on cpu"):
        cross_entropy(INPUT, TARGET, logit_scale=torch.ones((), device="meta"))
    with pytest.raises(RuntimeError, match="expected token_weight on cpu"):
        cross_entropy(INPUT, TARGET, token_weight=torch.ones(4, device="meta"))


def test_operators_refuse_what_would_read_out_of_bounds():
    """Called directly, without the checks of functional."""
    ops, none = torch.ops.llmloss, (None, None, None, None)
    bad = [
        (INPUT, TARGET[:3], *none, 9),
        (INPUT, TARGET, *none, 10),
        (INPUT, TARGET, torch.ones(3), *none[1:], 9),
        (INPUT, TARGET, None, torch.ones(3), *none[2:], 9),
        (INPUT.t(), TARGET, *none, 4),
        (INPUT.long(), TARGET, *none, 9),
        (INPUT, torch.rand(4, 8), *none, 9),
    ]
    for *args, vocab_size in bad:
        options = pack(LogitOptions(1.0, 0.0, -100, vocab_size), LossOptions(reduction=MEAN))
        with pytest.raises(RuntimeError, match="llmloss"):
            ops.cross_entropy(*args, *options)
    floats, ints = pack(LogitOptions(1.0, 0.0, -100, 9), LossOptions(reduction=MEAN))
    for wrong in ((floats[:-1], ints), (floats, ints[:-1]), ((*floats, 0.0), ints)):
        with pytest.raises(RuntimeError, match="llmloss"):
            ops.cross_entropy(INPUT, TARGET, *none, *wrong)
    with pytest.raises(RuntimeError, match="one number"):
        ops.scale_(INPUT.clone(), torch.ones(2))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("LLMLOSS_CPU_ISA", "avx-512")
    with pytest.raises(ValueError, match="LLMLOSS_CPU_ISA must be .* got avx-512"):
        cross_entropy(INPUT, TARGET)


def test_torch_says_why_it_could_not():
    """Its message crosses its C interface since 2.13; before, torch prints it itself."""
    rows = 2**50  # which are one
    x, target = torch.zeros(1, 1).expand(rows, 1), TARGET[:1].expand(rows)
    with pytest.raises(RuntimeError, match=r"API call failed at torch/csrc/stable") as error:
        torch.ops.llmloss.token_stats(x, target, None, None, [1.0, 0.0], [-100, 0, 0], 1)
    if torch.__version__ >= "2.13":  # a version, not its letters
        assert "can't allocate memory" in str(error.value)
