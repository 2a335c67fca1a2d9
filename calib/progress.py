"""Who is told how a calibration goes, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class CalibrationProgress(Protocol):
    """Who is told how a calibration goes."""

    def start(self, step: str, total: int | None) -> None:
        """A step begins; ``total`` units will be done if that is known."""

    def advance(self, units: int) -> None:
        """Some units are done."""

    def done(self, step: str, seconds: float, outcome: str) -> None:
        """It is done, with this to show for it."""


ReportOutcome = Callable[[str], None]


def progress_steps(progress: CalibrationProgress) -> Callable[..., Any]:
    """Steps that the watcher sees; what a step tells in the end is shown beside it."""

    @contextmanager
    def step(name: str, total: int | None = None) -> Iterator[ReportOutcome]:
        outcome: list[str] = []
        progress.start(name, total)
        started = time.perf_counter()
        yield outcome.append
        progress.done(name, time.perf_counter() - started, "".join(outcome))

    return step
