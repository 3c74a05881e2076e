"""DPO and its kin: losses over pairs of sequences, with the log-probabilities of a reference.

They take one log-probability a sequence (`.sequence_scores`), so that they work from logits and
from hidden states alike. Without a reference: `.reference_free`; without pairs: `.unpaired`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import documented
from .bounded import bounded_exponent, finite, finite_gradient
from .pairs import (
    PREFERENCE_OPTIONS,
    PreferenceLoss,
    check_call,
    check_number,
    constant,
    reduced,
    result,
    smoothed,
    working,
)

__all__ = ["KINDS", "dpo_loss"]


class Pairs(NamedTuple):
    """What a kind is a function of: one number a pair each, in float32 or float64."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen: Tensor
    """The log-ratio to the reference."""
    rejected: Tensor
    chosen_score: Tensor
    """Of the divergence: the log-ratio, for the reverse KL."""
    rejected_score: Tensor

    def margin(self) -> Tensor:
        """By how much the chosen one has the higher score."""
        return finite(self.chosen_score - self.rejected_score)


# ------------------------------------------------------------------------------------ the formulas


def _sigmoid(pairs: Pairs, beta: float, *, label_smoothing: float) -> Tensor:
    return smoothed(finite(beta * pairs.margin()), label_smoothing)


