"""Engines that a bundle needs, and the shapes each is compiled for: read off the contract.

Pure data. Two profiles per stage: decoding in 1 to 8 rows, prefill in 9 and more. (A profile of
exactly one row beside a wide one makes the compiler store every weight twice.) Where slots are
fixed, each context length has engines of its own; elsewhere one engine serves a range.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bundle import ANY_CONTEXT, Manifest
from .caches import SLOT_STEP, stage_slots
from .contract import GraphSpec
from .parts import PROBE, serves_alone, stage_of
from .vision_contract import TILES, WINDOWS

DECODE_ROWS = 8
"""Most rows of a call in the decode profile."""

PREFILL_QUESTION_ROWS = 64
"""Text rows of the call that prefill is tuned for."""

Shape = tuple[int, ...]
SymbolSizes = dict[str, tuple[int, int, int]]
"""Smallest, usual and largest size of each symbol of the contract."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine to compile.

    Attributes:
        name: of the engine's files.
        graph: of the bundle.
        context: rows of an unpruned prompt and answer that it has space for; None: any.
        source: file in the bundle that the parser reads.
        spec: the graph's contract.
        slots: largest S; 0 where the graph has none.
        profiles: for each, smallest, usual and largest shape of every input.
    """

    name: str
    graph: str
    context: int | None
    source: str
    spec: GraphSpec
    slots: int
    profiles: tuple[dict[str, tuple[Shape, Shape, Shape]], ...]

    @property
    def file(self) -> str:
        """Name of the compiled engine."""
        return f"{self.name}.engine"


def engine_specs_of(manifest: Manifest) -> list[EngineSpec]:
    """Return every engine of a bundle, in the order in which a prompt meets them."""
    out = []
    for name, fact in manifest.graphs.items():
        if fact.variants:
            for context, file in fact.variants.items():
                slots = 0 if context == ANY_CONTEXT else _slots(manifest, name, context)
                out.append(
                    _engine_spec(manifest, name, file, context or None, (slots, slots, slots))
                )
        elif fact.spec.follows_context:
            likely, most = (_slots(manifest, name, pick(manifest.contexts)) for pick in (min, max))
            out.append(_engine_spec(manifest, name, fact.file, None, (SLOT_STEP, likely, most)))
        else:
            out.append(_engine_spec(manifest, name, fact.file, None, (0, 0, 0)))
    return out


def _engine_spec(
    manifest: Manifest, graph: str, file: str, context: int | None, slots: tuple[int, int, int]
) -> EngineSpec:
    spec, most = manifest.graphs[graph].spec, slots[2]
    stage = manifest.plan.stages[stage_of(graph)] if most else None
    visual = stage.visual_tokens if stage else 0
    # A probe reads all visual rows first, and later the few that were kept.
    least = visual
    if graph == PROBE:
        least = 1
    elif graph.startswith("select") and manifest.config.varies:
        least = manifest.plan.edges[stage_of(graph)].keep or 1
    offered = (least, visual, most)
    if stage is None:
        offered = (1, manifest.plan.entering, manifest.config.visual_tokens)
    tiles = manifest.config.most_tiles
    asked = (1, min(PREFILL_QUESTION_ROWS, most), most)
    sizes: SymbolSizes = {
        "B": (1, 1, 1),
        "S": slots,
        "N": offered,
        "T": asked,
        TILES: (manifest.config.least_tiles, tiles, tiles),
        WINDOWS: manifest.config.windows,
    }
    if serves_alone(graph):  # rows of one image, or of several
        one = manifest.plan.stages[stage_of(graph)].visual_tokens
        profiles = [_profile(spec, sizes | {"Q": (1, one, max(one, *manifest.contexts))})]
    elif spec.has("Q"):
        likely = visual if stage_of(graph) == 0 and visual else visual + PREFILL_QUESTION_ROWS
        decode = (1, 1, DECODE_ROWS)
        prefill = (DECODE_ROWS + 1, min(max(likely, DECODE_ROWS + 1), most), most)
        profiles = [_profile(spec, sizes | {"Q": rows}) for rows in (decode, prefill)]
    else:
        profiles = [_profile(spec, sizes)]
    name = graph if context is None else f"{graph}.context{context}"
    return EngineSpec(name, graph, context, file, spec, most, tuple(profiles))


def _profile(spec: GraphSpec, sizes: SymbolSizes) -> dict[str, tuple[Shape, Shape, Shape]]:
    def at(shape: tuple[int | str, ...], which: int) -> Shape:
        return tuple(sizes[d][which] if isinstance(d, str) else d for d in shape)

    return {i.name: (at(i.shape, 0), at(i.shape, 1), at(i.shape, 2)) for i in spec.inputs}


def _slots(manifest: Manifest, graph: str, context: int) -> int:
    slots = stage_slots(manifest.plan, manifest.config.visual_tokens, context)
    return slots[stage_of(graph)]
