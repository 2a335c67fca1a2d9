"""Every entry selector by its name, as a plan writes it. Modules of these names have the rules."""

from __future__ import annotations

from .entry import EntrySelector

ENTRY_SELECTORS: dict[str, EntrySelector] = {
    selector.name: selector
    for selector in (
        EntrySelector(
            "scope",
            "SCOPE: salient patches that resemble what the others leave uncovered",
            ("similarity", "saliency"),
        ),
        EntrySelector(
            "divprune",
            "DivPrune: rows that differ most from each other, whatever they show",
            ("row_similarity",),
        ),
        EntrySelector(
            "cls",
            "FasterVLM: the patches with most attention of the encoder's class row",
            ("saliency",),
        ),
        EntrySelector(
            "visionzip",
            "VisionZip: the class row, the patches it attends to most, and the rest merged",
            ("features", "class_row", "saliency", "keys"),
            needs_renumbering=True,
        ),
        EntrySelector(
            "random", "control: patches by chance, always the same ones of an image", control=True
        ),
        EntrySelector("uniform", "control: every n-th patch", control=True),
    )
}
