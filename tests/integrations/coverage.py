"""How many of transformers' classes `use_linear_cross_entropy` takes, and why not the others.

    python tests/integrations/coverage.py

Each is made from its default config, on the meta device. docs/integrations.md has the counts.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

KINDS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM")


def models_of(kind: str) -> dict[str, Any]:
    """By name; a class that its default config cannot make is left out."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    models = {}
    for config_name, names in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").items():
        for name in [names] if isinstance(names, str) else names:
            try:
                config = configuration_auto.CONFIG_MAPPING[config_name]()
                if kind == "CAUSAL_LM" and hasattr(config, "is_decoder"):
                    config.is_decoder = True
                with torch.device("meta"):
                    models[name] = getattr(transformers, name)._from_config(config)
            except Exception:  # whatever such a config lacks
                continue
    return models


def main() -> None:
    """Prints the counts, and what is refused."""
    import transformers

    from llmloss_ext.integrations.transformers import use_linear_cross_entropy

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    for kind in KINDS:
        models, refused = models_of(kind), defaultdict(list)
        for name, model in models.items():
            try:
                use_linear_cross_entropy(model, logits="last")
            except ValueError as error:
                refused[str(error).replace(name, "it")].append(name)
        taken = len(models) - sum(map(len, refused.values()))
        print(f"{kind}: {taken} of {len(models)}")
        for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
            print(f"  {len(names)}: {why}: {', '.join(names)}")


if __name__ == "__main__":
    main()
