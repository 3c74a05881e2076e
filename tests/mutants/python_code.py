"""The edits of a Python source, found in its syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from .edits import SWAPPED, Edit

_OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip
_EXTREME = re.compile(r"^(?:a|arg|clamp_)?(min|max)(?:imum|_)?$")
# What they say or annotate is not what the code computes. Positions in an f-string are not exact.
_SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


def edits(source: str) -> list[Edit]:
    """Every edit, in the order of the source."""
    return sorted(set(_Finder(source).found(ast.parse(source))))


class _Finder:
    """Walks a tree; knows the text of its nodes."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines = source.splitlines(keepends=True)
        self._offsets = [0]
        for line in self._lines:
            self._offsets.append(self._offsets[-1] + len(line))

    def found(self, node: ast.AST) -> Iterator[Edit]:
        """The edits of a node and of all below it."""
        if isinstance(node, _SILENT):
            return
        yield from self._of(node)
        for child in self._children(node):
            yield from self.found(child)

    def _children(self, node: ast.AST) -> Iterator[ast.AST]:
        """Those that are run, which annotations are not."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            yield from (v for v in _listed(value) if isinstance(v, ast.AST))

    def _of(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.BinOp(left, op, right):
                yield from self._between(left, op, right)
            case ast.AugAssign(target, op, value):
                yield from self._between(target, op, value, "=")
            case ast.Compare(left, ops, comparators):
                for compares, (one, other) in zip(ops, pairwise([left, *comparators]), strict=True):
                    yield from self._between(one, compares, other)
            case ast.BoolOp(op, values):
                for one, other in pairwise(values):
                    yield from self._between(one, op, other)
            case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
                start = self._start(node)
                yield Edit(start, start + 1, "")
            case ast.Constant(bool()):
                pass
            case ast.Constant(int() | float() as number) if number in (0, 1):
                yield self._instead(node, repr(1 - number))
            case ast.If(test) | ast.IfExp(test) if ast.unparse(test) != "TYPE_CHECKING":
                yield from (self._instead(test, text) for text in ("True", "False"))
            case ast.While(test):
                yield self._instead(test, "False")
            case ast.comprehension(ifs=tests):
                yield from (self._instead(test, "True") for test in tests)
            case ast.Call(ast.Name() | ast.Attribute() as function):
                yield from self._extreme(function)

    def _between(
        self, left: ast.AST, op: ast.AST, right: ast.AST, suffix: str = ""
    ) -> Iterator[Edit]:
        """Swaps the operator, which is all that stands between two nodes but for brackets."""
        symbol = _OPERATORS.get(type(op), "")
        if symbol not in SWAPPED:
            return
        start, end = self._end(left), self._start(right)
        gap = re.sub(r"#[^\n]*", lambda m: " " * len(m[0]), self._source[start:end])
        text = re.search(r"\s+".join(map(re.escape, symbol.split())) + suffix, gap)
        assert text is not None, f"no {symbol} in {gap!r}"
        yield Edit(start + text.start(), start + text.end(), SWAPPED[symbol] + suffix)

    def _extreme(self, function: ast.Name | ast.Attribute) -> Iterator[Edit]:
        """Swaps the smallest and the largest: min, clamp_min, amin, minimum."""
        name = function.id if isinstance(function, ast.Name) else function.attr
        word = _EXTREME.match(name)
        if word is not None:
            start = self._end(function) - len(name) + word.start(1)
            yield Edit(start, start + 3, SWAPPED[word[1]])

    def _instead(self, node: ast.AST, text: str) -> Edit:
        return Edit(self._start(node), self._end(node), text)

    def _start(self, node: ast.AST) -> int:
        return self._offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def _end(self, node: ast.AST) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def _offset(self, line: int, column: int) -> int:
        """In characters, of a position that ast counts in bytes."""
        before = self._lines[line - 1].encode()[:column].decode()
        return self._offsets[line - 1] + len(before)


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]
