"""KTO and BCO straight from hidden states, and no N x V logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.groups import Groups
from ..ops.rows import Rows
from ..options import documented, spelled_out
from ..statistics import FloatStats
from .from_hidden import (
    HIDDEN_OPTIONS,
    LOG_PROB,
    HiddenOptions,
    PolicyTokens,
    is_of_tokens,
    options_of_part,
)
from .pairs import check_vectors
from .sequence_scores import sequence_log_probs
from .unpaired import RunningMean, UnpairedLoss, bco_loss, kl_estimate, kto_loss

__all__ = ["linear_unpaired_loss"]


class _Mismatched(NamedTuple):
    """Completions of other prompts, by which KTO estimates its KL; as users give them."""

    kl_input: Tensor | None
    kl_target: Tensor | None
    kl_mask: Tensor | None
    kl_reference_log_probs: Tensor | None
    kl_reference_input: Tensor | None

    @property
    def given(self) -> list[str]:
        """The names of those that are there."""
        return [name for name, tensor in self._asdict().items() if tensor is not None]

    def estimate(self, linear_weight: Tensor, hidden: HiddenOptions) -> Tensor:
        """Of the KL, 0-d; the projections and all else are those of the batch.

        Raises:
            ValueError: They are not whole, or do not fit.
        """
        if self.kl_input is None or self.kl_target is None:
            raise ValueError(f"{', '.join(self.given)}: needs kl_input and kl_target")
        theirs = hidden._replace(
            mask=self.kl_mask, reference_log_probs=self.kl_reference_log_probs,
            reference_input=self.kl_reference_input,
        )  # fmt: skip
        if theirs.reference_input is None:
            theirs = theirs._replace(reference_weight=None, reference_bias=None)
        with torch.no_grad():
            policy, reference = _policy(self.kl_input, linear_weight, self.kl_target, theirs)
            return kl_estimate(sequence_log_probs(policy.log_probs(), policy.valid), reference)


class _OfSequences(NamedTuple):
    """`kto_loss` or `bco_loss` as an `Objective` over sequences, whose statistics are (1, n, S)."""

    function: Callable[..., UnpairedLoss]
    options: dict[str, Any]
    valid: Tensor
    """(B, S): which tokens count."""
    reference: Tensor
    """(B)."""
    desirable: Tensor
    """(B)."""

    def is_a_sum(self) -> bool:
        """Whether the loss is a sum over sequences, each known by itself."""
        is_reduced = self.options.get("reduction", "mean") == "mean" and len(self.valid) > 0
        return is_reduced and not isinstance(self.options.get("shift"), RunningMean)

    def __call__(self, stats: FloatStats, rows: Rows) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What some sequences add to the loss; and all scores, 0 where they are others'."""
        assert isinstance(rows, slice)
        count = len(self.valid)
        scores = sequence_log_probs(stats.log_prob[0], self.valid[rows])
        of_all = F.pad(scores.detach(), (rows.start, count - rows.stop))
        return self.of(scores, rows).loss, (of_all,)

    def of(self, scores: Tensor, at: slice) -> UnpairedLoss:
        """The loss of some sequences, over the number of all."""
        options = options_of_part(self.options, ("weight",), at, len(self.valid))
        return self.function(scores, self.reference[at], self.desirable[at], **options)


