"""Progress of long work: steps, the units they are made of, and what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Advance = Callable[[int], None]
"""Called with units of work, such as bytes or layers, as they are done."""


def no_advance(units: int) -> None:
    """Ignore ``units``: the default where no progress is shown."""


@dataclass(frozen=True)
class StepFact:
    """A finished step: its seconds, its outcome in words, the bytes it wrote.

    cached: the step was found done; its seconds are those of the run that did it.
    """

    name: str
    seconds: float
    outcome: str = ""
    nbytes: int = 0
    cached: bool = False


class Progress:
    """A progress callback that shows nothing; those that show something override its methods."""

    def start(self, step: str, total: int | None = None) -> None:
        """Begin a step of ``total`` units, where their number is known."""

    def advance(self, units: int = 1) -> None:
        """Count ``units`` of the step as done."""

    def done(self, fact: StepFact) -> None:
        """End the step."""

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[list[str]]:
        """Time a block as one step; what it appends to the list is the outcome's text."""
        outcome: list[str] = []
        self.start(name, total)
        started = time.perf_counter()
        yield outcome
        self.done(StepFact(name, time.perf_counter() - started, "".join(outcome)))
