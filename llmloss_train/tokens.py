"""Tokenises text with the Tekken vocabulary, and caches the result."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmloss_ext.cli import UserError

from .files import replace_file

_FORMAT = b"llmloss tokens 1"
_PIECE = 100_000


@dataclass(frozen=True)
class TokenText:
    """A tokenised text.

    Attributes:
        ids: The token ids of all documents in order, int32.
        vocab_size: The number of tokens in the vocabulary.
        separator: The id that ends each document.
        key: A hash of the text and the tokenizer; equal keys mean equal ids.
        cached: Whether the ids came from the cache.
    """

    ids: Tensor
    vocab_size: int
    separator: int
    key: str
    cached: bool


def load_tokens(documents: Iterable[str], max_tokens: int) -> TokenText:
    """Tokenises the documents, or reads the ids from the cache.

    Args:
        documents: The texts.
        max_tokens: The number of tokens to stop after.

    Raises:
        UserError: The installed mistral-common contains no Tekken vocabulary.
    """
    texts = list(documents)
    vocabulary = _vocabulary_file()
    key = _key(vocabulary, texts, max_tokens)
    path = _cache_folder() / f"{key}.tokens"
    cached = _read_cache(path, key)
    if cached is not None:
        return cached
    tokens = _tokenise(vocabulary, texts, max_tokens, key)
    with suppress(OSError):  # the cache only saves time: do not fail without it
        _write_cache(path, tokens)
    return tokens


@functools.cache
def _kept_tokenizer() -> Any:
    return _tokenizer(_vocabulary_file())


def separator() -> int:
    """The id that ends each document."""
    return int(_kept_tokenizer().eos_id)


def encode(text: str) -> list[int]:
    """The token ids of a text, without a separator.

    Raises:
        UserError: The installed mistral-common contains no Tekken vocabulary.
    """
    encode_piece = _kept_tokenizer().encode
    return [token for piece in _pieces(text) for token in encode_piece(piece, bos=False, eos=False)]


def _vocabulary_file() -> Path:
    """The newest Tekken vocabulary in the mistral-common package (131,072 tokens, 19 MB)."""
    folder = Path(str(resources.files("mistral_common"))) / "data"
    found = sorted(folder.glob("tekken_*.json"))
    if not found:
        raise UserError(f"mistral-common has no Tekken vocabulary (tekken_*.json) in {folder}")
    return found[-1]


def _tokenizer(vocabulary: Path) -> Any:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.from_file(str(vocabulary))


def _tokenise(vocabulary: Path, texts: list[str], max_tokens: int, key: str) -> TokenText:
    tokenizer = _tokenizer(vocabulary)
    ids = array("i")
    for text in texts:
        for piece in _pieces(text):
            ids.extend(tokenizer.encode(piece, bos=False, eos=False))
            if len(ids) >= max_tokens:
                break
        ids.append(tokenizer.eos_id)
        if len(ids) >= max_tokens:
            break
    return TokenText(
        torch.tensor(ids[:max_tokens], dtype=torch.int32),
        tokenizer.n_words,
        tokenizer.eos_id,
        key,
        cached=False,
    )


def _pieces(text: str) -> Iterator[str]:
    """Splits a long text, at line ends where possible.

    The limit on tokens then takes effect early, and the tokenizer takes linear time.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _key(vocabulary: Path, texts: list[str], max_tokens: int) -> str:
    digest = hashlib.sha256(_FORMAT)
    digest.update(hashlib.sha256(vocabulary.read_bytes()).digest())
    digest.update(f"{max_tokens} {len(texts)}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return digest.hexdigest()


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # unset, empty, or relative, which the XDG specification forbids
        home = os.path.expanduser("~/.cache")
    return Path(home) / "llmloss"


def _write_cache(path: Path, tokens: TokenText) -> None:
    payload = array("i", tokens.ids.tolist()).tobytes()
    header = {
        "vocab_size": tokens.vocab_size,
        "separator": tokens.separator,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(json.dumps(header).encode() + b"\n" + payload))


def _read_cache(path: Path, key: str) -> TokenText | None:
    """Reads the ids; None if the file is missing or damaged."""
    try:
        line, _, payload = path.read_bytes().partition(b"\n")
        header = json.loads(line)
        if header["sha256"] != hashlib.sha256(payload).hexdigest():
            return None
        ids = torch.frombuffer(bytearray(payload), dtype=torch.int32)
        return TokenText(ids, header["vocab_size"], header["separator"], key, cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
