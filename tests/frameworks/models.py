"""The tiny models that the trainers train, and their batches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

VOCAB = 37


def tiny_llama(*, tied: bool = False, **changes: Any) -> Any:
    """The same random weights each time."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).train()


def batch_of(seed: int, rows: int = 2, tokens: int = 7) -> dict[str, Tensor]:
    """Token ids and labels, some of which are ignored: another number on every rank."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[0, : 1 + seed % 4] = -100
    return {"input_ids": ids, "labels": labels}


def uncompiled_deepspeed() -> AbstractContextManager[Any]:
    """Without its own collectives over shared memory, which take half a minute to compile."""
    from deepspeed.comm.torch import TorchBackend

    return mock.patch.dict(TorchBackend.__init__.__globals__, build_shm_op=lambda: None)
