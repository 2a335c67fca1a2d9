"""Every entry selector by its name, as a plan writes it."""

from __future__ import annotations

from .cls import ClassAttention
from .divprune import DivPrune
from .entry import EntrySelector
from .random_rows import RandomRows
from .scope import Scope
from .uniform import UniformRows
from .visionzip import VisionZip

ENTRY_SELECTORS: dict[str, EntrySelector] = {
    selector.name: selector
    for selector in (
        Scope(),
        DivPrune(),
        ClassAttention(),
        VisionZip(),
        RandomRows(),
        UniformRows(),
    )
}
