"""Reporting progress, without knowing who watches. The command line shows bars; a library call shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float) -> None:
        """Say that `amount` more of the task's total is done."""
        ...


class Progress(Protocol):
    """Who is told about tasks."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Task]:
        """A context in which the task runs; `total` None where the amount of work is not known."""
        ...


class _Silent:
    """Tells nobody."""

    def advance(self, amount: float) -> None:
        pass

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        yield self


SILENT: Progress = _Silent()
