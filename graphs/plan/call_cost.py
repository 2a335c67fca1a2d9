"""Work of one call of a graph: operations, and bytes that must move at least once.

Plain arithmetic over shapes, as ``cost.py``, but for the calls that really take place: an image,
a question and every later token are calls of their own, each over the slots its stage has then.
Masks and gates skip no work, so rows meet every slot. Operations are FLOPs (two for each
multiply-accumulate); norms, activations and softmax are left out, which is under 1 % of a
decoder's. Bytes are the weights once and the cache once; activations are not counted.

    decoder layer, Q rows, S slots     2 Q L + 4 Q S w      L = 2 d (w + w_kv) + 3 d m
    the same, rows that only serve     4 Q d w_kv
    output projection, the last row    2 d V
    encoder layer, T tokens            2 T (4 h^2 + 2 h m) + 4 T^2 h

Source: docs/methods.md, "Cost accounting".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..caches import ahead_of
from ..config import ModelConfig
from ..families.family import ImageLayout
from ..parts import OF_LAYERS, PROBE, SERVE, VISION, serves_alone, stage_of
from ..quantization import SCALE_BLOCK, parse_quant_config
from ..vision_config import PATCHES
from ..vision_contract import projects_later
from .cost import Geometry
from .plan import StagePlan

WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "w8": 1.0, "w4": 0.5 + 2 / SCALE_BLOCK}
"""Bytes of one weight of a linear layer by precision, INT4's scales included."""

ENCODER_FLOAT = ("w8", "w4")
"""Precisions that leave the vision encoder in float."""


@dataclass(frozen=True)
class GraphCall:
    """One call of a graph: ``rows`` of hidden states go in, its cache has ``slots``.

    ``rows`` is 0 for graphs that take none: the vision encoder, and what reads a cache only; of a
    selection that reads the question's rows it is their number.
    """

    graph: str
    rows: int
    slots: int


@dataclass(frozen=True)
class Work:
    """FLOPs, those of attention among them, and bytes that move at least once."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    attention_flops: float = 0.0

    @property
    def nbytes(self) -> float:
        """All bytes."""
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.attention_flops + other.attention_flops,
        )


@dataclass(frozen=True)
class Sizes:
    """Bytes of a decoder's weight, of a cached number, and of an encoder's weight; ``one_row``: of
    a decoder's weight in calls of one row, and of the head's, where they are others.
    """

    weight: float
    cache: float
    encoder: float
    one_row: float | None = None

    @classmethod
    def of(cls, precision: str) -> Sizes:
        """Return those of a precision, ``base[:option=value,...]``."""
        quant_config = parse_quant_config(precision)
        weight = WEIGHT_BYTES[quant_config.base]
        encoder = WEIGHT_BYTES["fp16"] if quant_config.base in ENCODER_FLOAT else weight
        cache = 4.0 if quant_config.base == "fp32" else 2.0
        one_row = WEIGHT_BYTES[quant_config.decode] if quant_config.decode else None
        return cls(weight, 1.0 if quant_config.cache == "int8" else cache, encoder, one_row)

    def weight_of(self, rows: float) -> float:
        """Return the bytes of a decoder's weight in a call of so many rows."""
        return self.one_row if self.one_row and rows == 1 else self.weight


COUNTS = Sizes(1, 1, 1)
"""Counts numbers instead of their bytes: lower bounds ask for ``layers_work(..., COUNTS)``."""


def work_of(
    call: GraphCall,
    config: ModelConfig,
    plan: StagePlan,
    sizes: Sizes,
    layout: ImageLayout | None = None,
) -> Work:
    """Return the work of a call, whatever its graph; ``layout``: as ``vision_work`` takes it."""
    if call.graph == VISION:
        projected = plan.entering if projects_later(config, plan) else None
        return vision_work(config, sizes, projected, layout)
    return decoder_work(call, Geometry.of(config.text), plan, sizes)


