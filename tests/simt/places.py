"""Turns the places that accesses.h names, as ``(+0x1234)``, into lines of the source."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def with_lines(message: str, library: str) -> str:
    """The message with file and line of each place, where addr2line knows them."""

    def line_of(place: re.Match[str]) -> str:
        try:
            done = subprocess.run(["addr2line", "-e", library, place[1]],
                                  capture_output=True, text=True, check=True)  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return place[0]
        file, _, line = done.stdout.split()[0].rpartition(":")
        return f"({Path(file).name}:{line})"

    return re.sub(r"\(\+(0x[0-9a-f]+)\)", line_of, message)


@contextmanager
def named_lines(library: str) -> Iterator[None]:
    """Names lines in the errors of launches."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(with_lines(str(error), library)) from None
