"""The contract of edge selectors: what one reads of a select edge to score its visual rows.

A selector's score is a function ``score`` in the module of its name in ``graphs/modules/scores``,
part of the graph at the edge. It reads names of ``READINGS``, which become inputs of that graph;
those that are of rows, the stage before hands out. Nothing else is computed or carried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rows = Literal["visual", "text"]
"""Rows that a stage hands something out of: the visual ones that the edge is offered, or those of
the last text, which is the question."""

ROW_READINGS: dict[str, Rows] = {
    "change": "visual",  # length of a row's change in the last layer
    "text_queries": "text",  # queries, rotated, in the last layer
}
"""Readings with one entry for each row: outputs of the stage before, and whose rows they are."""

CACHE_READINGS = ("key", "value")
"""Readings of the last layer's cache."""

QUESTION_READINGS = ("probe_query", "text_queries")
"""Readings of rows that know the question: of the last one, and of all its rows."""

READINGS = (*QUESTION_READINGS, "change", *CACHE_READINGS)
"""Names of what a selector may read, beside the visual rows themselves."""


@dataclass(frozen=True)
class EdgeSelector:
    """One score: a row of ``EDGE_SELECTORS``.

    Attributes:
        name: as plans write it.
        summary: what it ranks by, in a line.
        reads: names in ``READINGS``.
        next_layer: whether they are those of the layer behind the edge, of all rows before it. The
            stage before then ends in that layer's norm, queries and keys (``layer.Ahead``).
    """

    name: str
    summary: str
    reads: tuple[str, ...]
    next_layer: bool = False

    @property
    def question_blind(self) -> bool:
        """True if it reads visual rows alone, so that it chooses the same whatever is asked."""
        return not {*QUESTION_READINGS} & {*self.reads}

    @property
    def inputs(self) -> frozenset[str]:
        """Names of all that its graph reads, scales of an INT8 cache included."""
        names = {*self.reads, "query_order", "rows", "positions", "order"}
        if "text_queries" in names:
            names.add("text_order")
        for name in names & {*CACHE_READINGS}:
            names |= {f"{name}_scale", "slot_order", "visual_slots"}
        return frozenset(names)

    @property
    def row_readings(self) -> tuple[str, ...]:
        """Names of what the stage before hands out for it, row by row."""
        return tuple(name for name in ROW_READINGS if name in self.reads)
