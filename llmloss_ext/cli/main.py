"""`llmloss <command>`: selects the command, and reports an error in one line on stderr."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from .errors import INTERRUPTED, UserError
from .info import version


class Command(NamedTuple):
    """A command: where it is implemented, and its line in ``llmloss --help``."""

    module: str
    """Imported on demand; defines ``add_parser(subparsers)`` and ``run(args) -> int``."""
    summary: str


COMMANDS = {
    "train": Command(
        "llmloss_train.command", "train a small GPT on real text with a large vocabulary"
    ),
    "info": Command(".info", "print versions, instruction sets and devices"),
    "verify": Command(".verify", "check every operator against float64 on this machine"),
    "plan": Command(".plan", "print the cost of a linear loss: chunks, FLOPs and memory"),
}


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{_error_line(message)} (see: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    An error prints one line. With ``LLMLOSS_TRACEBACK=1`` in the environment, an error that the
    user did not cause shows its traceback as well.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 after an error, 130 after an interruption.

    Raises:
        SystemExit: After ``--help`` or ``--version`` (0) or a wrong option (2), as in argparse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, command = _parser(arguments)
        options = parser.parse_args(arguments)
        if command is None:
            parser.error("no command given: choose " + ", ".join(COMMANDS))
        status = int(command.run(options))
        sys.stdout.flush()  # fails here rather than at exit, where the status is already 0
        return status
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("llmloss: interrupted", file=sys.stderr)
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
        return _fail(f"{error.strerror or error}{place}")
    except Exception as error:
        if os.environ.get("LLMLOSS_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        hint = "(LLMLOSS_TRACEBACK=1 shows the traceback)"
        return _fail(f"{type(error).__name__}: {str(error).strip() or 'no message'} {hint}")


def _parser(arguments: Sequence[str]) -> tuple[OneLineParser, ModuleType | None]:
    """The parser, with the options of the requested command.

    The other commands are listed by name only. Their modules are not imported, so a command does
    not pay for another's imports and does not fail when they fail.
    """
    parser = OneLineParser(prog="llmloss", description="Losses of large language models.")
    parser.add_argument("--version", action="version", version=f"llmloss {version()}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    asked = next((word for word in arguments if not word.startswith("-")), None)
    command = None
    for name, (module, summary) in COMMANDS.items():
        if name == asked:
            command = _import(module, name)
            command.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, command


def _import(module: str, command: str) -> ModuleType:
    try:
        return importlib.import_module(module, __package__)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if not package or error.name != package:
            raise
        raise UserError(
            f"llmloss {command} needs the package {package}, which comes with llmloss_ext: "
            f"pip install 'llmloss_ext[{command}]'"
        ) from error


def _error_line(message: str) -> str:
    return "llmloss: error: " + " ".join(message.split())


def _fail(message: str) -> int:
    print(_error_line(message), file=sys.stderr)
    return 1


def _drop_stdout() -> None:
    """Sends what is still buffered nowhere, or Python would report it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
