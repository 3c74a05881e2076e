"""How far an evaluation is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from .evaluation import Task

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_SUMMARIES = 0.5  # on a terminal: one takes time in proportion to what is done


class Progress:
    """Shows how many pieces are scored, and the result so far; a context manager."""

    def __init__(self, task: Task, done: int) -> None:
        """Begins after ``done`` pieces."""
        from rich import progress
        from rich.console import Console

        self._of, self._what = task, "windows" if task.kind == "text" else "choices"
        self._console = Console()
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(self._what, total=len(task.pieces), completed=done)
        self._shown_at = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int) -> None:
        """After ``done`` pieces."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done)
            if time.monotonic() - self._shown_at > _SECONDS_BETWEEN_SUMMARIES:
                text = f"{self._what}  {self._of.summary()}"
                self._bar.update(self._task, description=text)
                self._shown_at = time.monotonic()
        elif time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            total = len(self._of.pieces)
            print(f"{done:,} of {total:,} {self._what}  {self._of.summary()}", flush=True)
