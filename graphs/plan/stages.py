"""The parts of a plan: an entry, stages, the edges between them, and a probe. Frozen data.

Layers are absolute, counted from 0, ranges half-open. The plan that holds the parts checks them.

Source: docs/design.md, "The plan"; modes: docs/methods.md, "VisiPruner: shallow layers".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from ..fields import to_json
from ..selectors.edge import EdgeSelector
from ..selectors.registry import EDGE_SELECTORS

MAX_KEEP = 3840
"""Largest K of a selection: TensorRT's TopK goes no further."""

Mode = Literal["dense", "text_blind", "text_blind_novv", "sink", "sink_half"]
"""A layer's treatment of visual tokens; all but ``dense`` are gated per slot (docs/design.md,
"Text-blind layers").

    dense            everybody attends as usual
    text_blind       text rows lose the visual columns; visual rows are untouched
    text_blind_novv  the same, and visual rows see the prefix only
    sink             as text_blind_novv, and text rows put the removed mass on the value of the
                     first visual token (layer 0 of VisiPruner, 7B)
    sink_half        visual rows see the prefix only, text rows lose the first half of the visual
                     columns, nothing is merged (layer 0 of VisiPruner, 13B)
"""

Norm = Literal["gated", "renorm"]
"""``gated``: removed after the softmax, its mass is lost; ``renorm``: masked before the softmax."""

Op = Literal["select", "drop", "probe", "carry"]
"""The operation of an edge: keep K tokens, keep none, or whatever the plan's ``Probe`` finds; or
take all of them along, be it into a stage that they pass by."""

Part = Literal["attention", "mlp"]
"""The halves of a layer; each adds its update to the rows."""

FrozenRows = Literal["visual", "matched", "unmatched", "prefix"]
"""Rows that a layer may leave as they are: visual ones, those of them that the entry's selector
matched or did not match, or text before the first image."""

Removed = Literal["matched", "unmatched", "random", "none"]
"""Rows that an entry by classes lets go: those that are matched, those that are not, or chosen by
chance, as many as are matched (at most as many as are not)."""

Positions = Literal["original", "renumbered"]
"""Positions of rows that enter: those of the patches they stand for, as if the others were still
between them, or one after another."""

RowPositions = Literal["original", "separate", "renumbered"]
"""Positions of all rows of a prompt.

    original    each row's place in the unpruned prompt
    separate    text counts on as if no image stood in it, and an image from the text before it
    renumbered  as original, but the visual rows that an edge selects close up, from the image's
                first position on; the text behind them stays where it is
"""

MODES: tuple[str, ...] = get_args(Mode)
NORMS: tuple[str, ...] = get_args(Norm)
OPS: tuple[str, ...] = get_args(Op)
POSITIONS: tuple[str, ...] = get_args(Positions)
ROW_POSITIONS: tuple[str, ...] = get_args(RowPositions)
REMOVED: tuple[str, ...] = get_args(Removed)
PARTS: tuple[str, ...] = get_args(Part)
FROZEN_ROWS: tuple[str, ...] = get_args(FrozenRows)
CLASSES = ("matched", "unmatched")
"""Those of ``FROZEN_ROWS`` that a selector of the entry tells apart."""


@dataclass(frozen=True)
class Frozen:
    """Rows of the prompt that get no update of one half of some layers.

    They serve keys and values to others as ever. Rows of the answer are never frozen.
    """

    rows: FrozenRows
    part: Part
    layers: tuple[int, ...]  # absolute, ascending


