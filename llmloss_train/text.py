"""The text to train on: the user's files, or Python's reference and library sources."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from llmloss_ext.cli import UserError

# Tests and third-party packages differ between installations, encodings holds generated tables, and
# pydoc_data is the reference, which is included already.
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def documents(paths: Iterable[str]) -> Iterator[str]:
    """The texts of the files and folders, or the default text if no path is given.

    Folders are walked in sorted order, without hidden files and files that are not text. A file
    that is itself named must be text.

    Raises:
        UserError: A path does not exist, cannot be read, or contains no text.
    """
    names = list(paths)
    if not names:
        yield from _default_documents()
    for name in names:
        path = Path(name)
        if path.is_dir():
            yield from _folder(path)
        else:
            yield _named_file(path)


def _default_documents() -> Iterator[str]:
    """The topics of Python's reference, then the standard library's sources, sorted by path."""
    with suppress(ImportError):  # some distributions omit it
        yield from import_module("pydoc_data.topics").topics.values()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            text = _text_of(path.read_bytes())
            if text:
                yield text


def _folder(folder: Path) -> Iterator[str]:
    empty = True
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        text = _text_of(_read(path))
        if text:
            empty = False
            yield text
    if empty:
        raise UserError(f"no text file in {folder}")


def _named_file(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder")
    text = _text_of(_read(path))
    if text is None:
        raise UserError(f"{path} is not a text file (UTF-8)")
    if not text:
        raise UserError(f"{path} is empty")
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _text_of(content: bytes) -> str | None:
    """The text; "" if it is blank, None if the bytes are not text."""
    if b"\0" in content:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else ""
