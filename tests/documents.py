"""The pages of the documentation as the tests read them: blocks of code, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
"""Those of the site."""
OTHERS = [ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")]

_FENCED = re.compile(r"^(```+)(.*?)\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"<!-- needs ([\w.]+) -->\n\Z")


def name_of(path: Path) -> str:
    """For the ids of tests."""
    return str(path.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block."""

    line: int
    """Of its first line, from 1."""
    language: str
    text: str
    needs: str | None
    """What the comment before it says that it needs."""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for match in _FENCED.finditer(text):
        before = text[: match.start()]
        needs = _NEEDS.search(before)
        line = before.count("\n") + 2
        yield Block(line, match[2].strip(), match[3], needs and needs[1])


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`+[^`\n]*`+", "", _FENCED.sub("", text))


def links(text: str) -> list[str]:
    """Where the links and images of a page lead, but those that leave the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """The headings as GitHub and the site name them."""
    heads = re.findall(r"^#+ +(.*?) *$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def sections(text: str) -> dict[str, str]:
    """What stands under each heading of the second level."""
    parts = re.split(r"^## +(.*?) *$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def toctrees(text: str) -> list[str]:
    """The entries of the navigation that a page has."""
    lines = "".join(b.text for b in blocks(text) if b.language == "{toctree}").splitlines()
    entries = [line for line in lines if line and not line.startswith(":")]
    return [re.sub(r".*<(.*)>", r"\1", entry) for entry in entries]
