"""How a build goes, on stderr: a bar on a terminal, plain lines everywhere else.

    weights                    done       2.1 s   171.3 MiB
    export stage0              cached     0.9 s     1.2 MiB

Seconds of a cached step are those of the run that did it.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...graphs.progress import Progress, StepFact
from ...pages.units import show_bytes, show_seconds
from ...runtime.hardware import peak_memory
from .bar import StepBar

if TYPE_CHECKING:
    from rich.console import Console

    from ...graphs.bundle import Bundle
    from ...graphs.engine_index import Engines


class BuildProgressBar(StepBar, Progress):
    """A progress callback that shows the steps of a build and collects them."""

    def __init__(self, console: Console | None = None):
        super().__init__(console)
        self.facts: list[StepFact] = []
        self.started = time.perf_counter()

    def start(self, step: str, total: int | None = None) -> None:
        """Show the step that runs now."""
        self.show(step, total)

    def done(self, fact: StepFact) -> None:
        """Leave one line behind."""
        self.facts.append(fact)
        self.leave(
            f"{fact.name:<26} {'cached' if fact.cached else 'done':<7}"
            f"{show_seconds(fact.seconds):>9} {show_bytes(fact.nbytes):>11}"
        )

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self.started

    def to_dict(self, bundle: Bundle, engines: Engines | None = None) -> dict[str, Any]:
        """What the run did, as JSON; no steps where the bundle was there already."""
        steps = [
            {"name": f.name, "cached": f.cached, "seconds": f.seconds, "nbytes": f.nbytes}
            for f in self.facts
        ]
        return {
            "path": str(bundle.path),
            "steps": steps,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory(),
            "weight_bytes": bundle.manifest.weight_bytes,
            "engines": engines and [asdict(one) for one in engines.engines],
        }

    def close(self) -> None:
        """The closing line: what the whole run took."""
        self.stop()
        if not self.facts:
            self.console.print("already built, every file in place")
        self.console.print(
            f"{show_seconds(self.seconds)} in all, peak memory {show_bytes(peak_memory())}"
        )
