"""Masked language modelling (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..linear import linear_cross_entropy
from .objective import check_projection

__all__ = ["mask_tokens", "mlm_loss"]


def mask_tokens(
    input_ids: Tensor,
    mask_token_id: int,
    vocab_size: int,
    *,
    special_tokens: Iterable[int] = (),
    maskable: Tensor | None = None,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses tokens to predict, and hides them (Devlin et al. 2019).

    Each maskable position is chosen with ``probability``. Of the chosen, ``mask_share`` become the
    mask token, ``random_share`` a random token, and the others stay.

    Args:
        input_ids: Any shape, int64 or int32. Not modified.
        mask_token_id: What hides a token, in [0, vocab_size).
        vocab_size: Random tokens are drawn from [0, vocab_size).
        special_tokens: Ids that are never chosen (padding, separators ...).
        maskable: bool, of the same shape: positions that may be chosen besides.
        probability: In [0, 1].
        mask_share: In [0, 1].
        random_share: In [0, 1 - mask_share].
        ignore_index: Label of positions that are not chosen.
        generator: Makes the choice repeatable; on the ids' device.

    Returns:
        The new ids, and the labels: the old id where chosen, else ``ignore_index``; both of the
        ids' shape and dtype.

    Raises:
        ValueError: A share or size is out of range, the shapes do not fit, or the ids are not of
            int64 or int32.
    """
    for name, share in (("probability", probability), ("mask_share", mask_share),
                        ("random_share", random_share)):  # fmt: skip
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {share}")
    if mask_share + random_share > 1.0 + 1e-9:
        raise ValueError(
            f"mask_share and random_share must not exceed 1 together, got "
            f"{mask_share} + {random_share}"
        )
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id must be in [0, vocab_size), got {mask_token_id} and {vocab_size}"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):  # others cannot hold the labels
        raise ValueError(f"input_ids must be of int64 or int32, got {input_ids.dtype}")
    allowed = torch.ones_like(input_ids, dtype=torch.bool) if maskable is None else maskable.bool()
    if allowed.shape != input_ids.shape:
        raise ValueError(
            f"maskable must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(allowed.shape)}"
        )
    for token in special_tokens:
        allowed = allowed & (input_ids != token)

    def uniform() -> Tensor:
        return torch.rand(input_ids.shape, generator=generator, device=input_ids.device)

    chosen = (uniform() < probability) & allowed
    labels = torch.where(chosen, input_ids, ignore_index)
    how = uniform()
    others = torch.randint(
        vocab_size, input_ids.shape, generator=generator, device=input_ids.device,
        dtype=input_ids.dtype,
    )  # fmt: skip
    hidden = torch.where(chosen & (how < mask_share), mask_token_id, input_ids)
    is_random = chosen & (how >= mask_share) & (how < mask_share + random_share)
    return torch.where(is_random, others, hidden), labels


def mlm_loss(
    input: Tensor,
    labels: Tensor,
    linear_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    drop_ignored: bool | None = None,
    **options: Any,
) -> Tensor:
    """Mean cross entropy of the chosen positions (Devlin et al. 2019).

    Args:
        input: Hidden states (..., D) if ``linear_weight`` is given, else logits (..., V). From
            hidden states, logits are computed at the chosen positions only (see
            ``drop_ignored``), and never in memory whole.
        labels: (...), ``ignore_index`` where not chosen.
        linear_weight: The projection (V, D).
        linear_bias: (V), with ``linear_weight``.
        ignore_index: Label of positions that are not chosen.
        num_items: What the sum over positions is divided by in place of their number: the chosen
            positions of all micro-batches of a step.
        drop_ignored: With ``linear_weight``: as in `llmloss_ext.linear_cross_entropy`. By default
            on a CPU; on CUDA it has to wait for the device to know the number of positions.
        **options: Of the loss, as both functions have them: ``label_smoothing``, ``z_loss`` ...

    Returns:
        0-d, in nats; 0 with a graph where no position is chosen.

    Raises:
        ValueError: The shapes do not fit, or an option belongs to a projection
            that is not given.
    """
    check_projection(linear_weight, linear_bias=linear_bias, drop_ignored=drop_ignored)
    if num_items is None:
        num_items = (labels != ignore_index).sum()  # 0: the loss is 0, not 0 / 0
    if linear_weight is None:
        return functional.cross_entropy(
            input, labels, ignore_index=ignore_index, num_items=num_items, class_dim=-1, **options
        )
    return linear_cross_entropy(
        input, linear_weight, labels, linear_bias=linear_bias, ignore_index=ignore_index,
        num_items=num_items, drop_ignored=drop_ignored, **options,
    )  # fmt: skip
