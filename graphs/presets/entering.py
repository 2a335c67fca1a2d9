"""Presets that cut where an image enters, and nowhere else: one for every entry selector.

Source: docs/methods.md, "Entry selectors".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..plan.plan import StagePlan
from ..plan.stages import Entry, Positions
from ..selectors.entry import EntrySelector
from ..selectors.registry import COUNTING_SELECTORS
from .request import Options, Preset, Request, option, steps


@dataclass(frozen=True)
class Entering(Preset):
    """K rows of an image, chosen at the encoder's output; all layers see them."""

    selector: ClassVar[EntrySelector]

    keep: int = option("K, visual tokens that enter (2 of 9)")
    positions: Positions = option("original or renumbered: where they stand (original if it can)")

    @classmethod
    def ways(cls, layers: int, visual_tokens: int) -> Iterator[list[Options]]:
        """Move K."""
        yield [{"keep": keep} for keep in steps(1, visual_tokens, 192)]

    def build(self, ask: Request) -> StagePlan:
        """Return a plan of one stage."""
        ask.without(f"the preset {self.name}, which is an entry itself", "entry")
        offered = ask.offered
        keep = ask.within("keep", max(1, 2 * offered // 9), 1, offered, f"1 to {offered} tokens")
        default = "renumbered" if self.selector.needs_renumbering else "original"
        entry = Entry(self.selector.name, keep, ask.option("positions", default))
        return ask.plan([(ask.layers, keep)], entry=entry)


def entering_presets() -> list[type[Preset]]:
    """Return a preset for each selector, of its name."""
    return [
        type(
            f"Entering{selector.name.title()}",
            (Entering,),
            {
                "name": selector.name,
                "summary": selector.summary,
                "selector": selector,
                "control": selector.control,
            },
        )
        for selector in COUNTING_SELECTORS.values()  # others have presets of their own
    ]
