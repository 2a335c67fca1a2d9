"""HiDrop: late entry, a pyramid of selections by the next layer's attention, and an early exit.

Source: docs/methods.md, "HiDrop".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PlanError
from ..plan.plan import StagePlan
from ..plan.stages import MAX_KEEP, RowPositions
from .narrowing import PUBLISHED_LAYERS, TIMES, scaled_counts
from .request import Options, Preset, Request, option

ENTRY, EDGES, EXIT = 8, (10, 14, 16, 18), 24
"""Published layers of 32: the first with vision, the first behind each edge, the first without."""

KEEP, OF = (87, 10, 5, 1), 576
"""Published counts of the schedule with a mean of 48 tokens, and of how many."""


@dataclass(frozen=True)
class HiDrop(Preset):
    """Published layers and counts; other models take them in proportion."""

    name = "hidrop"
    summary = "vision enters late, is narrowed by the next layer's attention, and leaves early"

    entry: int = option("first layer with visual tokens (a quarter of the depth)")  # type: ignore[assignment]
    exit: int = option("first layer without them, or the depth (3/4 of the depth)")
    edges: tuple[int, ...] = option("layers that score, and see fewer tokens, such as 10-14-16-18")
    keep: tuple[int, ...] = option("tokens kept at each of them, such as 87-10-5-1")
    positions: RowPositions = option(
        "original, separate or renumbered: the variant that the model was trained with (original)"
    )

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move all counts alike; then vision enters earlier, too; then it stays to the end."""
        keeps = [scaled_counts(KEEP, OF, times, visual_tokens) for times in TIMES]
        entry, edges, _ = _published(layers)
        keeps = list(dict.fromkeys(keep[: len(edges)] for keep in keeps))
        yield [{"keep": keep} for keep in keeps]
        for more in ({}, {"exit": layers}):
            yield [
                {"entry": at, "keep": keep, **more} for at in range(entry) for keep in keeps[::4]
            ]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage more than there are edges, entry and exit."""
        if ask.layers < 3:
            raise PlanError(
                f"hidrop: found a decoder of {ask.layers} layers, expected 3 or more. Use the "
                "preset exit-only."
            )
        at, starts, end = _published(ask.layers)
        last = ask.layers - 1
        edges = ask.integers("edges", starts, 1, last)
        before, after = edges[0] - 1, edges[-1] + 1
        entry = ask.within(
            "entry", min(at, before), 0, before, f"a layer from 0 to {before}, before the edges"
        )
        leaves = ask.within(
            "exit", max(end, after), after, ask.layers, f"{after} to {ask.layers}, behind the edges"
        )
        keep = ask.option("keep", scaled_counts(KEEP, OF, 1, ask.offered)[: len(edges)])
        limit = min(ask.offered, MAX_KEEP)
        falls = list(keep) == sorted(keep, reverse=True)
        if len(keep) != len(edges) or not falls or not 1 <= keep[-1] <= keep[0] <= limit:
            wanted = f"{len(edges)} counts from {limit} to 1, none larger than the one before"
            ask.reject("keep", keep, wanted)
        tokens = (ask.offered, *keep)
        counts = list(zip((*edges, leaves), tokens, strict=True))
        counts += [(ask.layers, 0)] if leaves < ask.layers else []
        positions = ask.option("positions", "original")
        return ask.plan(counts, "next_attention", late=entry, positions=positions)


def _published(layers: int) -> tuple[int, tuple[int, ...], int]:
    """Return entry, edges and exit in proportion, a layer or more apart, as many edges as fit."""
    found: list[int] = []
    for layer in (ENTRY, *EDGES, EXIT):
        near = layer * layers // PUBLISHED_LAYERS
        found.append(max(near, found[-1] + 1 if found else 0))
    entry, *edges, end = found
    return entry, tuple(edge for edge in edges if edge < layers), min(end, layers)
