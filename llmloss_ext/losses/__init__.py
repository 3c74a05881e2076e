"""The loss family: each a few readable lines over the row statistics."""

from .advantages import Advantages, gae, group_advantages, masked_whiten, rloo_advantages
from .adversarial import (
    DiscriminatorLoss,
    GeneratorLoss,
    PolicyGradientLoss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    policy_gradient_loss,
    r1_penalty,
)
from .combined import CombinedLoss, UncertaintyWeights, combined_loss, linear_schedule
from .conflict import (
    BalancedLoss,
    GradNorm,
    GradNormLoss,
    conflict_backward,
    conflict_loss,
    gradient_gram,
    min_norm_weights,
    pcgrad_weights,
)
from .contrastive import ClipLoss, contrastive_loss
from .difficulty import difficulty_weights, select_difficult_tokens
from .distillation import (
    DistillationLoss,
    distillation_loss,
    hard_soft_distillation_loss,
    top_k_distillation_loss,
)
from .distributions import check_probabilities, cross_entropy_between, entropy, kl_divergence
from .gumbel import GumbelEmbeddings, gumbel_softmax, linear_gumbel_embeddings
from .hidden_distillation import cosine_distillation_loss
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
from .linear_unpaired import linear_unpaired_loss
from .masked_lm import mask_tokens, mlm_loss
from .multi_token import MultiTokenLoss, count_multi_token_items, multi_token_prediction_loss
from .pairs import PreferenceLoss
from .policy import PolicyLoss, PolicyMetrics, ValueLoss, grpo_loss, ppo_clip_loss, value_loss
from .policy_weights import high_entropy_mask, off_policy_mask, rollout_weights
from .preference import dpo_loss
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .sampled_distillation import SampledKL, sampled_reverse_kl
from .selected import linear_selected_log_probs, selected_log_probs
from .sequence_scores import length_desensitized_log_probs, sequence_log_probs, wpo_weights
from .unlikelihood import repeated_ngrams, sequence_unlikelihood_loss, unlikelihood_loss
from .unpaired import RunningMean, UnpairedLoss, bco_loss, kl_estimate, kto_loss

__all__ = [
    "Advantages",
    "BalancedLoss",
    "ClipLoss",
    "CombinedLoss",
    "DiscriminatorLoss",
    "DistillationLoss",
    "GeneratorLoss",
    "GradNorm",
    "GradNormLoss",
    "GumbelEmbeddings",
    "LabelSmoothingCrossEntropy",
    "LanguageModelLoss",
    "LossStats",
    "MultiTokenLoss",
    "PolicyGradientLoss",
    "PolicyLoss",
    "PolicyMetrics",
    "PreferenceLoss",
    "RunningMean",
    "SampledKL",
    "UncertaintyWeights",
    "UnpairedLoss",
    "ValueLoss",
    "bco_loss",
    "causal_lm_loss",
    "check_probabilities",
    "combined_loss",
    "confidence_penalty_loss",
    "conflict_backward",
    "conflict_loss",
    "contrastive_loss",
    "cosine_distillation_loss",
    "count_multi_token_items",
    "cpo_loss",
    "create_causal_mask",
    "cross_entropy_between",
    "difficulty_weights",
    "discriminator_loss",
    "distillation_loss",
    "dpo_loss",
    "entropy",
    "gae",
    "generator_loss",
    "gradient_gram",
    "gradient_penalty",
    "group_advantages",
    "grpo_loss",
    "gumbel_softmax",
    "hard_soft_distillation_loss",
    "high_entropy_mask",
    "kl_divergence",
    "kl_estimate",
    "kto_loss",
    "length_desensitized_log_probs",
    "linear_gumbel_embeddings",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_schedule",
    "linear_selected_log_probs",
    "linear_unpaired_loss",
    "mask_tokens",
    "masked_whiten",
    "min_norm_weights",
    "mlm_loss",
    "multi_token_prediction_loss",
    "next_token_targets",
    "off_policy_mask",
    "orpo_loss",
    "pcgrad_weights",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "r1_penalty",
    "repeated_ngrams",
    "rloo_advantages",
    "rollout_weights",
    "sampled_reverse_kl",
    "select_difficult_tokens",
    "selected_log_probs",
    "sequence_log_probs",
    "sequence_unlikelihood_loss",
    "simpo_loss",
    "top_k_distillation_loss",
    "unlikelihood_loss",
    "value_loss",
    "wpo_weights",
]
