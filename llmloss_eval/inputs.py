"""What is evaluated: a text, documents, or questions with choices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmloss_ext.cli import UserError

_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Question(NamedTuple):
    """Choices to rank: which one continues the context?"""

    line: int
    """In the file, from 1."""
    context: str
    choices: tuple[str, ...]
    label: int | None
    """The index of the right one, if that is known."""


class Inputs(NamedTuple):
    """The content of a file: documents, or questions."""

    documents: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()

    @property
    def text_bytes(self) -> int:
        """Of the documents, as UTF-8."""
        return sum(len(text.encode()) for text in self.documents)


def read_inputs(path: Path, form: str) -> Inputs:
    """Reads a file.

    Args:
        path: A text file; or JSON lines, each ``{"text": ...}`` or each ``{"context": ...,
            "choices": [...], "label": index}``, whose label may be left out.
        form: "text", "jsonl", or "auto": by the file's name.

    Raises:
        UserError: It cannot be read, or holds something else; the message names the line.
    """
    text = _read(path)
    if form == "jsonl" or (form == "auto" and path.suffix.lower() in _SUFFIXES):
        return _of_lines(path, text)
    return Inputs(documents=(text,))


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path} is not a text file (UTF-8)")
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _of_lines(path: Path, text: str) -> Inputs:
    documents, questions = [], []
    for number, line in _lines(text):
        try:
            one = _parsed(number, line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if isinstance(one, str):
            documents.append(one)
        else:
            questions.append(one)
        if documents and questions:
            raise UserError(
                f"{path}, line {number}: a file holds texts or choices, and this one begins with "
                + ("texts" if isinstance(one, Question) else "choices")
            )
    return Inputs(tuple(documents), tuple(questions))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    # Not splitlines, which splits at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _parsed(number: int, line: str) -> str | Question:
    """A document or a question.

    Raises:
        ValueError: The line is neither; the message says why.
    """
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError('expected an object with "text", or with "context" and "choices"')
    if "text" in value and "choices" not in value:
        return _string(value, "text", allow_empty=False)
    choices, label = value.get("choices"), value.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError('expected "text", or "context" and a list of at least two "choices"')
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError('"choices" must be strings that are not empty')
    if label is not None and (type(label) is not int or not 0 <= label < len(choices)):
        raise ValueError(f'"label" must be an index from 0 to {len(choices) - 1}, got {label!r}')
    for choice in choices:
        _encodable(choice)
    return Question(number, _string(value, "context"), tuple(choices), label)


def _string(value: dict[str, Any], name: str, *, allow_empty: bool = True) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not (text or allow_empty):
        what = "a string" if allow_empty else "a string that is not empty"
        raise ValueError(f'"{name}" must be {what}, got {text!r}')
    return _encodable(text)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ValueError(f"a string is not UTF-8: {error.reason}") from error
    return text
