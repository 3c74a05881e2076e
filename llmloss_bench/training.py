"""A training step of a small Llama of transformers, stock and with this library's losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, UnsupportedError

LAYERS = 2


def llama(vocab: int, hidden: int, layers: int, tokens: int) -> Any:
    """A Llama with seeded weights, whose output layer dominates.

    Args:
        vocab: The vocabulary size.
        hidden: D.
        layers: The number of layers.
        tokens: Those of a sequence.

    Raises:
        UnsupportedError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(f"{error.name} is not installed") from error
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=tokens,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class ModelInputs:
    """A model, whose parameters get gradients, and a batch of random tokens."""

    def __init__(self, case: Case) -> None:
        """Makes them.

        Raises:
            UnsupportedError: transformers is not installed.
        """
        length = case.rows // case.sequences
        model = llama(case.columns, case.features, LAYERS, length)
        self.model = model.to(case.device, case.torch_dtype)
        generator = torch.Generator(case.device).manual_seed(1)
        self.target = torch.randint(
            0, case.columns, (case.sequences, length), generator=generator, device=case.device
        )

    @property
    def constants(self) -> tuple[Any, ...]:
        """The model, and the tokens."""
        return self.model, self.target

    def fresh(self) -> tuple[Tensor, ...]:
        """The model's parameters, with their gradients cleared."""
        self.model.zero_grad()
        return tuple(self.model.parameters())


def stock() -> Callable[..., Tensor]:
    """The loss of transformers."""
    return _of_model(lambda model: None)


def from_logits() -> Callable[..., Tensor]:
    """This library's, from the model's logits."""
    from llmloss_ext.integrations.transformers import causal_lm_loss

    def patch(model: Any) -> None:
        model.loss_function = causal_lm_loss

    return _of_model(patch)


def from_hidden() -> Callable[..., Tensor]:
    """This library's, from the model's hidden states."""
    from llmloss_ext.integrations.transformers import use_linear_cross_entropy

    return _of_model(lambda model: use_linear_cross_entropy(model, logits="none"))


def _of_model(patch: Callable[[Any], object]) -> Callable[..., Tensor]:
    made: list[Any] = []

    def loss(*arguments: Any) -> Tensor:
        *parameters, model, tokens = arguments
        if not made:
            # Another model for each contender, but with the same parameters.
            made.append(copy.deepcopy(model, {id(p): p for p in parameters}))
            patch(made[0])
        value: Tensor = made[0](input_ids=tokens, labels=tokens).loss
        return value

    return loss
