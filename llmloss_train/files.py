"""Atomic writes, and errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmloss_ext.cli import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write, such as a full disk, into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a temporary file beside ``path``, then renames it to ``path``.

    A reader sees the old content or the new, even after a crash, and never a part of it.

    Args:
        path: The file to create or replace.
        write: Called with the open file.

    Raises:
        OSError: The file cannot be written; ``path`` is unchanged, and no other file remains.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only now
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
