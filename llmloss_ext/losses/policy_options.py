"""Every option of the policy losses, once: its default, its check and what it does.

Names and defaults are those of TRL's GRPOConfig, where it has them. `PolicyOptions` are the checked
options, as the surrogates take them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..options import Option

__all__ = ["POLICY_OPTIONS", "PolicyOptions"]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""The losses with PPO's clipped surrogate."""
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
BY_SEQUENCES = ("grpo", "sapo", "dr_grpo", "luspo")
"""The losses that are divided by a number of sequences; the others by a number of tokens."""
LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3")

POLICY_OPTIONS = {
    "loss_type": Option(
        "str",
        "dapo",
        'Which surrogate, and what its sum over tokens is divided by. ``"grpo"``: clipped, each '
        "sequence's mean, then the mean over sequences (Shao et al. 2024); "
        '``"dapo"``: clipped, by the tokens (Yu et al. 2025); ``"bnpo"``: the same, by the tokens '
        'of this call whatever the step has, so without ``num_items``; ``"dr_grpo"``: '
        "clipped, by sequences times ``max_completion_length`` (Liu et al. 2025); "
        '``"luspo"``: clipped, the sum of each sequence, then the mean over sequences (LUSPO, '
        '2026); ``"cispo"``: -min(r, epsilon_high) A log pi, the ratio without a gradient, by the '
        'tokens (MiniMax-M1, 2025); ``"sapo"``: -4 / t sigmoid(t (r - 1)) A, divided as grpo (Gao '
        'et al. 2025); ``"vespo"``: -phi(w) A log pi, w the ratio of the sequence, divided by the '
        "tokens (VESPO, 2026).",
    ),
    "importance_sampling_level": Option(
        "str",
        "token",
        'The ratio r: ``"token"``, pi / pi_old of each token; ``"sequence"``, the geometric mean '
        'of a sequence\'s (GSPO, Zheng et al. 2025); ``"sequence_token"``, the number of the '
        "latter with the gradient of the former (GSPO-token, for advantages of tokens). TRL has "
        "the first two, verl the last.",
    ),
    "epsilon": Option("float", 0.2, "The clip, > 0: r is flat below 1 - epsilon where A < 0."),
    "epsilon_high": Option(
        "float | None",
        None,
        "The clip above, > 0; None: ``epsilon``. Of cispo, as in TRL, it is the largest ratio "
        "itself (ScaleRL recommends 5.0).",
    ),
    "delta": Option(
        "float | None",
        None,
        "The largest ratio where A < 0, > 1 (two-sided clip, INTELLECT-2, 2025); None: none. For "
        "clipped losses.",
    ),
    "beta": Option(
        "float",
        0.0,
        "Factor of the KL to the reference, >= 0; needs ``reference_log_probs``. With 0 the KL is "
        "a metric only.",
    ),
    "kl_estimator": Option(
        "str",
        "k3",
        'Of KL(pi || ref) from one token, d = log ref - log pi (Schulman 2020): ``"k1"``, -d; '
        '``"k2"``, d^2 / 2; ``"k3"``, e^d - d - 1, which alone TRL has.',
    ),
    "use_bias_correction_kl": Option(
        "bool",
        True,
        "Whether the KL is multiplied by the ratio r, with its gradient (DeepSeek-V3.2, 2025).",
    ),
    "entropy_coef": Option(
        "float",
        0.0,
        "Factor of the mean entropy over tokens, which is subtracted whatever the ``loss_type``, "
        ">= 0; needs ``entropy``.",
    ),
    "sapo_temperature_pos": Option("float", 1.0, "t of sapo where A > 0; > 0."),
    "sapo_temperature_neg": Option("float", 1.05, "t of sapo elsewhere; > 0."),
    "vespo_k_pos": Option(
        "float", 2.0, "k of vespo's phi(w) = e^lambda w^k e^(-lambda w) where A >= 0; > 0."
    ),
    "vespo_lambda_pos": Option("float", 3.0, "lambda of vespo where A >= 0; > 0."),
    "vespo_k_neg": Option("float", 3.0, "k of vespo elsewhere; > 0."),
    "vespo_lambda_neg": Option("float", 2.0, "lambda of vespo elsewhere; > 0."),
    "max_completion_length": Option(
        "int | None", None, "The length that dr_grpo divides by, >= 1; needed there."
    ),
    "off_policy_mask_threshold": Option(
        "float | None",
        None,
        "Sequences of negative advantage, whose mean log-probability fell by more nats since they "
        "were sampled, have no surrogate; see `off_policy_mask`. > 0; None: all have.",
    ),
}

