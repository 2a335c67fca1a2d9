"""Progress on stderr: a bar for the step that runs, one line for each that is done.

    weights                    done       2.1 s   171.3 MiB
    export stage0              cached     0.9 s     1.2 MiB

Seconds of a cached step are those of the run that did it. Where stderr is a file there is no bar.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from ...graphs.progress import Progress, StepFact
from ...pages.units import show_bytes, show_seconds
from ...runtime.hardware import peak_memory
from .output import Loudness, silent
from .output import console as make_console

if TYPE_CHECKING:
    from ...graphs.bundle import Bundle
    from ...graphs.engine_index import Engines


def build_line(fact: StepFact) -> str:
    """Describe a step of a build: whether it was cached, seconds, bytes written, its outcome."""
    status = "cached" if fact.cached else "done"
    seconds, size = show_seconds(fact.seconds), show_bytes(fact.nbytes)
    return f"{fact.name:<26} {status:<7}{seconds:>9} {size:>11}   {fact.outcome}".rstrip()


def calibration_line(fact: StepFact) -> str:
    """Describe a step of a calibration: seconds, and its outcome."""
    return f"{fact.name:<40} {show_seconds(fact.seconds):>9}   {fact.outcome}"


def verify_line(fact: StepFact) -> str:
    """Describe a check: its status, and seconds."""
    return f"{fact.name:<22} {fact.outcome:<17}{show_seconds(fact.seconds):>9}"


class StepBar(Progress):
    """A progress callback that shows steps; a context manager, outside of which there is no bar.

    Args:
        line: describes a finished step.
        console: None: stderr.
        measured: whether steps count units.
    """

    def __init__(
        self,
        line: Callable[[StepFact], str],
        console: Console | None = None,
        *,
        measured: bool = True,
    ):
        self.line = line
        self.console = console or make_console(err=True, soft_wrap=True)
        self.facts: list[StepFact] = []
        self.started = time.perf_counter()
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *([BarColumn()] if measured else []),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=silent(self.console),
        )

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def start(self, step: str, total: int | None = None) -> None:
        """Show the step that runs now."""
        self._task = self._bar.add_task(step, total=total)

    def advance(self, units: int = 1) -> None:
        """Move its bar."""
        self._bar.advance(self._task, units)

    def done(self, fact: StepFact) -> None:
        """Replace its bar by one line."""
        self.facts.append(fact)
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._tell(self.line(fact))

    @property
    def seconds(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """Print what the whole run took."""
        self._bar.stop()
        if not self.facts:
            self._tell("already built, every file in place")
        self._tell(f"{show_seconds(self.seconds)} in all, peak memory {show_bytes(peak_memory())}")

    def _tell(self, line: str) -> None:
        if not Loudness.quiet:
            self.console.print(line)


def build_facts(progress: StepBar, bundle: Bundle, engines: Engines | None) -> dict[str, Any]:
    """Return what a build did, as JSON; no steps where the bundle was there already."""
    steps = [
        {name: getattr(f, name) for name in ("name", "cached", "seconds", "nbytes", "outcome")}
        for f in progress.facts
    ]
    return {
        "path": str(bundle.path),
        "steps": steps,
        "seconds": progress.seconds,
        "peak_memory_bytes": peak_memory(),
        "weight_bytes": bundle.manifest.weight_bytes,
        "engines": engines and [asdict(engine) for engine in engines.engines],
    }
