"""How near each part of a bundle comes to what the machine can do.

The floor of a call is the slower of its operations at the measured rate and its bytes at the
measured bandwidth (``graphs/plan/call_cost.py``, ``peaks.py``): no kernel beats it. A part below 1
of its floor's share has room left; what the share cannot say is whether kernels or calls are to
blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...graphs.bundle import Manifest
from ...graphs.plan.call_cost import GraphCall, Sizes, Work, work_of
from .peaks import Peaks


@dataclass(frozen=True)
class GraphRoofline:
    """One graph in one phase: its work, the floor of its calls, and what they took, in ms."""

    graph: str
    calls: int
    work: Work
    lower_bound_ms: float
    measured_ms: float
    bound: str

    @property
    def share(self) -> float:
        """Floor over measured: 1 is the roofline."""
        return self.lower_bound_ms / self.measured_ms if self.measured_ms else 0.0


def parts_of(
    manifest: Manifest, calls: Sequence[GraphCall], measured_ms: Mapping[str, float], peaks: Peaks
) -> list[GraphRoofline]:
    """Every graph among ``calls``, in the order of its first call."""
    sizes = Sizes.of(manifest.precision)
    out = []
    for graph in dict.fromkeys(call.graph for call in calls):
        own = [
            work_of(call, manifest.config, manifest.plan, sizes)
            for call in calls
            if call.graph == graph
        ]
        work = sum(own, Work())
        lower_bound = sum(map(peaks.lower_bound_ms, own))
        out.append(
            GraphRoofline(
                graph, len(own), work, lower_bound, measured_ms.get(graph, 0.0), peaks.bound(work)
            )
        )
    return out


def lower_bound_of(manifest: Manifest, calls: Sequence[GraphCall], peaks: Peaks) -> float:
    """Milliseconds that no run of ``calls`` can beat."""
    sizes = Sizes.of(manifest.precision)
    return sum(
        peaks.lower_bound_ms(work_of(call, manifest.config, manifest.plan, sizes)) for call in calls
    )