def decoder_work(call: GraphCall, geometry: Geometry, plan: StagePlan, sizes: Sizes) -> Work:
    """Return the work of a call of any graph but the vision encoder."""
    index = stage_of(call.graph)
    if call.graph.startswith("select") and "key" not in plan.edges[index].selector.reads:
        return Work()
    if call.graph == PROBE or call.graph.startswith("select"):  # a query or more, one layer
        query, kv = geometry.widths
        flops = 4 * max(1, call.rows) * call.slots * query
        return Work(flops, 0, 2 * kv * call.slots * sizes.cache, attention_flops=flops)
    last = index == len(plan.stages) - 1
    stage = plan.stages[index]
    if serves_alone(call.graph):
        caches = 2 * len(stage.attention_layers) + (ahead_of(plan, index) is not None)
        return serving_work(geometry, caches, call.rows, sizes)
    gathers = plan.routing is not None and plan.routing.gathers
    layers = range(*stage.layers) if gathers else range(0)
    routed = sum(plan.routing_of(layer) is not None for layer in layers)
    attending, mlps = len(stage.attention_layers) - routed, len(stage.mlp_layers) - routed
    work = stage_work(geometry, attending, call, sizes, head=last, mlps=mlps)
    if ahead_of(plan, index) is not None:
        work += ahead_work(geometry, call, sizes)
    if plan.routing is None or not routed:
        return work
    few = replace(call, rows=plan.routing.gathered(call.rows))
    rest = 2 * routed * geometry.layer_macs(0, call.rows - few.rows, 0)  # all have keys and values
    return work + stage_work(geometry, routed, few, sizes, head=False) + Work(rest)


def stage_work(
    geometry: Geometry,
    depth: int,
    call: GraphCall,
    sizes: Sizes,
    *,
    head: bool,
    mlps: int | None = None,
) -> Work:
    """Return the work of a call of ``depth`` layers; ``head``: with the output projection;
    ``mlps``: as ``layers_work`` takes it.
    """
    pairs, cached = call.rows * call.slots, call.slots + call.rows
    work = layers_work(geometry, depth, call.rows, pairs, cached, sizes, mlps)
    return work + head_work(geometry, sizes) if head else work


def layers_work(
    geometry: Geometry,
    depth: int,
    rows: float,
    pairs: float,
    cached: float,
    sizes: Sizes,
    mlps: int | None = None,
) -> Work:
    """Return the work of ``depth`` decoder layers.

    Args:
        geometry: sizes of the decoder.
        depth: number of layers that attend.
        rows: rows that run through them.
        pairs: (row, slot) pairs that attend.
        cached: rows of keys and values that are read or written.
        sizes: bytes of the numbers.
        mlps: number of layers with an MLP; by default the same.
    """
    mlps = depth if mlps is None else mlps
    attention, mlp = geometry.part_weights("attention"), geometry.part_weights("mlp")
    attends = depth * geometry.layer_macs(rows, rows, pairs, 0)
    return Work(
        flops=2 * (attends + mlps * geometry.layer_macs(0, 0, 0, rows)),
        weight_bytes=(depth * attention + mlps * mlp) * sizes.weight_of(rows),
        cache_bytes=depth * 2 * geometry.widths[1] * cached * sizes.cache,
        attention_flops=2 * depth * geometry.layer_macs(0, 0, pairs),
    )


def ahead_work(geometry: Geometry, call: GraphCall, sizes: Sizes) -> Work:
    """Return the work of a layer's queries and keys alone, for all rows of a call."""
    weights, kv = geometry.hidden * sum(geometry.widths), geometry.widths[1]
    return Work(2 * call.rows * weights, weights * sizes.weight, kv * call.rows * sizes.cache)


def serving_work(geometry: Geometry, caches: int, rows: int, sizes: Sizes) -> Work:
    """Return the work of rows that serve so many caches, of keys or of values, and no more."""
    kv = geometry.widths[1]
    weights = caches * geometry.hidden * kv
    return Work(2 * rows * weights, weights * sizes.weight, caches * kv * rows * sizes.cache)


def head_work(geometry: Geometry, sizes: Sizes) -> Work:
    """Return the work of the output projection of one row."""
    return Work(2 * geometry.head_weights, geometry.head_weights * sizes.weight_of(1))


