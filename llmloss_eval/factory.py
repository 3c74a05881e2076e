"""A module of the user's, made by ``module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmloss_ext.cli import UserError, first_line
from llmloss_ext.integrations.scoring import TokenScorer

from .language_model import LanguageModel, with_dtype


def open_factory(name: str, device: torch.device, dtype: str) -> LanguageModel:
    """Calls a function without arguments for a module, or a module and its tokenizer.

    The module makes logits (B, S, V) of token ids (B, S). The tokenizer is a function from a text
    to its ids; without one, the tokens are the text's bytes. What the module says of itself as
    ``context`` (tokens) and ``separator`` (the token before an empty context) is used.

    Raises:
        UserError: There is no such function, it fails, or it returns something else.
    """
    with _current_folder():
        made = _call(name)
    module, encode = made if isinstance(made, tuple) and len(made) == 2 else (made, _bytes)
    if not isinstance(module, nn.Module) or not callable(encode):
        raise UserError(
            f"{name} must return a torch.nn.Module, or one and a function from a text to token "
            f"ids, got {type(made).__name__}"
        )
    module = with_dtype(module, dtype).to(device)
    try:
        scorer = TokenScorer(module, torch.zeros(1, 2, dtype=torch.int64, device=device))
    except Exception as error:  # of the user's code
        raise _failure(name, "cannot be evaluated", error) from error
    return LanguageModel(
        name=name,
        module=module,
        score=scorer,
        encode=_checked(name, encode),
        separator=_integer(name, module, "separator"),
        context=_integer(name, module, "context", least=1),
        vocab_size=scorer.vocab_size,
        from_hidden=scorer.from_hidden,
    )


def _call(name: str) -> Any:
    place, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(place)
    except Exception as error:
        raise _failure(name, f"cannot import {place}", error) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{name}: {place} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name} is not a function")
    try:
        return found()
    except Exception as error:
        raise _failure(name, "failed", error) from error


def _failure(name: str, what: str, error: Exception) -> UserError:
    return UserError(f"{name}: {what}: {type(error).__name__}: {first_line(error)}")


@contextmanager
def _current_folder() -> Iterator[None]:
    """Finds modules in the current folder, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def _checked(name: str, encode: Callable[[str], Any]) -> Callable[[str], list[int]]:
    """The tokenizer, whose mistakes are told in one line."""

    def checked(text: str) -> list[int]:
        try:
            return [int(token) for token in encode(text)]
        except Exception as error:
            raise _failure(name, "its tokenizer failed", error) from error

    return checked


def _integer(name: str, module: nn.Module, attribute: str, least: int = 0) -> int | None:
    value = getattr(module, attribute, None)
    if value is None or (type(value) is int and value >= least):
        return value
    raise UserError(f"{name}: {attribute} must be an integer of at least {least}, got {value!r}")
