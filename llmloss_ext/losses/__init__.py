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
from .linear_preference import linear_preference_loss
from .masked_lm import mask_tokens, mlm_loss
from .pairs import PreferenceLoss
from .policy import PolicyLoss, PolicyMetrics, ValueLoss, grpo_loss, ppo_clip_loss, value_loss
from .policy_weights import high_entropy_mask, off_policy_mask, rollout_weights
from .preference import dpo_loss
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .sequence_scores import (
    length_desensitized_log_probs,
    sequence_log_probs,
    wpo_weights,
)
from .unpaired import RunningMean, UnpairedLoss, bco_loss, kl_estimate, kto_loss

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
    "RunningMean",
    "UncertaintyWeights",
    "UnpairedLoss",
    "ValueLoss",
    "bco_loss",
    "causal_lm_loss",
    "check_probabilities",
    "combined_loss",
    "confidence_penalty_loss",
    "contrastive_loss",
    "cpo_loss",
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
    "kl_estimate",
    "kto_loss",
    "length_desensitized_log_probs",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_schedule",
    "mask_tokens",
    "masked_whiten",
    "mlm_loss",
    "next_token_targets",
    "off_policy_mask",
    "orpo_loss",
    "ppo_clip_loss",
    "rloo_advantages",
    "rollout_weights",
    "sequence_log_probs",
    "simpo_loss",
    "top_k_distillation_loss",
    "value_loss",
    "wpo_weights",
]
