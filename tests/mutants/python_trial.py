"""Runs pytest over mutants of Python sources.

Most of a run's time would go into importing torch. So one process imports it, and forks a child for
each mutant, which imports the mutated package and runs its tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .edits import Mutant
from .sandbox import Sandbox
from .trial import Outcome, Trial, TrialError

IMPORTED = ("torch", "torch.distributed", "torch.func", "torch.testing", "numpy", "hypothesis")
"""What the process imports: all that is slow, and nothing of the package."""
_OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider")


class PythonTrial(Trial):
    """The tests of one Python source, in one process that stays.

    Attributes:
        limit: Seconds that a run of the tests may take.
    """

    def __init__(self, sandbox: Sandbox, tests: Sequence[str], deselected: str = "") -> None:
        """Runs the tests once as they are, to know that they pass, and how long they take.

        Args:
            sandbox: Where.
            tests: Test files and folders, those that notice most first.
            deselected: An expression of pytest's ``-k`` for the tests to leave out.

        Raises:
            TrialError: They do not pass.
        """
        self._sandbox = sandbox
        self._log = sandbox.root / "pytest.log"
        self._arguments = [*_OPTIONS, *tests]
        if deselected:
            self._arguments += ["-k", f"not ({deselected})"]
        paths = (sandbox.root, sandbox.root / "tests", Path(__file__).parents[1])
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a second of every run
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "mutants.python_server", *IMPORTED],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=sandbox.root,
            env=os.environ | environment,
        )  # fmt: skip
        self.limit = 600.0
        status, seconds = self._run()
        if status != 0:
            self.close()
            raise TrialError(f"the tests fail without a mutant:\n{self._log.read_text()[-4000:]}")
        self.limit = 20 + 4 * seconds

    def outcome(self, mutant: Mutant) -> Outcome:
        """Runs the tests over a mutant."""
        try:
            compile(mutant.apply((self._sandbox.root / mutant.path).read_text()), "", "exec")
        except SyntaxError:
            return "invalid"
        with self._sandbox.holding(mutant):
            status, _ = self._run()
        return "survived" if status == 0 else "hung" if status is None else "caught"

    def close(self) -> None:
        """Ends the process."""
        self._server.communicate()

    def _run(self) -> tuple[int | None, float]:
        """The exit status of pytest, None if it took too long, and the seconds."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"arguments": self._arguments, "limit": self.limit, "log": str(self._log)}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise TrialError("the process that runs pytest has died")
        status, seconds = json.loads(answer)
        return status, seconds