def _sigmoid_norm(
    pairs: Pairs, beta: float, *, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    return -F.logsigmoid(finite(beta * _by_length(pairs, chosen_lengths, rejected_lengths)))


def _hinge(pairs: Pairs, beta: float) -> Tensor:
    return finite(torch.relu(1 - beta * pairs.margin()))


def _ipo(
    pairs: Pairs, beta: float, *, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> Tensor:
    return _square(_by_length(pairs, chosen_lengths, rejected_lengths) - 1 / (2 * beta))


def _robust(pairs: Pairs, beta: float, *, label_smoothing: float) -> Tensor:
    margin = finite(beta * pairs.margin())
    clean = -(1 - label_smoothing) * F.logsigmoid(margin)
    flipped = -label_smoothing * F.logsigmoid(-margin)
    return finite((clean - flipped) / (1 - 2 * label_smoothing))


def _exo_pair(pairs: Pairs, beta: float, *, label_smoothing: float) -> Tensor:
    margin = finite(beta * pairs.margin())
    chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return chosen + rejected


def _nca_pair(pairs: Pairs, beta: float) -> Tensor:
    chosen, rejected = finite(beta * pairs.chosen), finite(beta * pairs.rejected)
    chosen_loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen)
    return finite(chosen_loss - 0.5 * F.logsigmoid(-rejected))


def _bco_pair(pairs: Pairs, beta: float) -> Tensor:
    chosen, rejected = finite(beta * pairs.chosen), finite(beta * pairs.rejected)
    return finite(-F.logsigmoid(chosen) - F.logsigmoid(-rejected))


def _sppo_hard(pairs: Pairs, beta: float) -> Tensor:
    return finite(_square(pairs.chosen - 0.5 / beta) + _square(pairs.rejected + 0.5 / beta))


def _aot(pairs: Pairs, beta: float, *, label_smoothing: float) -> Tensor:
    policy = finite(pairs.policy_chosen - pairs.policy_rejected)
    reference = finite(pairs.reference_chosen - pairs.reference_rejected)
    margin = finite(policy.sort(0).values - reference.sort(0).values)
    return smoothed(finite(beta * margin), label_smoothing)


def _aot_unpaired(pairs: Pairs, beta: float, *, label_smoothing: float) -> Tensor:
    margin = finite(pairs.chosen.sort(0).values - pairs.rejected.sort(0).values)
    return smoothed(finite(beta * margin), label_smoothing)


def _apo_zero(pairs: Pairs, beta: float) -> Tensor:
    # 1 - sigma(x) = sigma(-x), which keeps its digits as it goes to 0.
    return torch.sigmoid(-finite(beta * pairs.chosen)) + torch.sigmoid(
        finite(beta * pairs.rejected)
    )


def _apo_down(pairs: Pairs, beta: float) -> Tensor:
    margin = finite(pairs.chosen - pairs.rejected)
    return torch.sigmoid(finite(beta * pairs.chosen)) + torch.sigmoid(-finite(beta * margin))


def _discopop(pairs: Pairs, beta: float, *, discopop_tau: float) -> Tensor:
    margin = finite(beta * pairs.margin())
    in_tau = finite(margin / discopop_tau)
    logistic = -F.logsigmoid(margin) * torch.sigmoid(-in_tau)
    # e^-m sigma(m / tau) in one exponent: of its two factors, one may overflow while one is 0.
    exponential = torch.exp(bounded_exponent(finite(F.logsigmoid(in_tau) - margin)))
    return finite(logistic + exponential)


def _square(x: Tensor) -> Tensor:
    return finite(x * x)  # the derivative of square() would overflow by its 2


def _by_length(
    pairs: Pairs, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> Tensor:
    """The margin, of the scores over their numbers of tokens."""
    if chosen_lengths is None or rejected_lengths is None:
        return pairs.margin()
    chosen = pairs.chosen_score / chosen_lengths.clamp_min(1)
    return finite(chosen - pairs.rejected_score / rejected_lengths.clamp_min(1))


class Kind(NamedTuple):
    """A kind of loss over pairs."""

    formula: Callable[..., Tensor] | None
    """Its keyword arguments are the options that the kind takes. None: it is ``nll_loss``."""
    of_scores: bool = False
    """It is a function of the scores' margin: any divergence goes."""
    of_ranks: bool = False
    """It sorts the batch, and so has no loss of a pair to weigh."""

    def options(self) -> frozenset[str]:
        """The options that it takes, besides beta, the reduction and the number of items."""
        if self.formula is None:
            return frozenset({"nll_loss"})
        found = {
            p.name
            for p in inspect.signature(self.formula).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        if self.of_scores:
            found |= {"f_divergence_type", "f_alpha_divergence_coef"}
        return frozenset(found if self.of_ranks else found | {"pair_weight"})


KINDS = {
    "sigmoid": Kind(_sigmoid, of_scores=True),
    "sigmoid_norm": Kind(_sigmoid_norm, of_scores=True),
    "hinge": Kind(_hinge, of_scores=True),
    "ipo": Kind(_ipo, of_scores=True),
    "robust": Kind(_robust, of_scores=True),
    "exo_pair": Kind(_exo_pair, of_scores=True),
    "nca_pair": Kind(_nca_pair),
    "bco_pair": Kind(_bco_pair),
    "sppo_hard": Kind(_sppo_hard),
    "aot": Kind(_aot, of_ranks=True),
    "aot_unpaired": Kind(_aot_unpaired, of_ranks=True),
    "apo_zero": Kind(_apo_zero),
    "apo_down": Kind(_apo_down),
    "discopop": Kind(_discopop, of_scores=True),
    "sft": Kind(None),
}
"""The kinds of `dpo_loss`: the names of TRL's DPOTrainer."""

_OPTIONS = {kind: entry.options() for kind, entry in KINDS.items()}


# ---------------------------------------------------------------------------------- the divergences


def _reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return log_ratio


def _forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return 1 - torch.exp(bounded_exponent(-log_ratio))


def _js_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(log_ratio)


def _alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    exponent = bounded_exponent(finite((alpha - 1) * log_ratio))
    return finite(torch.expm1(exponent) / (alpha - 1))


_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


# ----------------------------------------------------------------------------------------- the loss


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    kind: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weight: Tensor | None = None,
    nll_loss: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> PreferenceLoss:
    """Direct preference optimisation, the mean over pairs, and its kin.

    With d the log-ratio log pi - log ref of a sequence (c: chosen, r: rejected), s its score (d,
    but for another divergence) and h = s_c - s_r, the kinds are those of TRL's DPOTrainer:

    ``sigmoid``: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h) (Rafailov et al. 2023; eps:
    Mitchell 2023, which TRL no longer has). ``sigmoid_norm``: -log sigma(beta h) with the scores
    over the lengths (Lambert et al. 2024). ``hinge``: max(0, 1 - beta h) (Zhao et al. 2023, SLiC).
    ``ipo``: (h - 1 / (2 beta))^2 (Azar et al. 2023), with the scores over the lengths if these are
    given, as its authors and TRL have it. ``robust``: ((eps - 1) log sigma(beta h) + eps
    log sigma(-beta h)) / (1 - 2 eps) (Chowdhury et al. 2024). ``exo_pair``: KL of (sigma(beta h),
    sigma(-beta h)) to (1 - eps, eps), eps > 0 (Ji et al. 2024). ``nca_pair``: -log sigma(beta d_c)
    - log sigma(-beta d_c) / 2 - log sigma(-beta d_r) / 2 (Chen et al. 2024). ``bco_pair``:
    -log sigma(beta d_c) - log sigma(-beta d_r) (Jung et al. 2024, without its shift).
    ``sppo_hard``: (d_c - 1 / (2 beta))^2 + (d_r + 1 / (2 beta))^2 (Wu et al. 2024, with the
    probabilities 1 and 0). ``aot``: ``sigmoid`` of the sorted log pi_c - log pi_r minus the sorted
    log ref_c - log ref_r; ``aot_unpaired``: of the sorted d_c minus the sorted d_r (Melnyk et al.
    2024). ``apo_zero``: sigma(-beta d_c) + sigma(beta d_r); ``apo_down``: sigma(beta d_c) +
    sigma(-beta (d_c - d_r)) (D'Oosterlinck et al. 2024). ``discopop``: -log sigma(beta h)
    (1 - m) + e^(-beta h) m, m = sigma(beta h / tau) (Lu et al. 2024). ``sft``: ``nll_loss``; as in
    ``kind=("sigmoid", "sft")`` with ``loss_weights=(1, a)`` (RPO, Pang et al. 2024, who average
    over each sequence's tokens; TRL over those of the batch). It is added once to the mean, and not
    weighted by ``pair_weight`` (TRL multiplies it by the mean weight).

    An option that no kind takes, and a divergence or a weight of pairs that not every kind (but
    ``sft``) takes, is an error. For LD-DPO see `length_desensitized_log_probs`.

    Args:
        policy_chosen: (B) log-probabilities of sequences, see `sequence_log_probs`.
        policy_rejected: (B).
        reference_chosen: (B), without a gradient.
        reference_rejected: (B), without a gradient.
        Options: each is described in `llmloss_ext.options`.

    Returns:
        A `PreferenceLoss`; the rewards are beta (log pi - log ref) in nats, whatever the
        divergence. float64 for float64, else float32. Finite log-probabilities give a finite loss
        and gradient. Micro-batches with ``num_items`` add up to the batch, but for ``aot`` and
        ``aot_unpaired``, which sort it (and whose losses without a reduction belong to ranks, not
        to pairs).

    Raises:
        ValueError: The shapes differ, or an option is out of range or not one of the kind's.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    weights = (1.0,) * len(kinds) if loss_weights is None else tuple(loss_weights)
    check_call(
        beta, reduction, nll_loss,
        policy_chosen=policy_chosen, policy_rejected=policy_rejected,
        reference_chosen=reference_chosen, reference_rejected=reference_rejected,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, pair_weight=pair_weight,
    )  # fmt: skip
    options = {
        "label_smoothing": label_smoothing,
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef,
        "discopop_tau": discopop_tau,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "pair_weight": pair_weight,
        "nll_loss": nll_loss,
    }
    _check_kinds(kinds, weights)
    _check_taken(kinds, options)
    _check_values(kinds, options)

    pairs = _pairs_of(
        working(policy_chosen), working(policy_rejected),
        constant(reference_chosen), constant(reference_rejected),
        f_divergence_type, f_alpha_divergence_coef,
    )  # fmt: skip
    losses: Tensor | None = None
    added: Tensor | float = 0.0
    for name, weight in zip(kinds, weights, strict=True):
        entry = KINDS[name]
        if entry.formula is None:
            assert nll_loss is not None
            added = added + weight * nll_loss
            continue
        taken = _OPTIONS[name] - {"pair_weight", "f_divergence_type", "f_alpha_divergence_coef"}
        each = entry.formula(pairs, beta, **{option: options[option] for option in taken})
        each = each if weight == 1 else finite(weight * each)
        losses = each if losses is None else finite(losses + each)
    if losses is None:
        losses = torch.zeros_like(pairs.chosen)
    if pair_weight is not None:
        losses = finite(losses * pair_weight.detach().to(losses.dtype))
    return result(
        reduced(losses, reduction, num_items, added),
        finite(beta * pairs.chosen), finite(beta * pairs.rejected),
        pairs.policy_chosen, pairs.policy_rejected, nll_loss,
    )  # fmt: skip


documented(dpo_loss, table=PREFERENCE_OPTIONS)


def _pairs_of(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    divergence: str,
    alpha: float,
) -> Pairs:
    chosen = finite(policy_chosen - reference_chosen)
    rejected = finite(policy_rejected - reference_rejected)
    scores = (chosen, rejected)
    if divergence != "reverse_kl":
        # A gradient that is inf would be nan after an exponential that is 0.
        of = _DIVERGENCES[divergence]
        scores = (finite_gradient(of(chosen, alpha)), finite_gradient(of(rejected, alpha)))
    return Pairs(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        chosen,
        rejected,
        *scores,
    )


def _check_kinds(kinds: tuple[str, ...], weights: tuple[float, ...]) -> None:
    unknown = [name for name in kinds if name not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kind must be one or some of {', '.join(KINDS)}; got {unknown or kinds}")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"kind must name each loss once, got {kinds}")
    if len(weights) != len(kinds) or not all(-math.inf < weight < math.inf for weight in weights):
        raise ValueError(f"loss_weights must be a finite number for each of {kinds}, got {weights}")


_OF_ALL = ("f_divergence_type", "f_alpha_divergence_coef", "pair_weight")
"""Options that would be ignored by a kind beside another that takes them."""


def _check_taken(kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    """Raises a ValueError for an option that would be ignored."""
    of_pairs = [name for name in kinds if KINDS[name].formula is not None]
    for option, value in options.items():
        default = PREFERENCE_OPTIONS[option].default
        if value is default or (default is not None and value == default):
            continue
        takers = [name for name, taken in _OPTIONS.items() if option in taken]
        needed = all if option in _OF_ALL and of_pairs else any
        asked = of_pairs if option in _OF_ALL else kinds
        if not needed(name in takers for name in asked):
            raise ValueError(
                f"{option} belongs to kind {', '.join(takers)}; got kind={', '.join(kinds)}"
            )


def _check_values(kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    check_number("label_smoothing", options["label_smoothing"], below=0.5)
    check_number("discopop_tau", options["discopop_tau"], strict=True)
    divergence, alpha = options["f_divergence_type"], options["f_alpha_divergence_coef"]
    if divergence not in _DIVERGENCES:
        raise ValueError(
            f"f_divergence_type must be one of {', '.join(_DIVERGENCES)}, got {divergence!r}"
        )
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"f_alpha_divergence_coef must be a finite number, got {alpha}")
    default = PREFERENCE_OPTIONS["f_alpha_divergence_coef"].default
    if alpha != default and divergence != "alpha_divergence":
        raise ValueError(
            f'f_alpha_divergence_coef belongs to f_divergence_type="alpha_divergence", '
            f"got {divergence!r}"
        )
    lengths = [options["chosen_lengths"], options["rejected_lengths"]]
    missing = [length is None for length in lengths]
    if any(missing) and ("sigmoid_norm" in kinds or not all(missing)):
        raise ValueError("both chosen_lengths and rejected_lengths are needed")
    if "exo_pair" in kinds and options["label_smoothing"] == 0:
        raise ValueError('kind="exo_pair" needs a label_smoothing > 0 (its authors: 1e-3)')
    if "sft" in kinds and options["nll_loss"] is None:
        raise ValueError('kind="sft" needs nll_loss')
