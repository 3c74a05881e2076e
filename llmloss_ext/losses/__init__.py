"""The loss family: each a few readable lines over the row statistics."""

from .advantages import Advantages, gae, group_advantages, masked_whiten, rloo_advantages
from .combined import (
    CombinedLoss,
    UncertaintyWeights,
    combined_loss,
    linear_schedule,
)
from .contrastive import ClipLoss, contrastive_loss
from .distillation import distillation_loss, top_k_distillation_loss
from .distributions import (
    check_probabilities,
    cross_entropy_between,
    entropy,
    kl_divergence,
)
from .language_model import (
    LabelSmoothingCrossEntropy,
    LanguageModelLoss,
    LossStats,
    causal_lm_loss,
    confidence_penalty_loss,
    create_causal_mask,
    next_token_targets,
)
from .linear_policy import linear_policy_loss
from .masked_lm import mask_tokens, mlm_loss
from .policy import PolicyLoss, PolicyMetrics, ValueLoss, grpo_loss, ppo_clip_loss, value_loss
from .policy_weights import high_entropy_mask, off_policy_mask, rollout_weights
from .preference import PreferenceLoss, dpo_loss, sequence_log_probs

__all__ = [
    "Advantages",
    "ClipLoss",
    "CombinedLoss",
    "LabelSmoothingCrossEntropy",
    "LanguageModelLoss",
    "LossStats",
    "PolicyLoss",
    "PolicyMetrics",
    "PreferenceLoss",
    "UncertaintyWeights",
    "ValueLoss",
    "causal_lm_loss",
    "check_probabilities",
    "combined_loss",
    "confidence_penalty_loss",
    "contrastive_loss",
    "create_causal_mask",
    "cross_entropy_between",
    "distillation_loss",
    "dpo_loss",
    "entropy",
    "gae",
    "group_advantages",
    "grpo_loss",
    "high_entropy_mask",
    "kl_divergence",
    "linear_policy_loss",
    "linear_schedule",
    "mask_tokens",
    "masked_whiten",
    "mlm_loss",
    "next_token_targets",
    "off_policy_mask",
    "ppo_clip_loss",
    "rloo_advantages",
    "rollout_weights",
    "sequence_log_probs",
    "top_k_distillation_loss",
    "value_loss",
]
