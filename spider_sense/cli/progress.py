"""Progress of long work: bars, and lines in a log, where bars cannot be drawn."""

import math
import sys
import time
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from spider_sense.cli.app import console

__all__ = ["Lines", "progress_bars"]

PAUSE = 60.0
"""Seconds between two lines of a task."""


def progress_bars() -> Progress:
    """Return the progress display of long work: bars, and lines on stderr where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    kind = Progress if sys.stderr.isatty() else Lines
    return kind(*columns, console=console, transient=not console.is_terminal)


class Lines(Progress):
    """Writes lines to stderr besides: of each task with its first step, once a minute, and when it is done.

    One bar may show one task after another: the next begins where the description changes and the count does not rise.
    """

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._told: dict[TaskID, tuple[str, float, float]] = {}

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **options: Any) -> None:
        """Change a task."""
        super().update(task_id, **options)
        self._tell(task_id)

    def _tell(self, name: TaskID) -> None:
        task = next(each for each in self.tasks if each.id == name)
        description, completed, due = self._told.get(name, ("", 0.0, 0.0))
        now, done = time.monotonic(), task.total is not None and task.completed >= task.total
        if description != task.description and task.completed <= completed:
            due = 0.0
        if now >= due or done != math.isinf(due):
            total = "" if task.total is None else f" of {int(task.total):,}"
            typer.echo(f"{task.description}: {int(task.completed):,}{total}, {task.elapsed or 0:.0f} s", err=True)
            due = math.inf if done else now + PAUSE
        self._told[name] = task.description, task.completed, due