@dataclass(frozen=True)
class Stage:
    """A contiguous range of layers with one visual-token count; checked by the plan it is in."""

    layers: tuple[int, int]  # [start, stop)
    # Per image, after a selection per prompt. 0: there are none, or they pass the stage by.
    visual_tokens: int
    modes: tuple[Mode, ...]  # one per layer
    norm: Norm = "gated"
    frozen: tuple[Frozen, ...] = field(default=(), metadata={"omit": True})
    # Layers, ascending, whose attention or MLP is left out for all rows: no weights, no cache.
    drop_attention: tuple[int, ...] = field(default=(), metadata={"omit": True})
    drop_mlp: tuple[int, ...] = field(default=(), metadata={"omit": True})

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.layers[1] - self.layers[0]

    @cached_property
    def gated_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers that take gates: every mode but ``dense``."""
        start = self.layers[0]
        return tuple(start + i for i, mode in enumerate(self.modes) if mode != "dense")

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers that attend, and so have a cache."""
        return tuple(layer for layer in range(*self.layers) if layer not in self.drop_attention)

    @cached_property
    def mlp_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers with an MLP."""
        return tuple(layer for layer in range(*self.layers) if layer not in self.drop_mlp)

    def parts_of(self, layer: int) -> tuple[Part, ...]:
        """Return the halves of a layer that run."""
        dropped = {"attention": self.drop_attention, "mlp": self.drop_mlp}
        return tuple(part for part in get_args(Part) if layer not in dropped[part])

    def dropped_of(self, layer: int) -> tuple[Part, ...]:
        """Return the halves of a layer that are left out."""
        return tuple(part for part in get_args(Part) if part not in self.parts_of(layer))

    @cached_property
    def serves(self) -> bool:
        """True where no layer changes visual rows: they serve keys and values, and nothing else
        needs to run for them.
        """
        still = {
            (item.part, layer)
            for item in self.frozen
            if item.rows == "visual"
            for layer in item.layers
        }
        halves = {(part, layer) for layer in range(*self.layers) for part in self.parts_of(layer)}
        return self.visual_tokens > 0 and halves <= still

    @cached_property
    def masked(self) -> tuple[Frozen, ...]:
        """Frozen rows among those that run through the stage; rows that serve it do not."""
        return tuple(f for f in self.frozen if f.rows == "prefix" or not self.serves)

    @cached_property
    def gained_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers that leave rows of a call as they are, ascending."""
        return tuple(sorted({layer for item in self.masked for layer in item.layers}))

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form; ``norm`` only where it means something."""
        data = to_json(self)
        if not self.gated_layers:
            del data["norm"]
        return data


@dataclass(frozen=True)
class Entry:
    """The visual rows of an image that enter the decoder: ``keep`` of N, chosen once per image.

    The choice is made at the vision encoder's output, before any question is known.
    """

    selector: str  # a name of ``selectors.registry.ENTRY_SELECTORS``
    keep: int  # K0, visual tokens that enter
    positions: Positions = "original"
    layer: int = 0  # the first layer that sees them
    # Of a selector by classes: ids of the vocabulary that make a row matched, and which rows go.
    targets: tuple[int, ...] = field(default=(), metadata={"omit": True})
    removes: Removed = field(default="none", metadata={"omit": True})

    @property
    def text(self) -> str:
        """The short form, as presets take it: ``scope-64``, or ``scope-64-at8``."""
        closed = "-renumbered" if self.positions == "renumbered" else ""
        late = f"-at{self.layer}" if self.layer else ""
        return f"{self.selector}-{self.keep}{closed}{late}"

    def summary(self, visual_tokens: int) -> str:
        """Return what becomes of an image of so many visual tokens, in words."""
        closed = ", renumbered" if self.positions == "renumbered" else ""
        late = f" before layer {self.layer}" if self.layer else ""
        if self.removes != "none":
            few = "" if self.keep == visual_tokens else f"{self.keep} of "
            return f"up to {few}{visual_tokens} visual tokens enter: {self.removes} rows do not"
        return (
            f"{self.keep} of {visual_tokens} visual tokens enter{late}, by {self.selector}{closed}"
        )


@dataclass(frozen=True)
class Edge:
    """The operation on the visual tokens between two stages."""

    op: Op
    # Of a select: what ranks them, a name of ``selectors.registry.EDGE_SELECTORS``, and K for all
    # images of a prompt.
    score: str | None = field(default=None, metadata={"omit": True})
    keep: int | None = field(default=None, metadata={"omit": True})

    @property
    def question_blind(self) -> bool:
        """True where the visual rows that go on are the same whatever is asked."""
        if self.op == "select":
            return self.selector.question_blind
        return self.op != "probe"

    @property
    def selector(self) -> EdgeSelector:
        """The row of ``EDGE_SELECTORS`` for a select edge's score."""
        assert self.score is not None
        return EDGE_SELECTORS[self.score]


@dataclass(frozen=True)
class Probe:
    """Thresholds of a plan that decides per prompt by the last prompt row's attention.

    In every layer from ``first`` on, o is that row's attention output (all heads, before the
    output projection) and c_j the part of it that comes from visual token j.

        trigger   the first layer where some cos(o - c_j, o) < cosine; kept are the tokens with
                  |c_j| > contribution in that layer (>= where not ``strict``)
        exit      the layer that brings the number of quiet layers since to ``exit_layers``; quiet
                  is a layer where every kept token has cos(o - c_j, o) >= exit_cosine

    Both act at the next edge. ``consecutive``: a layer that is not quiet starts the count again.
    ``buckets``: row counts that a selection is padded to, ascending; empty: exactly what is kept.
    ``whole_leaves``: vision may leave after a selection that kept every token, too.

    Source: docs/methods.md, "VisiPruner: decision rules".
    """

    first: int
    cosine: float
    contribution: float
    strict: bool = True
    exit_cosine: float | None = None  # None: vision stays to the end
    exit_layers: int = 2
    consecutive: bool = False
    buckets: tuple[int, ...] = ()
    whole_leaves: bool = field(default=True, metadata={"omit": True})

    def rows_for(self, kept: int) -> int:
        """Return the rows that ``kept`` tokens take: their bucket, or a multiple of the largest."""
        if not self.buckets or not kept:
            return kept
        largest = self.buckets[-1]
        return next((size for size in self.buckets if size >= kept), -(-kept // largest) * largest)
