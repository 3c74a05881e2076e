"""`distillation_loss` is TRL's generalized JSD, of logits and of stored log-probabilities."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from llmloss_ext import linear_distillation_loss, linear_kl_div, losses

pytest.importorskip("trl")

from trl.experimental.gkd import GKDTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and datasets

B, S, D, V = 2, 5, 6, 11


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("items", [None, 4])
def test_generalized_jsd(beta, temperature, items):
    """TRL leaves T^2 out."""
    torch.manual_seed(0)
    hidden, other = torch.randn(2, B, S, D).double()
    weight, teacher_weight = torch.randn(2, V, D).double()
    hidden.requires_grad_()
    labels = torch.zeros(B, S, dtype=torch.long)
    labels[0, :2] = -100
    student, teacher = hidden @ weight.t(), other @ teacher_weight.t()
    wanted = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels=labels, beta=beta, temperature=temperature,
        num_items_in_batch=items,
    ) * temperature**2  # fmt: skip
    (want,) = torch.autograd.grad(wanted, hidden, retain_graph=True)
    how = {
        "direction": "jsd", "beta": beta, "temperature": temperature, "target": labels,
        "num_items": items,
    }  # fmt: skip
    log_probs = torch.log_softmax(teacher / temperature, -1)
    for loss in (
        losses.distillation_loss(student, teacher, **how),
        losses.distillation_loss(student, teacher_log_probs=log_probs, **how),
        linear_kl_div(hidden, weight, other, teacher_weight, **how),
        linear_distillation_loss(
            hidden, weight, other, teacher_weight, weight_hard_loss=0.0, weight_soft_loss=1.0,
            **how,
        ).loss,
    ):  # fmt: skip
        assert_close(loss, wanted, 1e-10)
        (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        assert_close(grad, want, 1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("add_tail", [False, True])
def test_the_support_of_a_servers_top_k(beta, add_tail):
    """`_add_tail_bucket` and `_jsd_divergence`, as TRL's distillation from a server joins them."""
    trainer = pytest.importorskip(
        "trl.experimental.server_distillation.server_distillation_trainer"
    )
    torch.manual_seed(1)
    student = torch.randn(B, S, V).double().requires_grad_()
    log_p = torch.log_softmax(2 * torch.randn(B, S, V).double(), -1)
    values, ids = log_p.topk(4, -1)
    kept = torch.log_softmax(student, -1).gather(-1, ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if add_tail:
        q, support = trainer._add_tail_bucket(kept, mask)
        p, _ = trainer._add_tail_bucket(values, mask)
    else:
        q, p = (x - torch.logsumexp(x, -1, keepdim=True) for x in (kept, values))
        support = mask
    wanted = trainer._jsd_divergence(q, p, beta, support).sum(-1).mean()
    loss = losses.top_k_distillation_loss(
        student, ids, values, direction="jsd", beta=beta, add_tail=add_tail
    )
    assert_close(loss, wanted, 1e-6)
    grads = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, wanted)]
    assert_close(*grads, 1e-6)
