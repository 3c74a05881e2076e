"""Forks a process for each request on stdin, runs pytest in it, and answers on stdout.

Nothing of the package under test is imported here, so that each child imports its mutant.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest


def main() -> None:
    """Imports the modules that are named as arguments, and serves until stdin ends."""
    for name in sys.argv[1:]:
        with suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _test(request["arguments"], Path(request["log"]))
        status = _wait(child, started + request["limit"])
        answers.write(json.dumps([status, time.monotonic() - started]) + "\n")
        answers.flush()


def _test(arguments: list[str], log: Path) -> None:
    """Runs pytest, and ends this process with its status."""
    status = 1
    try:
        os.setsid()  # so that processes of the tests end with it
        with open(log, "w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        status = int(pytest.main(arguments))
        sys.stdout.flush()
    finally:
        os._exit(status)


def _wait(child: int, deadline: float) -> int | None:
    """The status of the child, None if it had to be ended; then its own children have ended too."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main()
