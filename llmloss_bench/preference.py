"""A preference step: DPO of a policy's hidden states, with those of a reference model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmloss_ext.losses import linear_preference_loss

from .inputs import IGNORE_INDEX

BETA = 0.1


def ours(
    hidden: Tensor, weight: Tensor, target: Tensor, reference_hidden: Tensor,
    reference_weight: Tensor,
) -> Tensor:  # fmt: skip
    """This library's loss: no logits of all tokens, of the policy or the reference.

    Args:
        hidden: The policy's hidden states (N, D), those of the chosen sequences first.
        weight: Its projection (V, D).
        target: (S, N / S), of S sequences.
        reference_hidden: (S, N / S, D).
        reference_weight: (V, D).

    Returns:
        The mean over the S / 2 pairs.
    """
    return linear_preference_loss(
        hidden.view(reference_hidden.shape), weight, target, beta=BETA,
        reference_input=reference_hidden, reference_weight=reference_weight,
    ).loss  # fmt: skip


def eager(
    hidden: Tensor, weight: Tensor, target: Tensor, reference_hidden: Tensor,
    reference_weight: Tensor,
) -> Tensor:  # fmt: skip
    """The same in plain torch, from the logits of all tokens; arguments as in `ours`."""
    with torch.no_grad():
        reference = log_probs(F.linear(reference_hidden, reference_weight), target)
    policy = log_probs(F.linear(hidden.view(reference_hidden.shape), weight), target)
    return dpo(policy, reference)


def log_probs(logits: Tensor, target: Tensor) -> Tensor:
    """The log-probability of each target, 0 where it is ignored; 16-bit logits in float32."""
    dtype = torch.float32 if logits.element_size() == 2 else logits.dtype
    log_p = torch.log_softmax(logits, -1, dtype=dtype)
    at_target = log_p.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return at_target * (target != IGNORE_INDEX)


def dpo(policy: Tensor, reference: Tensor) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of log-ratios (Rafailov et al. 2023, equation 7).

    Args:
        policy: Log-probabilities of the tokens (S, L), the chosen sequences first.
        reference: Those under the reference model.
    """
    chosen, rejected = (policy - reference).sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
