"""Progress and tables on the terminal: by rich, or in plain lines if rich is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .report.tables import Table

_HAS_RICH = importlib.util.find_spec("rich") is not None


@contextmanager
def progress(cases: int) -> Iterator[Callable[[str, float], None]]:
    """Yields a `run.Progress`."""
    if not _HAS_RICH or not sys.stdout.isatty():
        yield _lines(cases)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=cases)
        yield lambda line, share: bar.update(task, description=line, advance=share)


def _lines(cases: int) -> Callable[[str, float], None]:
    """Prints a line when a case begins."""
    done, shown = 0.0, ""

    def say(line: str, share: float) -> None:
        nonlocal done, shown
        done += share
        case = line.split(":")[0]
        if case != shown:
            print(f"[{int(done + 1e-6) + 1}/{cases}] {case}", flush=True)
            shown = case

    return say


def show(tables: Iterable[Table]) -> None:
    """Prints tables."""
    if not _HAS_RICH:
        for table in tables:
            print(f"\n{table.title}\n{table.markdown()}")
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        shown = RichTable(title=table.title)
        for k, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if k else "left")
        for cells in table.rows:
            shown.add_row(*cells)
        console.print(shown)
