"""The calls that an executor makes, with their rows, slots and times.

Wraps the executor's methods in place, so that whoever holds it is watched, whatever back end it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...graphs.contract import PROBE
from ...graphs.plan.call_cost import VISION, GraphCall

Clock = Callable[[], float]


@dataclass(frozen=True)
class TimedCall:
    """One call and when it took place, in seconds of ``time.perf_counter``."""

    call: GraphCall
    start: float
    stop: float

    @property
    def ms(self) -> float:
        """How long it took, the host's part included."""
        return (self.stop - self.start) * 1e3


@contextmanager
def observe_calls(executor: Any, clock: Clock = time.perf_counter) -> Iterator[list[TimedCall]]:
    """Note every call of ``executor`` (``graphs.chain.executor.Executor``) until the end of the
    block.
    """
    events: list[TimedCall] = []
    describe: dict[str, Callable[..., GraphCall]] = {
        "encode": lambda pixels: GraphCall(VISION, 0, 0),
        "append": lambda stage, rows, positions, order, slot_order, *rest: GraphCall(
            f"stage{stage}", order.shape[1], slot_order.shape[1]
        ),
        "select": lambda edge, query, slot_order, *rest: GraphCall(
            f"select{edge}", 0, slot_order.shape[1]
        ),
        "probe": lambda stage, layer, query, slot_order, *rest: GraphCall(
            PROBE, 0, slot_order.shape[1]
        ),
    }

    def observed(method: Callable, call_of: Callable[..., GraphCall]) -> Callable:
        def run(*args, **options):
            start = clock()
            result = method(*args, **options)
            events.append(TimedCall(call_of(*args, **options), start, clock()))
            return result

        return run

    for name, call_of in describe.items():
        setattr(executor, name, observed(getattr(executor, name), call_of))
    try:
        yield events
    finally:
        for name in describe:
            delattr(executor, name)
