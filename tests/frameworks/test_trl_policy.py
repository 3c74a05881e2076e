"""`grpo_loss` is TRL's GRPOTrainer._compute_loss: loss, gradients and metrics, option by option."""

from __future__ import annotations

import collections
import functools
import types

import pytest
import torch
from helpers import assert_close
from losses.policy_definition import Problem

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from llmloss_ext import losses
from llmloss_ext.losses.policy_options import CLIPPED, LOSS_TYPES, POLICY_OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and datasets

LENGTH = 6
KINDS = [
    (loss_type, level)
    for loss_type in LOSS_TYPES
    for level in (("token",) if loss_type == "vespo" else ("token", "sequence"))
]
CASES = {
    "plain": {},
    "kl": {"beta": 0.1},
    "kl without correction": {"beta": 0.1, "use_bias_correction_kl": False},
    "entropy": {"entropy_coef": 0.05},
    "off policy": {"off_policy_mask_threshold": 0.05},
    "high entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, "beta": 0.1},
    "rollout of tokens": {"rollout": "token_truncate"},
    "rollout of sequences": {"rollout": "sequence_mask", "beta": 0.1},
    "on policy": {"old": False, "beta": 0.1},
    "clip": {"epsilon": 0.1, "epsilon_high": 0.3},
    "delta": {"delta": 1.5},
    "temperatures": {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0},
    "gamma": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 1.0, "vespo_k_neg": 2.0,
              "vespo_lambda_neg": 3.0},
}  # fmt: skip
OF = {"clip": CLIPPED, "delta": CLIPPED, "temperatures": ("sapo",), "gamma": ("vespo",)}


class Alone:
    """The accelerator of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, **_):
        return x


def trainer_of(how, x, entropy):
    """What _compute_loss reads of a trainer."""
    defaults = {name: option.default for name, option in POLICY_OPTIONS.items()}
    o = types.SimpleNamespace(**(defaults | {"top_entropy_quantile": 1.0, "rollout": None} | how))
    trainer = types.SimpleNamespace(
        args=o, loss_type=o.loss_type, importance_sampling_level=o.importance_sampling_level,
        beta=o.beta, epsilon_low=o.epsilon,
        epsilon_high=o.epsilon if o.epsilon_high is None else o.epsilon_high,
        entropy_coef=o.entropy_coef, _entropy_bonus_enabled=o.entropy_coef != 0,
        use_adaptive_entropy=False, top_entropy_quantile=o.top_entropy_quantile,
        off_policy_mask_threshold=o.off_policy_mask_threshold, aux_loss_enabled=False,
        use_vllm=o.rollout is not None, vllm_importance_sampling_correction=True,
        max_completion_length=LENGTH, current_gradient_accumulation_steps=1,
        accelerator=Alone(), model=torch.nn.Linear(1, 1),
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (x, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    o.steps_per_generation = 1
    trainer.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def theirs(p, how, x, entropy):
    trainer = trainer_of(how, x, entropy)
    nothing = torch.zeros(len(p.mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": p.mask.long(),
        "completion_mask": p.mask.long(), "advantages": p.advantages,
        "ref_per_token_logps": p.reference, "num_items_in_batch": p.mask.sum(),
    }  # fmt: skip
    if how.get("old", True):
        inputs["old_per_token_logps"] = p.old
    if "off_policy_mask_threshold" in how:
        inputs["sampling_per_token_logps"] = p.sampling
    if how.get("rollout"):
        inputs["importance_sampling_ratio"] = rollout(p, how["rollout"])
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def rollout(p, mode):
    return losses.rollout_weights(p.old, p.sampling, p.mask, mode=mode, clip_max=1.3)


def ours(p, how, x, entropy):
    how = dict(how)
    old = p.old if how.pop("old", True) else None
    tensors = {"reference_log_probs": p.reference, "entropy": entropy}
    if "off_policy_mask_threshold" in how:
        tensors["sampling_log_probs"] = p.sampling
    mode, quantile = how.pop("rollout", None), how.pop("top_entropy_quantile", 1.0)
    if mode is not None:
        tensors["importance_sampling_ratio"] = rollout(p, mode)
    if quantile < 1:
        tensors["entropy_mask"] = losses.high_entropy_mask(entropy, p.mask, quantile)
    if how["loss_type"] == "dr_grpo":
        how["max_completion_length"] = LENGTH
    return losses.grpo_loss(x, old, p.advantages, p.mask, **tensors, **how)


@pytest.mark.parametrize(
    ("loss_type", "level", "name"),
    [(t, level, n) for t, level in KINDS for n in CASES if t in OF.get(n, (t,))],
)
def test_the_same_loss_gradients_and_metrics(loss_type, level, name):
    how = {"loss_type": loss_type, "importance_sampling_level": level, **CASES[name]}
    if loss_type == "vespo" and how.get("rollout") == "sequence_mask":
        pytest.skip("TRL refuses weights of sequences for vespo")
    if loss_type == "cispo":
        how["epsilon_high"] = 1.2
    p = Problem(1, sequences=12)
    x, entropy = p.log_probs.requires_grad_(), p.entropy.requires_grad_()
    result = ours(p, how, x, entropy)
    wanted, metrics = theirs(p, how, x, entropy)
    tolerance = 1e-6 if loss_type == "sapo" else 1e-10  # TRL has 1.05 in float32
    assert_close(result.loss, wanted, tolerance)
    grads = (torch.autograd.grad(y, (x, entropy), allow_unused=True) for y in (result.loss, wanted))
    for one, other in zip(*grads, strict=True):
        empty = torch.zeros_like(p.reference)
        assert_close(empty if one is None else one, empty if other is None else other, tolerance)
    found = {
        "kl": result.metrics.kl, "entropy": result.metrics.entropy,
        "clip_ratio/low_mean": result.metrics.clip_low,
        "clip_ratio/high_mean": result.metrics.clip_high,
        "cispo_clip_ratio": result.metrics.clip_high,
        "policy_loss": result.metrics.policy_loss,
    }  # fmt: skip
    shared = found.keys() & metrics.keys()
    assert {"entropy"} <= shared
    assert ("kl" in shared) == bool(how.get("beta"))
    for key in shared:
        assert float(found[key]) == pytest.approx(metrics[key], abs=1e-6), key


def test_names_and_defaults_are_those_of_its_configuration(tmp_path):
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    not_theirs = {"kl_estimator", "max_completion_length"}  # k3 alone; 256, which is of the data
    for name in POLICY_OPTIONS.keys() - not_theirs:
        assert getattr(config, name) == POLICY_OPTIONS[name].default, name
    assert hasattr(config, "max_completion_length")
    assert config.vllm_importance_sampling_mode == "sequence_mask"
    assert config.vllm_importance_sampling_clip_max == 3.0
