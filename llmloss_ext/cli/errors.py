"""How a command ends: after an error with one line on stderr, and a status that is not 0."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import ClassVar, NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells (128 + SIGINT)."""


class UserError(Exception):
    """A mistake that the user can fix: printed as ``llmloss: error: <message>``, exit status 1."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, without repeating the usage."""

    program: ClassVar[str] = "llmloss"
    """What the line begins with; the parsers of commands have the class, so they have it too."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{_error_line(self.program, message)} (see: {self.prog} --help)\n")


def run_command(program: str, command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Runs a command, and reports an error in one line on stderr.

    With ``LLMLOSS_TRACEBACK=1`` in the environment, an error that the user did not cause shows its
    traceback as well.

    Args:
        program: What the line begins with.
        command: Returns the exit status.
        interrupted: What the line says after Ctrl-C.

    Returns:
        The exit status: the command's, 1 after an error, 130 after an interruption.
    """
    _print_any_name()
    try:
        status = command()
        sys.stdout.flush()  # fails here rather than at exit, where the status is already 0
        return status
    except UserError as error:
        return _fail(program, str(error))
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()  # `llmloss ... | head`: nobody reads the rest
        return 1
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
        place = f": {error.filename}" if error.filename else ""
        return _fail(program, f"{error.strerror or error}{place}")
    except UnicodeEncodeError as error:  # the name of a file that no file can have
        return _fail(program, f"{error.object!r} cannot be encoded: {error.reason}")
    except Exception as error:
        if os.environ.get("LLMLOSS_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        name, reason = type(error).__name__, first_line(error)
        reason = "no message" if reason == name else reason
        return _fail(program, f"{name}: {reason} (LLMLOSS_TRACEBACK=1 shows the traceback)")


def first_line(error: BaseException) -> str:
    """What an error says, without the C++ frames that torch may list below; else its type."""
    lines = filter(str.strip, str(error).splitlines())
    return next(lines, type(error).__name__)


def _error_line(program: str, message: str) -> str:
    return f"{program}: error: " + " ".join(message.split())


def _fail(program: str, message: str) -> int:
    print(_error_line(program, message), file=sys.stderr)
    return 1


def _print_any_name() -> None:
    """Lets stdout escape what it cannot encode, as stderr does: names of files may be any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Sends what is still buffered nowhere, or Python would report it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
