"""A stage plan: which decoder layers see how many visual tokens, and how. Frozen, checked data.

    layers [0, 19): 576 visual tokens -- select 64 --> [19, 28): 64 -- drop --> [28, 32): 0

An entry lets fewer than all visual tokens of an image in. They may come late, or pass stages by:

    layers [0, 8): 0 -- carry --> [8, 24): 576 -- drop --> [24, 32): 0

It knows nothing about weights, files or devices; ``compile/planfile.py`` reads and writes YAML,
``checks.py`` says what is wrong with its parts.

Source: docs/design.md, "The plan".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import PlanError
from ..fields import Words, check_word, from_json, is_int, to_json
from ..selectors.registry import ENTRY_SELECTORS
from .checks import (
    LATER,
    check_edge,
    check_entry,
    check_flags,
    check_labels,
    check_probe,
    check_stage,
    is_count,
    require,
)
from .routing import Routing, check_routing
from .stages import CLASSES, ROW_POSITIONS, Edge, Entry, Part, Probe, RowPositions, Stage

PLAN_VERSION = 1
"""Version of the dict form. Readers refuse others."""

_REMEDY = 'Correct the plan: docs/design.md, "The plan", shows one.'


@dataclass(frozen=True)
class StagePlan:
    """The ordered stages of a decoder and the edges between them.

    A plan with a ``probe`` decides per prompt: every edge is a ``probe``, and every stage has room
    for all visual tokens that enter. It is *exact* where an edge follows each probed layer and
    nothing is padded, *adaptive* otherwise. All other plans are *static*.

    Raises:
        PlanError: on construction, when a field contradicts another or asks for something that
            this version does not run.
    """

    name: str
    layers: int  # decoder depth
    visual_tokens: int  # N of one image
    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...] = ()  # edge i is between stages i and i + 1
    decode_sees_shallow_vision: bool = False  # gates all open in decode steps
    calibrated: bool = False
    note: str = ""
    probe: Probe | None = field(default=None, metadata={"omit": True})
    entry: Entry | None = field(default=None, metadata={"omit": True})  # None: all N enter
    routing: Routing | None = field(default=None, metadata={"omit": True})  # None: all rows run
    positions: RowPositions = field(default="original", metadata={"omit": True})

    def __post_init__(self) -> None:
        check_labels(self.name, self.note)
        check_flags(self, "", "decode_sees_shallow_vision", "calibrated")
        for name in ("layers", "visual_tokens"):
            value = getattr(self, name)
            require(is_count(value), name, value, "a positive integer", "Take it from the model.")
        if self.entry is not None:
            check_entry(self.entry, self.visual_tokens)
        check_word("positions", self.positions, ROW_POSITIONS, PlanError, "Write one of them.")
        wanted = "original where an entry closes gaps, too"
        fits = self.positions == "original" or self.span == self.visual_tokens
        require(fits, "positions", self.positions, wanted, "Choose one of the two.")
        self._check_stages()
        self._check_edges()
        if self.routing is not None:
            check_routing(self.routing)
            self._check_routed(self.routing)
            self._check_rivals(self.routing)
        if self.freezes(*CLASSES):
            wanted, fix = "an entry that tells rows apart", "Write one: {selector: embedlens, ...}."
            require(self.tells_apart, "entry", self.entry, wanted, fix)

    def _check_stages(self) -> None:
        fits = _is_tuple_of(self.stages, Stage) and len(self.stages) > 0
        fix = "The dense plan has exactly one."
        require(fits, "stages", self.stages, "one stage or more", fix)
        start = 0
        for i, stage in enumerate(self.stages):
            check_stage(f"stages[{i}]", stage, start, first=i == 0)
            start = stage.layers[1]
        field, last = f"stages[{len(self.stages) - 1}].layers", list(self.stages[-1].layers)
        wanted = f"the last stage to stop at layers={self.layers}"
        require(start == self.layers, field, last, wanted, f"Write [{last[0]}, {self.layers}].")
        found = self.stages[0].visual_tokens
        wanted = f"all visual_tokens={self.visual_tokens} of an image"
        fix = "Write that number, or an entry: {selector: scope, keep: K} with fewer."
        if self.entry is not None:
            wanted, fix = f"entry.keep={self.entry.keep}", "Write the same number twice."
        late = found == 0 and self._carries(0)
        require(found == self.entering or late, "stages[0].visual_tokens", found, wanted, fix)

    def _check_edges(self) -> None:
        found: Any = self.edges
        if isinstance(found, tuple):
            found = Words(f"{len(found)} edges")
        fits = _is_tuple_of(self.edges, Edge) and len(self.edges) == len(self.stages) - 1
        wanted = f"{len(self.stages) - 1}, one between each two stages"
        require(fits, "edges", found, wanted, "Add or remove an edge.")
        counts = self.arriving
        for i, (edge, arriving) in enumerate(zip(self.edges, counts, strict=False)):
            before, after = self.stages[i : i + 2]
            check_edge(i, edge, before, after, arriving, probing=self.probe is not None)
        if self.edges:
            fits = counts[-1] == self.stages[-1].visual_tokens
            wanted = "drop, as no later stage takes what is carried"
            at = f"edges[{len(self.edges) - 1}].op"
            require(fits, at, self.edges[-1].op, wanted, "Write drop.")
        if self.entry is not None:
            layer = self.stages[self.entry_stage].layers[0]
            wanted = f"{layer}, where the first stage with visual tokens begins"
            fits = self.entry.layer == layer
            require(fits, "entry.layer", self.entry.layer, wanted, "Write the same number twice.")
        if self.probe is not None:
            wanted, fix = "none in a plan without edges", "Add an edge, or remove it."
            require(len(self.edges) > 0, "probe", Words("one"), wanted, fix)
            check_probe(self.probe, self.stages[0])

    def _check_routed(self, routing: Routing) -> None:
        """Refuse layers whose halves have gates by row, and are frozen or dropped as well."""
        for i, stage in enumerate(self.stages):
            for name in ("frozen", "drop_attention", "drop_mlp"):
                found = getattr(stage, name)
                wanted = f"none in a plan with routers, as routing {routing.kind} says what runs"
                fix = "Remove it, or the routing."
                require(not found, f"stages[{i}].{name}", found, wanted, fix)

    def _check_rivals(self, routing: Routing) -> None:
        """Refuse what rows that compete in a call cannot have."""
        wanted = f"one with three layers or more for {routing.kind}, whose first and last have none"
        fits = not routing.router.inner or self.layers > 2
        require(fits, "routing", Words(f"{self.layers} layers"), wanted, "Take another kind.")
        if not routing.competes:
            return
        wanted = f"none, as rows of a call compete in routing {routing.kind} ({routing.form})"
        fix = "Remove the edges, or take routers in the exact form that read one row each."
        require(not self.edges, "edges", Words(f"{len(self.edges)}"), wanted, fix)
        field = f"{self.stages[0].modes[0]} and others"
        wanted = "dense layers, as gates hold for a call of one kind of rows, and rows compete"
        fits = not self.stages[0].gated_layers
        require(fits, "stages[0].modes", Words(field), wanted, "Write dense.")

    def _carries(self, index: int) -> bool:
        edges = self.edges if isinstance(self.edges, tuple) else ()
        return index < len(edges) and isinstance(edges[index], Edge) and edges[index].op == "carry"

    @property
    def arriving(self) -> tuple[int, ...]:
        """Visual tokens that come to each stage: it takes them all, or none and they pass it by."""
        counts = [self.entering]
        for edge in self.edges:
            kept = {"select": edge.keep or 0, "drop": 0}
            counts.append(kept.get(edge.op, counts[-1]))
        return tuple(counts)

    @property
    def entry_stage(self) -> int:
        """The first stage that takes visual tokens."""
        return next(i for i, stage in enumerate(self.stages) if stage.visual_tokens)

    @property
    def kind(self) -> Literal["static", "exact", "adaptive"]:
        """The decider of t, K and e: the plan, or each prompt, exactly or at the next edge."""
        if self.probe is None:
            return "static"
        single = all(len(self.probed_layers(i)) == 1 for i in range(len(self.edges)))
        reaches_the_end = self.stages[-1].depth == 1
        return "exact" if single and reaches_the_end and not self.probe.buckets else "adaptive"

    @property
    def entering(self) -> int:
        """Visual tokens of one image that enter the decoder: all N, or what the entry keeps."""
        return self.visual_tokens if self.entry is None else self.entry.keep

    @property
    def tells_apart(self) -> bool:
        """True where the entry's selector tells matched rows of an image from others."""
        return self.entry is not None and "targets" in ENTRY_SELECTORS[self.entry.selector].takes

    @property
    def span(self) -> int:
        """Positions that one image takes, those of rows that do not enter included."""
        renumbered = self.entry is not None and self.entry.positions == "renumbered"
        return self.entering if renumbered else self.visual_tokens

    def span_of(self, rows: int) -> int:
        """Return the positions that an image of ``rows`` rows takes."""
        return min(self.span, rows)

    def lag_of(self, rows: int, advance: int) -> int:
        """Return by how much the positions behind an image fall behind the orders.

        ``advance``: the positions that its ``rows`` rows take in the model.
        """
        return self.span_of(rows) if self.positions == "separate" else rows - advance

    @property
    def trigger(self) -> int | None:
        """t: the last layer with all visual tokens that entered (a selection that keeps all ends it
        too).

        None where every prompt has its own.
        """
        if self.probe:
            return None
        cut = next((i for i, edge in enumerate(self.edges) if edge.op in ("select", "drop")), None)
        whole = self.stages if cut is None else self.stages[: cut + 1]
        return max(stage.layers[1] for stage in whole if stage.visual_tokens) - 1

    @property
    def exit(self) -> int | None:
        """e: the last layer with any visual tokens; None where every prompt has its own."""
        if self.probe:
            return None
        return max(stage.layers[1] for stage in self.stages if stage.visual_tokens) - 1

    @property
    def keep(self) -> int | None:
        """K of the first selection, None in a plan without one that is known beforehand."""
        return next((edge.keep for edge in self.edges if edge.op == "select"), None)

    @property
    def layers_ahead(self) -> tuple[int, ...]:
        """Layers whose queries and keys the stage before them computes for its edge, too."""
        return tuple(
            after.layers[0]
            for edge, after in zip(self.edges, self.stages[1:], strict=True)
            if edge.op == "select" and edge.selector.next_layer
        )

    def probed_layers(self, stage: int) -> list[int]:
        """Return the layers of ``stage`` whose probe can change something: an edge follows."""
        if self.probe is None or stage >= len(self.edges):
            return []
        return [n for n in self.stages[stage].attention_layers if n >= self.probe.first]

    @property
    def blind_stages(self) -> int:
        """Leading stages whose visual rows are the same whatever is asked about an image."""
        return self.blind_stages_of(1)

    def blind_stages_of(self, images: int) -> int:
        """Return the leading stages whose rows up to any of so many images no later row changes.

        A selection is among the rows of all images of a prompt, so with several it ends them; so
        does a carry, behind which the rows of all images stand together.
        """
        count = 1
        for edge in self.edges:
            if not edge.question_blind or (edge.op != "drop" and images > 1):
                break
            count += 1
        return count

    def routing_of(self, layer: int) -> Routing | None:
        """Return the routing of a layer; None where it has no routers."""
        routed = self.routing is not None and self.routing.routes(layer, self.layers)
        return self.routing if routed else None

    @property
    def whole_prompt(self) -> bool:
        """True where all rows of a prompt go in one call: they are compared with each other. So
        nothing of a prompt is known before the question.
        """
        return self.routing is not None and self.routing.router.whole_prompt

    @property
    def fixed_calls(self) -> bool:
        """True where rows of a call compete, so that a prompt is to be cut into calls one way."""
        return self.routing is not None and self.routing.competes

    @property
    def is_dense(self) -> bool:
        """True for the unpruned model."""
        first = self.stages[0]
        changed = first.gated_layers or first.frozen or first.drop_attention or first.drop_mlp
        plain = not changed and self.routing is None
        return plain and not self.edges and self.entry is None

    def freezes(self, *rows: str) -> bool:
        """Return whether any layer leaves rows of these kinds as they are."""
        return any(item.rows in rows for stage in self.stages for item in stage.frozen)

    @property
    def prefix_rules(self) -> frozenset[tuple[str, str, int]]:
        """Halves of layers that rows before an image do not go through, frozen or dropped. Plans
        that agree in it share the prefix's cache.
        """
        frozen = {
            ("frozen", item.part, layer)
            for stage in self.stages
            for item in stage.frozen
            if item.rows == "prefix"
            for layer in item.layers
        }
        return frozenset(frozen | {("dropped", part, layer) for part, layer in self.dropped})

    @property
    def dropped(self) -> tuple[tuple[Part, int], ...]:
        """Halves of layers that are left out, in the order of layers."""
        return tuple(
            (part, layer)
            for stage in self.stages
            for layer in range(*stage.layers)
            for part in stage.dropped_of(layer)
        )

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON: every field counts."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def visual_tokens_in(self, layer: int) -> int:
        """Return the visual tokens in ``layer``. Raises IndexError outside the decoder."""
        for stage in self.stages:
            if stage.layers[0] <= layer < stage.layers[1]:
                return stage.visual_tokens
        raise IndexError(f"layer {layer} of a decoder with {self.layers}")

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form, which ``from_dict`` reads."""
        return {"version": PLAN_VERSION, **to_json(self)}

    @classmethod
    def from_dict(cls, data: Any) -> StagePlan:
        """Read what ``to_dict`` returns, strictly.

        Raises:
            PlanError: an unknown or missing key, another version, or anything the constructor
                refuses.
        """
        require(isinstance(data, Mapping), "plan", data, "a mapping", _REMEDY)
        found = data.get("version", Words("nothing"))
        fits = is_int(found) and found == PLAN_VERSION
        fix = "The file is from another visistage."
        require(fits, "version", found, str(PLAN_VERSION), fix)
        data = {key: value for key, value in data.items() if key != "version"}
        return from_json(cls, data, PlanError, _REMEDY, defaults=True, hints=LATER)


def _is_tuple_of(value: Any, kind: type) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)