_BELONGS_TO = {
    "epsilon": (*CLIPPED, "cispo"),
    "epsilon_high": (*CLIPPED, "cispo"),
    "delta": CLIPPED,
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "max_completion_length": ("dr_grpo",),
}


class PolicyOptions(NamedTuple):
    """What a policy loss is made of; `of` checks it."""

    loss_type: str
    importance_sampling_level: str
    epsilon: float
    epsilon_high: float
    delta: float
    """inf: none."""
    beta: float
    kl_estimator: str
    use_bias_correction_kl: bool
    entropy_coef: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    max_completion_length: int
    off_policy_mask_threshold: float | None

    @classmethod
    def of(cls, **options: Any) -> PolicyOptions:
        """The checked options; those that are not given have their defaults.

        Raises:
            ValueError: An option is out of range, or the loss does not have it.
            TypeError: There is no such option.
        """
        unknown = options.keys() - POLICY_OPTIONS.keys()
        if unknown:
            raise TypeError(f"there is no option {', '.join(sorted(unknown))} of the policy losses")
        given = {name: option.default for name, option in POLICY_OPTIONS.items()} | options
        _check_names(given)
        _check_that_the_loss_has(given)
        if given["loss_type"] == "dr_grpo" and given["max_completion_length"] is None:
            raise ValueError('loss_type="dr_grpo" needs max_completion_length')
        if given["epsilon_high"] is None:
            given["epsilon_high"] = given["epsilon"]
        for name in ("beta", "entropy_coef"):
            if not 0.0 <= given[name] < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {given[name]}")
        for name in ("epsilon", "off_policy_mask_threshold", *_BELONGS_TO):
            if given[name] is not None and not 0.0 < given[name] < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {given[name]}")
        if given["delta"] is None:
            given["delta"] = math.inf
        elif given["delta"] <= 1.0:
            raise ValueError(f"delta must be > 1, got {given['delta']}")
        given["max_completion_length"] = given["max_completion_length"] or 1
        return cls(**given)

    @property
    def by_sequences(self) -> bool:
        """Whether a token's loss is known only with the log-probabilities of its whole sequence."""
        return (
            self.importance_sampling_level != "token"
            or self.loss_type == "vespo"
            or self.off_policy_mask_threshold is not None
        )


def _check_names(given: dict[str, Any]) -> None:
    known = {
        "loss_type": LOSS_TYPES,
        "importance_sampling_level": LEVELS,
        "kl_estimator": KL_ESTIMATORS,
    }
    for name, values in known.items():
        if given[name] not in values:
            quoted = ", ".join(f'"{value}"' for value in values)
            raise ValueError(f"{name} must be one of {quoted}; got {given[name]!r}")


def _check_that_the_loss_has(given: dict[str, Any]) -> None:
    """No option is accepted and ignored."""
    kind = given["loss_type"]
    for name, owners in _BELONGS_TO.items():
        if kind not in owners and given[name] != POLICY_OPTIONS[name].default:
            raise ValueError(
                f"{name} belongs to loss_type {', '.join(owners)}; got loss_type={kind!r}"
            )
    if kind == "vespo" and given["importance_sampling_level"] != "token":
        raise ValueError("vespo has its own ratio of sequences: importance_sampling_level is token")
    two_bounds = given["epsilon_high"] is not None and (
        given["epsilon"] != POLICY_OPTIONS["epsilon"].default
    )
    if kind == "cispo" and two_bounds:
        raise ValueError("cispo has one bound: epsilon_high, or without it epsilon")
