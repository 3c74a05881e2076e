"""The edits of a C++ source, found by its tokens.

The format that `make style` holds does half of the work: a binary operator has a space on each
side, and the brackets of template arguments and the star of a pointer have not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .edits import SWAPPED, Edit

# What is no code that runs: comments, directives with their further lines, strings, characters,
# and the heads of templates.
_SILENT = re.compile(
    r"""//[^\n]* | /\*.*?\*/
    | ^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*
    | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+'
    | \btemplate\ <[^\n]*>$ | \bstatic_assert\([^;]*;""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_BINARY = re.compile(r"(?<=\s)(?:&&|\|\||[<>=!+*/-]=|[<>+*/-])(?=\s)")
_MINUS = re.compile(r"(?:(?<=[,=?:] )|(?<=\()|(?<=return ))-(?=[A-Za-z_(])")
_CONSTANT = re.compile(r"(?<![\w.'])[01](?=(?:\.0)?[fu]?(?![\w.']))")
_EXTREME = re.compile(r"(?<=\bstd::)(?:min|max)\b")
_CONDITION = re.compile(r"\b(if|while) \(")
# Calls; a definition has a type before the name.
_PRECISE = re.compile(r"(?<!float )(?<!double )\b(expm1_of|log1p_of)\(")


def edits(source: str) -> list[Edit]:
    """Every edit, in the order of the source."""
    code = _SILENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    return sorted(set(_tokens(code)) | set(_conditions(code)) | set(_precise(code)))


def _tokens(code: str) -> Iterator[Edit]:
    for pattern in (_BINARY, _CONSTANT, _EXTREME):
        for token in pattern.finditer(code):
            yield Edit(*token.span(), SWAPPED[token[0]])
    for token in _MINUS.finditer(code):
        yield Edit(*token.span(), "")


def _conditions(code: str) -> Iterator[Edit]:
    for head in _CONDITION.finditer(code):
        end = head.end() + _length_in_brackets(code[head.end() :])
        for text in ("true", "false") if head[1] == "if" else ("false",):
            yield Edit(head.end(), end, text)


def _precise(code: str) -> Iterator[Edit]:
    """Functions that keep their digits near 0, by those of which they are made."""
    for head in _PRECISE.finditer(code):
        end = head.end() + _length_in_brackets(code[head.end() :])
        argument = code[head.end() : end]
        plain = (
            f"(exp_of({argument}) - 1)" if head[1] == "expm1_of" else f"log_of(1 + ({argument}))"
        )
        yield Edit(head.start(), end + 1, plain)


def _length_in_brackets(code: str) -> int:
    """The characters up to the bracket that closes the one before ``code``."""
    depth = 1
    for bracket in re.finditer(r"[()]", code):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    raise ValueError("a bracket is not closed")
