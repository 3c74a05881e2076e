"""Other implementations, imported on demand. The extra ``peers`` installs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata

from torch import Tensor

Settings = dict[str, float]
Loss = Callable[..., Tensor]

PACKAGES = {
    "liger": ("liger-kernel", "liger_kernel.transformers.functional"),
    "cce": ("cut-cross-entropy", "cut_cross_entropy"),
    "quack": ("quack-kernels", "quack.cross_entropy"),
    "flash-attn": ("flash-attn", "flash_attn.losses.cross_entropy"),
    "apex": ("apex", "apex.contrib.xentropy"),
}
"""The distribution and the module of each."""


class UnknownOptionError(Exception):
    """The peer lacks an option."""


def status() -> dict[str, str]:
    """The version of each peer, or why it cannot be measured."""
    found = {}
    for name, (package, module) in PACKAGES.items():
        try:
            importlib.import_module(module)
            found[name] = metadata.version(package)
        except Exception as error:
            # Not only ImportError: a peer may also reject the versions or the device that it finds.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found[name] = f"not measured: {reason}"
    return found


def is_missing(state: str) -> bool:
    """Whether an entry of `status` says that the peer is not measured."""
    return state.startswith("not measured")


def liger(settings: Settings) -> Loss:
    """Liger's cross entropy, whose gradient overwrites the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    named = _named(settings, label_smoothing="label_smoothing", z_loss="lse_square_scale",
                   softcap="softcap")  # fmt: skip
    return lambda logits, target: liger_cross_entropy(logits, target, **named)


def liger_linear(settings: Settings) -> Loss:
    """Liger's linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    named = _named(settings, label_smoothing="label_smoothing", z_loss="lse_square_scale",
                   softcap="softcap")  # fmt: skip
    return lambda hidden, weight, target: liger_fused_linear_cross_entropy(
        hidden, weight, target, **named
    )


def liger_dpo(beta: float) -> Loss:
    """Liger's DPO of hidden states, the chosen sequences first."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(beta=beta, use_ref_model=True)

    def loss(
        hidden: Tensor, weight: Tensor, target: Tensor, reference_hidden: Tensor,
        reference_weight: Tensor,
    ) -> Tensor:  # fmt: skip
        made = dpo(weight, hidden.view(reference_hidden.shape), target, None, reference_hidden,
                   reference_weight)  # fmt: skip
        value: Tensor = made[0]
        return value

    return loss


def flash_attention(settings: Settings) -> Loss:
    """Flash-attention's cross entropy, whose gradient overwrites the logits."""
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    named = _named(settings, label_smoothing="label_smoothing", z_loss="lse_square_scale")
    loss: Loss = CrossEntropyLoss(inplace_backward=True, **named)
    return loss


def apex(settings: Settings) -> Loss:
    """Apex's cross entropy."""
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    smoothing = _named(settings, label_smoothing="smoothing").get("smoothing", 0.0)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # (..., padding_idx, half_to_float)
        losses = SoftmaxCrossEntropyLoss.apply(logits, target, smoothing, -100, True)
        total: Tensor = losses.sum() / (target != -100).sum()
        return total

    return loss


def cce(settings: Settings) -> Loss:
    """Apple's cut cross entropy."""
    from cut_cross_entropy import linear_cross_entropy

    named = _named(settings, softcap="softcap")
    return lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, **named)


def quack(settings: Settings) -> Loss:
    """Quack's cross entropy, whose gradient overwrites the logits."""
    from quack.cross_entropy import cross_entropy

    _named(settings)
    return lambda logits, target: cross_entropy(
        logits, target, reduction="mean", inplace_backward=True
    )


def quack_linear(settings: Settings) -> Loss:
    """Quack's chunked linear cross entropy."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _named(settings)
    return lambda hidden, weight, target: chunked_linear_cross_entropy(
        hidden, weight, target, reduction="mean"
    )


def _named(settings: Settings, **names: str) -> dict[str, float]:
    """The settings under the peer's names."""
    unknown = set(settings) - set(names)
    if unknown:
        raise UnknownOptionError(", ".join(sorted(unknown)))
    return {names[key]: value for key, value in settings.items()}
