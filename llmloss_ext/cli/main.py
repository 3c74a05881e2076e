"""`llmloss <command>`: picks the command, and turns errors into one line on stderr."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from llmloss_ext.cli.errors import UserError

# A command is a module of this package with `add_parser(subparsers)` and `run(args) -> int`.
COMMANDS = {
    "train": "train a small GPT on real text with a large vocabulary",
    "info": "print versions, instruction sets and what is available",
    "verify": "check every operator against float64 on this machine",
    "plan": "say what a linear loss costs: chunks, products, FLOPs and memory",
}

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


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
    for name, summary in COMMANDS.items():
        if name == asked:
            command = importlib.import_module(f"llmloss_ext.cli.{name}")
            command.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, command


def _fail(message: str) -> int:
    print("llmloss: error: " + " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
