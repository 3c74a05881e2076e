"""A plugin of axolotl: causal language models compute their loss from the hidden states.

In the config of a run::

    plugins:
      - llmloss_ext.integrations.axolotl.LinearCrossEntropyPlugin
    llmloss_logits: none        # or last, argmax, all: what an evaluation step returns
    llmloss_options:            # of llmloss_ext.linear_cross_entropy
      z_loss: 1.0e-4
"""

from __future__ import annotations

from typing import Any

from .transformers import Logits, use_linear_cross_entropy
from .versions import check_version

check_version("axolotl", "0.19")

from axolotl.integrations.base import BasePlugin  # noqa: E402
from pydantic import BaseModel, model_validator  # noqa: E402

__all__ = ["LinearCrossEntropyArgs", "LinearCrossEntropyPlugin"]

_OTHERS = (
    "chunked_cross_entropy",
    "cut_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


class LinearCrossEntropyArgs(BaseModel):  # type: ignore[misc]
    """What the plugin adds to axolotl's config."""

    llmloss_logits: Logits = "last"
    """``logits`` of `llmloss_ext.integrations.transformers.use_linear_cross_entropy`."""
    llmloss_options: dict[str, Any] = {}
    """Its options."""

    @model_validator(mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def refuse_others(cls, data: Any) -> Any:
        """Raises a ValueError if another plugin or option replaces the loss."""
        given = [name for name in _OTHERS if data.get(name)]
        if given:
            raise ValueError(f"LinearCrossEntropyPlugin takes the place of {', '.join(given)}")
        return data


class LinearCrossEntropyPlugin(BasePlugin):  # type: ignore[misc]
    """Calls `use_linear_cross_entropy` on each model, before its adapters and wrappers."""

    def get_input_args(self) -> str:
        """The name of `LinearCrossEntropyArgs`."""
        return f"{__name__}.{LinearCrossEntropyArgs.__name__}"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Patches the model.

        Raises:
            ValueError: As `use_linear_cross_entropy`: the model or an option will not do.
        """
        use_linear_cross_entropy(
            model, logits=cfg.llmloss_logits or "last", **(cfg.llmloss_options or {})
        )
