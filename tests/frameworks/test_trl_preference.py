"""The preference losses against the code of TRL's own trainers, called without a trainer."""

from __future__ import annotations

import types
from collections import defaultdict

import pytest
import torch
from helpers import assert_close

pytest.importorskip("trl")

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from llmloss_ext import losses
from llmloss_ext.losses.preference import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and datasets

B, S, V = 5, 7, 11
ACCELERATOR = types.SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)


class Model(torch.nn.Module):
    """Answers with log-probabilities that it was given, one call after the other."""

    is_gradient_checkpointing = False

    def __init__(self, *log_probs):
        super().__init__()
        self.log_probs = list(log_probs)

    def forward(self, **_):
        x = self.log_probs.pop(0)
        zeros = torch.zeros_like(x).detach()
        return types.SimpleNamespace(
            log_probs=x, log_sum_sq_probs=x.detach() * 0.7 - 0.1, entropy=zeros,
            mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None,
        )  # fmt: skip


def batch():
    """Completions of several lengths: their mask, and log-probabilities that are 0 elsewhere."""
    torch.manual_seed(0)
    mask = torch.zeros(2 * B, S + 1, dtype=torch.long)
    for row, length in enumerate([3, 5, 1, 6, 2, 4, 4, 2, 5, 1]):
        mask[row, 2 : 2 + length] = 1
    shifted = mask[:, 1:].bool()
    policy, reference = -3 * torch.rand(2, 2 * B, S)
    return mask, shifted, policy * shifted, reference * shifted


def trl_dpo(policy, reference, mask, kinds, **changes):
    settings = {
        "accelerator": ACCELERATOR, "model": Model(), "ref_model": Model(reference),
        "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": False,
        "args": types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.7),
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "beta": 0.2,
        "label_smoothing": 0.0, "use_weighting": False, "loss_types": kinds,
        "loss_weights": [1.0] * len(kinds), "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    trainer = types.SimpleNamespace(**{**settings, **changes})
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    loss = DPOTrainer._compute_loss(trainer, Model(policy), inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def our_dpo(policy, reference, mask, kinds, *, scores=losses.sequence_log_probs, **options):
    sums = [*scores(policy, mask), *scores(reference, mask)]
    return losses.dpo_loss(*sums, kind=kinds, beta=0.2, **options)


def in_halves(log_probs, mask):
    return losses.sequence_log_probs(log_probs, mask).chunk(2)


def options_of(kind, mask, policy):
    lengths = mask.sum(1).chunk(2)
    nll = -policy[:B][mask[:B]].mean()
    return {
        **({"label_smoothing": 0.1} if kind in ("robust", "exo_pair", "aot", "aot_unpaired")
           else {}),
        **({"discopop_tau": 0.7} if kind == "discopop" else {}),
        **({"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
           if kind in ("ipo", "sigmoid_norm") else {}),
        **({"nll_loss": nll} if kind == "sft" else {}),
    }  # fmt: skip


def compare_dpo(kind, changes, scores=in_halves, options=None):
    mask, shifted, policy, reference = batch()
    leaves = [policy.clone().requires_grad_() for _ in range(2)]
    given = options_of(kind, shifted, leaves[0])
    ours = our_dpo(
        leaves[0], reference, shifted, kind, scores=scores, **{**given, **(options or {})}
    )
    eps = given.get("label_smoothing", 0.0)
    theirs, metrics = trl_dpo(leaves[1], reference, mask, [kind], label_smoothing=eps, **changes)
    assert_close(ours.loss.detach(), theirs.detach(), 1e-5)
    grads = [torch.autograd.grad(x, leaf)[0] for x, leaf in zip((ours.loss, theirs), leaves)]  # noqa: B905
    assert_close(grads[0] * shifted, grads[1] * shifted, 1e-5)
    assert grads[0].abs().max() > 1e-4
    for name, found in (
        ("rewards/chosen", ours.chosen_rewards), ("rewards/rejected", ours.rejected_rewards),
        ("rewards/margins", ours.margins), ("rewards/accuracies", ours.accuracies),
        ("logps/chosen", ours.chosen_log_probs), ("logps/rejected", ours.rejected_log_probs),
    ):  # fmt: skip
        assert float(found.mean()) == pytest.approx(metrics[name], abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_dpo(kind):
    compare_dpo(kind, {})


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.of_scores])
def test_divergences(kind, divergence):
    how = {"f_divergence_type": divergence}
    if divergence == "alpha_divergence":
        how["f_alpha_divergence_coef"] = 0.3
    compare_dpo(kind, how, options=how)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "nca_pair", "apo_down"])
def test_wpo(kind):
    _, mask, policy, _ = batch()
    weights = losses.wpo_weights(policy, policy * 0.7 - 0.1, mask).chunk(2)
    compare_dpo(kind, {"use_weighting": True}, options={"pair_weight": weights[0] * weights[1]})


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_ld_dpo(ld_alpha):
    def scores(log_probs, mask):
        return losses.length_desensitized_log_probs(
            *log_probs.chunk(2), *mask.chunk(2), ld_alpha=ld_alpha
        )

    compare_dpo("sigmoid", {"ld_alpha": ld_alpha}, scores=scores)


