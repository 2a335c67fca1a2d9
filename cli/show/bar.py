"""A bar for the step that runs now, and one line left of each; no bar where stderr is a file."""

from __future__ import annotations

from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Bar = TypeVar("Bar", bound="StepBar")


class StepBar:
    """A context manager from which those derive that are told of steps.

    Args:
        console: None: stderr.
        measured: whether steps say how far they are.
    """

    def __init__(self, console: Console | None = None, *, measured: bool = True):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *([BarColumn()] if measured else []),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self: Bar) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """No bar from here on; lines may follow."""
        self._bar.stop()

    def show(self, step: str, total: int | None = None) -> None:
        """Show the step that runs now; ``total``: its units, where they are known."""
        self._task = self._bar.add_task(escape(step), total=total)

    def advance(self, units: int = 1) -> None:
        """Move its bar."""
        self._bar.advance(self._task, units)

    def leave(self, line: str) -> None:
        """Put one line in the place of the step."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self.console.print(line, markup=False)
