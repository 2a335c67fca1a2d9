"""Times of an engine's layers, as TensorRT reports them while a context runs.

TensorRT calls a profiler object after every execution, once for each layer, with the layer's name.
It merges layers, and may run a whole region as one (``ForeignNode[...]``); names then list what was
merged. What names more than one decoder layer counts for the first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .operators import LAYER_NODE, OTHER, Operators


@dataclass
class LayerTimes:
    """Milliseconds by layer name, summed over ``executions``."""

    ms: dict[str, float] = field(default_factory=dict)
    reports: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, ms: float) -> None:
        """Count one report."""
        self.ms[name] = self.ms.get(name, 0.0) + ms
        self.reports[name] = self.reports.get(name, 0) + 1

    @property
    def executions(self) -> int:
        """How often the context ran."""
        return max(self.reports.values(), default=0)

    def operators(self, graph: str) -> Operators:
        """Means per execution by decoder layer; kinds are the layers' own names."""
        runs = max(self.executions, 1)
        kinds = {name: ms / runs for name, ms in self.ms.items()}
        layers: dict[str, float] = {}
        for name, ms in kinds.items():
            layer = LAYER_NODE.search(name)
            key = layer[1] if layer else OTHER
            layers[key] = layers.get(key, 0.0) + ms
        ordered = sorted(layers, key=lambda key: (key == OTHER, key.zfill(6)))
        return Operators(
            {graph: dict(sorted(kinds.items(), key=lambda item: -item[1]))},
            {graph: {key: layers[key] for key in ordered}},
        )


def profiler_of(trt: Any, report: Callable[[str, float], None]) -> Any:
    """An ``IProfiler`` of the TensorRT module ``trt`` that passes every report on."""

    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return Profiler()


@contextmanager
def layer_times(trt: Any, context: Any):
    """Collect the layers' times of an execution context for the length of a block.

    The context reports while it runs, which makes it wait for each execution.
    """
    times = LayerTimes()
    before = context.profiler
    context.profiler = profiler_of(trt, times.add)
    try:
        yield times
    finally:
        context.profiler = before