def vision_work(
    config: ModelConfig,
    sizes: Sizes,
    projected: int | None = None,
    layout: ImageLayout | None = None,
) -> Work:
    """Return the work of vision encoder, as far as it is read, and projector for one image.

    ``projected``: rows that are projected; by default all visual tokens. ``layout``: of the image;
    by default it is one of the most tokens.
    """
    vision, tokens = config.vision, config.vision.tokens
    together = vision.kind == PATCHES  # all patches of an image see each other
    count = config.visual_tokens if layout is None else layout.rows
    tiles = config.most_tiles if layout is None else layout.tiles
    h, d = vision.hidden, config.text.hidden
    layer = 4 * h * h + (3 if vision.gated else 2) * h * vision.intermediate
    patch = vision.channels * vision.patch_size**2 * h
    wide = config.feature_width
    inner = wide if together else d
    projector = wide * inner + (config.projector_layers - 1) * inner * d
    one = projector if together else h * d + d * d
    injected = one * len(config.text.inject)  # of all visual tokens
    depth = config.encoder_depth
    each = tiles * tokens if together else tokens  # rows that a row attends to
    seen = depth * each
    if vision.window:
        seen = len(vision.whole) * each + (depth - len(vision.whole)) * vision.window_patches
    attention = tiles * 4 * tokens * seen * h
    rows = count if projected is None else min(projected, count)
    if config.packs:  # of all tiles: the lines are packed behind it
        rows = config.rows_of(tiles)
    cut = tiles * (1 if together else vision.patches)
    linear = cut * patch + tiles * depth * tokens * layer + rows * projector
    linear += count * injected
    weights = patch + depth * layer + projector + injected
    return Work(2 * linear + attention, weights * sizes.encoder, attention_flops=attention)


Slots = Callable[[int, int], int]
"""(stage, rows that it holds) -> slots that its cache has then."""


def question_calls(
    plan: StagePlan, *, prefix: int, visual: int, text: int, slots: Slots, cached: bool = False
) -> list[GraphCall]:
    """Return the calls of one question about one image, up to the first token.

    ``prefix`` rows are held already; ``visual`` is N; ``cached``: the image was seen before. A
    plan that decides per prompt is taken as if nothing triggered; one that compares all rows of a
    prompt runs its prefix, too. What a selector of the entry
    does takes a thousandth of its encoder's work, and is left out.
    """
    calls = []
    visual = min(visual, plan.entering)
    if visual and not cached:
        calls.append(GraphCall(VISION, 0, 0))
    if plan.whole_prompt:
        rows = prefix + visual + text
        return [*calls, GraphCall("stage0", rows, slots(0, rows))]
    first = min(visual, plan.stages[0].visual_tokens)
    if first and not cached:
        calls.append(_visual_call(plan, 0, first, slots(0, prefix + first)))
    held = prefix + first + text
    calls.append(GraphCall("stage0", text, slots(0, held)))
    known = plan.blind_stages if cached else 0  # stages that hold the image's rows already
    for index, edge in enumerate(plan.edges):
        new = index + 1 >= known
        if edge.op == "select" and visual and new:
            asked = text if "text_queries" in edge.selector.reads else 0
            calls.append(GraphCall(f"select{index}", asked, slots(index, held)))
        kept = min(visual, plan.stages[index + 1].visual_tokens)
        held = prefix + kept + text
        rows = kept + text if new else text
        if new and kept and plan.stages[index + 1].serves:
            calls.append(_visual_call(plan, index + 1, kept, 0))
            rows = text
        calls.append(GraphCall(f"stage{index + 1}", rows, slots(index + 1, held)))
    return calls


def _visual_call(plan: StagePlan, stage: int, rows: int, slots: int) -> GraphCall:
    """Return a call of visual rows alone; those that serve read no cache."""
    if plan.stages[stage].serves:
        return GraphCall(f"{SERVE}{stage}", rows, 0)
    return GraphCall(f"stage{stage}", rows, slots)


def token_calls(
    plan: StagePlan, *, prefix: int, visual: int, text: int, slots: Slots
) -> list[GraphCall]:
    """Return the calls of one later token, ``text`` counting the answer so far."""
    return [
        GraphCall(
            f"stage{index}",
            1,
            slots(index, prefix + min(visual, stage.visual_tokens) + text + 1),
        )
        for index, stage in enumerate(plan.stages)
    ]


def layers_of(call: GraphCall, config: ModelConfig, plan: StagePlan) -> int:
    """Return the layers that one call runs; a selection or a probe counts as one."""
    if call.graph == VISION:
        return config.encoder_depth
    whole = call.graph.startswith(OF_LAYERS)
    return plan.stages[stage_of(call.graph)].depth if whole else 1


def total_work(works: Iterable[Work]) -> Work:
    """Return the sum of ``works``."""
    return sum(works, Work())
