"""Plans of different methods at the same cost: each brought to a share of the visual FLOPs.

    matched_plan("fastv", 0.5, geometry, 576)                      r is moved until it costs half
    matched_plan("visipruner:entry=scope", 0.25, geometry, 576)    K of the entry is, or t

Visual FLOPs are those that the graphs run (``cost``'s accounting "graphs"), against the dense plan.
Which options move is the preset's to say (``Preset.ways``).

Source: docs/compare.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PlanError
from ..plan.cost import Geometry, dense_cost, plan_cost
from ..plan.plan import StagePlan
from ..selectors.registry import COUNTING_SELECTORS
from .presets import PRESETS, parse_request, preset, request_text
from .request import Options, steps

NEAR = 0.01
"""Share of the dense FLOPs by which a plan may miss its target before other options move, too."""


@dataclass(frozen=True)
class MatchedPlan:
    """A plan, as it is typed, and its share of the dense plan's visual FLOPs."""

    text: str
    share: float


def methods() -> tuple[str, ...]:
    """Return every preset with plans to choose from, and those that are joined with an entry.

    Those that need weights of their own are left to be named.
    """
    plain = [preset for preset in PRESETS.values() if not preset.needs_weights]
    scaled = [preset for preset in plain if is_scaled(preset.name)]
    joined = [f"{preset.name}:entry={name}" for preset in scaled for name in preset.joined]
    return (*(preset.name for preset in scaled), *joined)


def is_scaled(method: str) -> bool:
    """Return whether ``method`` is a preset's name, or ``NAME:entry=SELECTOR`` without a count."""
    name, options = parse_request(method)
    if name not in PRESETS or not [*PRESETS[name].ways(32, 576)]:
        return False
    return not options or ([*options] == ["entry"] and options["entry"] in COUNTING_SELECTORS)


def is_control(method: str) -> bool:
    """Return whether a method keeps rows without looking at them."""
    name, _ = parse_request(method)
    return name in PRESETS and PRESETS[name].control


def flops_share(plan: StagePlan, geometry: Geometry) -> float:
    """Return the visual FLOPs of a plan that is the same for every prompt; of dense 1."""
    cost = plan_cost(plan, geometry, accounting="graphs")
    return cost.visual_macs / dense_cost(plan, geometry).visual_macs


def matched_plan(method: str, share: float, geometry: Geometry, visual_tokens: int) -> MatchedPlan:
    """Return the plan of a method whose visual FLOPs come nearest to ``share`` of the dense ones.

    Of the preset's ways the first counts that has a plan within ``NEAR``; without one the nearest
    of all.

    Raises:
        PlanError: the method has no plan for such a decoder.
    """
    name, given = parse_request(method)
    nearest: list[MatchedPlan] = []
    why = ""
    for way in _ways(name, given, geometry.layers, visual_tokens):
        found = []
        for options in way:
            try:
                plan = preset(name, geometry.layers, visual_tokens, **options)
            except PlanError as error:
                why = str(error)
                continue
            found.append(MatchedPlan(request_text(name, options), flops_share(plan, geometry)))
        nearest += sorted(found, key=lambda plan: abs(plan.share - share))[:1]
        if found and abs(nearest[-1].share - share) <= NEAR:
            return nearest[-1]
    if not nearest:
        raise PlanError(why or f"{method}: no plan can be brought to a share of the FLOPs")
    return min(nearest, key=lambda plan: abs(plan.share - share))


def _ways(name: str, given: Options, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
    """Yield a preset's own ways; behind an entry K of the entry moves, then the first way, too."""
    own = PRESETS[name].ways(layers, visual_tokens)
    if not given:
        yield from own
        return
    entries = [{"entry": f"{given['entry']}-{keep}"} for keep in steps(1, visual_tokens, 192)]
    yield entries
    yield [{**options, **entry} for options in next(own) for entry in entries[::3]]
