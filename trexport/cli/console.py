"""What people see: tables on standard output, progress bars on standard error. Machines get JSON instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from trexport.jsonable import finite
from trexport.progress import SILENT, Task
from trexport.progress import Progress as AbstractProgress


def progress_for(as_json: bool) -> AbstractProgress:
    """Bars where somebody is watching."""
    return SILENT if as_json or not sys.stderr.isatty() else _Bars()


def print_json(fields: Any) -> None:
    """One JSON document; NaN and Inf, which JSON does not have, as strings."""
    click.echo(json.dumps(finite(fields), indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; all columns but the first are numbers, to the right. Nothing is cut off, however narrow the terminal."""
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def gigabytes(size_bytes: float) -> str:
    """A size for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:.0f} B"


@final
class _BarTask:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float) -> None:
        self._bars.advance(self._task, amount)


@final
class _Bars:
    """A bar for each task, under each other, in one display that lives as long as any task does."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._depth = 0

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        bars = self._bars
        self._depth += 1
        task = bars.add_task(description, total=total)
        try:
            yield _BarTask(bars, task)
            bars.update(task, total=1, completed=1) if total is None else bars.update(task, completed=total)
        finally:
            self._depth -= 1
            if self._depth == 0:
                bars.stop()
                self._bars = None
