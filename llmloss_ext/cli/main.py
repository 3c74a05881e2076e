"""`llmloss <command>`: selects the command, and reports an error in one line on stderr."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from ..version import __version__
from .errors import OneLineParser, UserError, run_command


class Command(NamedTuple):
    """A command: where it is implemented, and its line in ``llmloss --help``."""

    module: str
    """Imported on demand; defines ``add_parser(subparsers)`` and ``run(args) -> int``."""
    summary: str


COMMANDS = {
    "train": Command(
        "llmloss_train.command", "train a small GPT on real text with a large vocabulary"
    ),
    "eval": Command(
        "llmloss_eval.command", "evaluate a model on a text or on questions with choices"
    ),
    "bench": Command(
        "llmloss_bench.command", "time the losses beside torch, others and the machine's limits"
    ),
    "info": Command(".info", "print versions, instruction sets and devices"),
    "verify": Command(".verify", "check every operator against float64 on this machine"),
    "plan": Command(".plan", "print the cost of a linear loss: chunks, FLOPs and memory"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    An error prints one line (`run_command`).

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 after an error, 130 after an interruption.

    Raises:
        SystemExit: After ``--help`` or ``--version`` (0) or a wrong option (2), as in argparse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command("llmloss", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    parser, command = _parser(arguments)
    options = parser.parse_args(arguments)
    if command is None:
        parser.error("no command given: choose " + ", ".join(COMMANDS))
    return int(command.run(options))


def _parser(arguments: Sequence[str]) -> tuple[OneLineParser, ModuleType | None]:
    """The parser, with the options of the requested command.

    The other commands are listed by name only. Their modules are not imported, so a command does
    not pay for another's imports and does not fail when they fail.
    """
    parser = OneLineParser(prog="llmloss", description="Losses of large language models.")
    parser.add_argument("--version", action="version", version=f"llmloss {__version__}")
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


if __name__ == "__main__":
    sys.exit(main())
