"""Every selector by its name, as a plan writes it: those of an entry, and those of an edge.

The rule of an entry selector is in the module of its name here, that of an edge selector, which is
part of a graph, in ``graphs/modules/scores``.
"""

from __future__ import annotations

from .edge import EdgeSelector
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
            "embedlens",
            "EmbedLens: rows told apart by the words of the vocabulary that they resemble",
            ("vocabulary",),
            takes=("targets", "removes"),
        ),
        EntrySelector(
            "random", "control: patches by chance, always the same ones of an image", control=True
        ),
        EntrySelector("uniform", "control: every n-th patch", control=True),
    )
}

COUNTING_SELECTORS = {name: rule for name, rule in ENTRY_SELECTORS.items() if not rule.takes}
"""Those of them that need only be told how many rows enter."""

EDGE_SELECTORS: dict[str, EdgeSelector] = {
    selector.name: selector
    for selector in (
        EdgeSelector(
            "value_norm",
            "VisiPruner: norm of what a token adds to the last row's attention output",
            ("probe_query", "key", "value"),
        ),
        EdgeSelector(
            "attention",
            "FastV, PyramidDrop: attention of the last row, mean over heads",
            ("probe_query", "key"),
        ),
        EdgeSelector(
            "next_attention",
            "HiDrop: attention of the last row in the layer behind the edge, mean over heads",
            ("probe_query", "key"),
            next_layer=True,
        ),
        EdgeSelector(
            "v2drop",
            "V2Drop: length of a row's change in the last layer before the edge",
            ("change",),
        ),
        EdgeSelector(
            "sparsevlm",
            "SparseVLM: mean attention of those rows of the question that attend most to vision",
            ("text_queries", "key"),
        ),
    )
}
