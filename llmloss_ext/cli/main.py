"""`llmloss <command>`: picks the command, and turns errors into one line on stderr."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from .errors import INTERRUPTED, UserError


class Command(NamedTuple):
    """A command, as the list of commands shows it, and the module that is imported to run it."""

    module: str
    """Has ``add_parser(subparsers)`` and ``run(args) -> int``; a leading dot: of this package."""
    summary: str


COMMANDS = {
    "train": Command(
        "llmloss_train.command", "train a small GPT on real text with a large vocabulary"
    ),
    "info": Command(".info", "print versions, instruction sets and what is available"),
    "verify": Command(".verify", "check every operator against float64 on this machine"),
    "plan": Command(".plan", "say what a linear loss costs: chunks, products, FLOPs and memory"),
}


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"llmloss: error: {message} (see: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 after an error, 130 after an interruption.

    Raises:
        SystemExit: After ``--help`` (0) or a wrong option (2), as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, command = _parser(arguments)
        options = parser.parse_args(arguments)
        if command is None:
            parser.error("a command is missing: " + ", ".join(COMMANDS))
        status = int(command.run(options))
        sys.stdout.flush()  # here, where a closed pipe can still be told from success
        return status
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("llmloss: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `llmloss ... | head`: nobody reads on. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}")


def _parser(arguments: Sequence[str]) -> tuple[OneLineParser, ModuleType | None]:
    """The parser, with the options of the one command that is asked for.

    The other commands appear by name only: their modules are not imported, so that one command
    neither waits for nor fails by another.
    """
    parser = OneLineParser(prog="llmloss", description="Losses of large language models.")
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


def _fail(message: str) -> int:
    print("llmloss: error: " + " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