def test_several_kinds():
    mask, shifted, policy, reference = batch()
    kinds, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    ours = our_dpo(
        policy, reference, shifted, kinds, scores=in_halves, loss_weights=weights,
        nll_loss=-policy[:B][shifted[:B]].mean(),
    )  # fmt: skip
    theirs, _ = trl_dpo(policy, reference, mask, kinds, loss_weights=weights)
    assert_close(ours.loss, theirs, 1e-5)


def averages():
    _, mask, policy, _ = batch()
    both = losses.sequence_log_probs(policy, mask, average=True).chunk(2)
    return [[x.clone().requires_grad_() for x in both] for _ in range(2)]


def check_pairs(ours, theirs, leaves):
    (value, *rewards) = theirs
    assert_close(ours.loss.detach(), value.detach(), 1e-5)
    assert_close(ours.chosen_rewards, rewards[0], 1e-5)
    assert_close(ours.rejected_rewards, rewards[1], 1e-5)
    grads = [torch.autograd.grad(x, l) for x, l in zip((ours.loss, value), leaves)]  # noqa: B905, E741
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "simpo", "hinge", "ipo"])
def test_cpo(kind, alpha):
    leaves = averages()
    eps = 0.1 if kind in ("sigmoid", "simpo") else 0.0
    trainer = types.SimpleNamespace(
        alpha=alpha, beta=0.3, loss_type=kind, simpo_gamma=0.6, label_smoothing=eps,
        accelerator=ACCELERATOR,
    )  # fmt: skip
    each, *rewards = CPOTrainer.cpo_loss(trainer, *leaves[1])
    how = {"beta": 0.3, "label_smoothing": eps}
    gamma = {"simpo_gamma": 0.6} if kind == "simpo" else {}
    ours = losses.cpo_loss(*leaves[0], kind=kind, alpha=alpha, cpo_alpha=0.0, **how, **gamma)
    check_pairs(ours, (each.mean(), *rewards), leaves)
    if kind == "simpo" and alpha == 0:
        same = losses.simpo_loss(*leaves[0], gamma=0.6, **how).loss
        assert torch.equal(same, ours.loss)


def test_orpo():
    leaves = averages()
    trainer = types.SimpleNamespace(beta=0.3, accelerator=ACCELERATOR)
    found = ORPOTrainer.odds_ratio_loss(trainer, *leaves[1])
    ours = losses.orpo_loss(*leaves[0], torch.tensor(1.5), beta=0.3)
    check_pairs(ours, (1.5 - found[0].mean(), *found[1:3]), leaves)
    assert_close(ours.log_odds_ratio.mean(), found[3].detach(), 1e-5)
    assert_close(ours.log_odds_chosen.mean(), found[4].detach(), 1e-5)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl_sign", [1, -1])
def test_kto(kind, kl_sign):
    mask, shifted, policy, reference = batch()
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 0])
    of_policy, of_reference = policy * 0.5, policy * 0.5 - 0.1 * kl_sign * shifted
    leaves = [policy.clone().requires_grad_() for _ in range(2)]
    needs_kl = kind == "kto"
    of_others = ([of_policy], [of_reference]) if needs_kl else ([], [])
    trainer = types.SimpleNamespace(
        accelerator=ACCELERATOR, model=Model(), ref_model=Model(*of_others[1], reference),
        calculate_KL=needs_kl, aux_loss_enabled=False, precompute_ref_logps=False, beta=0.2,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None), loss_type=kind,
        desirable_weight=1.3, undesirable_weight=0.6, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, trainer)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": labels}
    inputs |= {f"KL_{name}": mask for name in ("input_ids", "attention_mask", "completion_mask")}
    theirs = KTOTrainer._compute_loss(trainer, Model(*of_others[0], leaves[1]), inputs, False)
    kl = losses.kl_estimate(of_policy.sum(1), of_reference.sum(1)) if needs_kl else None
    ours = losses.kto_loss(
        losses.sequence_log_probs(leaves[0], shifted), reference.sum(1), labels, kl=kl, kind=kind,
        beta=0.2, desirable_weight=1.3, undesirable_weight=0.6,
    )  # fmt: skip
    assert_close(ours.loss.detach(), theirs.detach(), 1e-5)
    one, other = (torch.autograd.grad(x, l)[0] for x, l in zip((ours.loss, theirs), leaves))  # noqa: B905, E741
    assert_close(one * shifted, other * shifted, 1e-5)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert float(ours.shift) == pytest.approx(0.2 * metrics["kl"], abs=1e-5)
    for name, found in (
        ("rewards/chosen", ours.chosen_rewards), ("rewards/rejected", ours.rejected_rewards),
        ("rewards/margins", ours.margins), ("logps/chosen", ours.chosen_log_probs),
        ("logps/rejected", ours.rejected_log_probs),
    ):  # fmt: skip
        assert float(found) == pytest.approx(metrics[name], abs=1e-5), name
