"""Progress in a log, where bars cannot be drawn."""

import math
import time
from typing import Any

import typer
from rich.progress import Progress, TaskID

__all__ = ["Lines"]

PAUSE = 60.0
"""Seconds between two lines of a task."""


class Lines(Progress):
    """Writes lines to stderr besides: of each task with its first step, once a minute, and when it is done."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._due: dict[TaskID, float] = {}

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
        due, now = self._due.get(name, 0.0), time.monotonic()
        if task.finished != math.isinf(due) or now >= due:
            total = "" if task.total is None else f" of {int(task.total):,}"
            typer.echo(f"{task.description}: {int(task.completed):,}{total}, {task.elapsed or 0:.0f} s", err=True)
            self._due[name] = math.inf if task.finished else now + PAUSE
