"""Models of Hugging Face transformers, from a folder: the network is never asked."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from llmloss_ext.cli import UserError, first_line
from llmloss_ext.integrations.scoring import TokenScorer

from .language_model import LanguageModel, with_dtype


def open_pretrained(name: str, device: torch.device, dtype: str) -> LanguageModel:
    """Opens a folder that ``save_pretrained`` of a causal model and of its tokenizer have written.

    Raises:
        UserError: transformers is missing, or the folder is incomplete or damaged.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{name} needs transformers: pip install 'llmloss_ext[eval]'")
    import transformers

    library: Any = transformers  # whose types are not whole
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(name, local_files_only=True)
        model, found = library.AutoModelForCausalLM.from_pretrained(
            name, local_files_only=True, output_loading_info=True, torch_dtype="auto"
        )
    except Exception as error:  # of any kind, by what is wrong in which file
        raise UserError(f"cannot open {name}: {first_line(error)}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"{name} lacks {len(missing)} of the model's weights, such as {missing[0]}")
    model = with_dtype(model, dtype).to(device)
    prefix = _prefix(tokenizer)
    try:
        scorer = TokenScorer(model, torch.zeros(1, 2, dtype=torch.int64, device=device))
    except Exception as error:
        raise UserError(
            f"{name} cannot be evaluated: {type(error).__name__}: {first_line(error)}"
        ) from error
    separators = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return LanguageModel(
        name=name,
        module=model,
        score=scorer,
        encode=lambda text: list(tokenizer(text, add_special_tokens=False).input_ids),
        prefix=prefix,
        separator=next((token for token in separators if token is not None), None),
        context=_context(model.config),
        vocab_size=scorer.vocab_size,
        from_hidden=scorer.from_hidden,
    )


def _prefix(tokenizer: Any) -> list[int]:
    """The token that begins each text, if the tokenizer puts one there by itself."""
    ids = list(tokenizer("a").input_ids)
    has_one = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return ids[:1] if has_one else []


def _context(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None