def linear_unpaired_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    desirable: Tensor,
    loss: str = "kto",
    kl: Tensor | None = None,
    kl_input: Tensor | None = None,
    kl_target: Tensor | None = None,
    kl_mask: Tensor | None = None,
    kl_reference_log_probs: Tensor | None = None,
    kl_reference_input: Tensor | None = None,
    reward_shift: RunningMean | Tensor | float | None = None,
    **options: Any,
) -> UnpairedLoss:
    """`kto_loss` or `bco_loss` of hidden states: each sequence is good or bad by itself.

    A token's gradient is known with its sequence's log-probability. So whole sequences go through
    the projection, one or more in a chunk: three matrix products for the policy. Where the logits
    of the longest take more than 1 GiB (or the weight, if that is more), or than ``chunk_tokens``
    or ``max_chunk_bytes`` allow, chunks cut sequences, and backward computes the logits again:
    four. So it does with a `RunningMean`, which has to see all first, with ``reduction="none"`` and
    in compiled graphs. A reference that is given by its hidden states takes one product more;
    an estimate of the KL two of its own rows, one for the policy and one for the reference. These
    come one after the other, before the policy's chunks, and none has a gradient.

    Where the paper (Ethayarajh et al. 2024) and trainers differ, it is as TRL's KTOTrainer: the
    policy's log-probabilities of completions that belong to other prompts are computed without a
    gradient; the KL is the mean of log pi - log ref over all of them (sums over tokens), clamped at
    0, one number for the batch; the loss is the mean over sequences, whatever their weights.
    Liger's `LigerFusedLinearKTOLoss` takes that number as its ``kl``.

    Args:
        input: The policy's hidden states (B, S, D).
        linear_weight: The policy's projection (V, D).
        target: (B, S) int64 or int32; ``ignore_index`` at prompts and padding.
        desirable: (B) bool, or 0 and 1.
        loss: ``"kto"`` or ``"bco"``.
        kl: Of kto: 0-d, an estimate that is there already, such as `kl_estimate` of the
            log-probabilities of all ranks. Or:
        kl_input: (C, T, D), the policy's hidden states of mismatched completions, with their
        kl_target: (C, T), and where tokens are to be left out
        kl_mask: (C, T). The reference's:
        kl_reference_log_probs: (C) or (C, T); or
        kl_reference_input: (C, T, E), with the ``reference_weight`` of the batch.
        reward_shift: Of bco: the ``shift`` of `bco_loss`.
        **options: Those of the function that ``loss`` names (kind, beta, desirable_weight, weight,
            num_items, reduction ...).
        Options: each is described in `llmloss_ext.options`.

    Returns:
        An `UnpairedLoss`.

    Raises:
        ValueError: Shapes that do not fit, an option out of range or not of this loss, or no
            reference.
        IndexError: A target outside [0, vocab_size) that is not ``ignore_index``.
        RuntimeError: A wrong dtype or device.

    Example:
        >>> linear_unpaired_loss(
        ...     model.body(ids), model.head.weight, labels, shift=1, desirable=good,
        ...     reference_input=reference.body(ids), reference_weight=reference.head.weight,
        ...     kl_input=model.body(others), kl_target=other_labels,
        ...     kl_reference_input=reference.body(others),
        ... ).loss
    """
    mismatched = _Mismatched(
        kl_input, kl_target, kl_mask, kl_reference_log_probs, kl_reference_input
    )
    hidden, given = HiddenOptions.split(options)
    if loss == "kto":
        if reward_shift is not None:
            raise ValueError('reward_shift belongs to loss="bco", got "kto"')
        if kl is not None and mismatched.given:
            raise ValueError(f"kl is given already, and {', '.join(mismatched.given)} as well")
        if given.get("kind", "kto") != "kto" and mismatched.given:
            raise ValueError(f'{mismatched.given[0]} belongs to kind="kto", got {given["kind"]!r}')
    elif loss == "bco":
        if kl is not None or mismatched.given:
            name = "kl" if kl is not None else mismatched.given[0]
            raise ValueError(f'{name} belongs to loss="kto", got "bco"')
        if reward_shift is None:
            raise ValueError('loss="bco" needs a reward_shift')
    else:
        raise ValueError(f"loss must be one of kto, bco, got {loss!r}")
    if mismatched.given:
        kl = mismatched.estimate(linear_weight, hidden)
    policy, reference = _policy(input, linear_weight, target, hidden)
    check_vectors(reference=reference, desirable=desirable, weight=given.get("weight"))
    extra = {"kl": kl} if loss == "kto" else {"shift": reward_shift}
    function = kto_loss if loss == "kto" else bco_loss
    objective = _OfSequences(function, given | extra, policy.valid, reference, desirable)
    sequences = Groups(1, *policy.shape)
    if not objective.is_a_sum():
        scores = sequence_log_probs(policy.log_probs(), policy.valid)
        return objective.of(scores, slice(0, len(scores)))
    found = policy.walk(objective, LOG_PROB, sequences, items=sequences.number)
    (of_all,) = found.metrics
    assert of_all is not None
    with torch.no_grad():
        return objective.of(of_all, slice(0, len(of_all)))._replace(loss=found.loss)


spelled_out(linear_unpaired_loss, HIDDEN_OPTIONS, HIDDEN_OPTIONS, with_others=True)
documented(linear_unpaired_loss, HIDDEN_OPTIONS, HIDDEN_OPTIONS)


def _policy(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: HiddenOptions
) -> tuple[PolicyTokens, Tensor]:
    """The policy's tokens, and the reference's log-probabilities of the sequences, (B)."""
    policy = PolicyTokens(input, linear_weight, target, options)
    if policy.valid.dim() != 2:
        raise ValueError(f"expected hidden states (B, S, D), got {tuple(input.shape)}")
    reference = policy.reference()
    if reference is None:
        raise ValueError("a reference is needed: reference_log_probs, or reference_input")
    if is_of_tokens(reference, policy.valid):
        reference = sequence_log_probs(reference, policy.valid)
    return policy, reference
