"""Files that are there complete or not at all, and errors that name them."""

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
    """Writes a file beside ``path``, then moves it there in one step.

    A reader, or a run that is resumed after a crash, sees the old content or the new, never half.

    Args:
        path: The file to create or replace.
        write: Called with the open file.

    Raises:
        OSError: If it cannot be written; ``path`` is as before, and nothing is left beside it.
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
