"""Names, types and shapes of every graph's inputs and outputs, said once.

Export, buffers and engine profiles are derived from these specs; nothing else spells a tensor
name. Dimensions are integers or symbols:

    B  batch              Q  rows in this call        S  slots of the stage's cache
    N  visual rows offered to a selection             T  rows of the question, where it reads them

The rest are facts of the model.

Source: docs/design.md, "Append rows".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .caches import ahead_of, appended, cache_dtype, part_caches
from .config import ModelConfig
from .errors import PlanError
from .fusion import check_injected
from .parts import PROBE, PROJECT, VISION, StagePart, part_names, probed, serving_name
from .plan.plan import StagePlan
from .plan.stages import Edge
from .precision import NO_FALLBACK, Fp32Fallback
from .quantization import CacheScheme
from .selectors.edge import CACHE_READINGS, ROW_READINGS
from .selectors.entry import PROJECTED, READINGS
from .selectors.registry import ENTRY_SELECTORS
from .text_config import TextConfig
from .vision_config import PATCHES, VisionConfig

Rows = TypeVar("Rows")

INVISIBLE = 2**31 - 1
"""Order of a slot that no row may see: empty, or padding."""

PADDING_ORDER = INVISIBLE - 1
"""Order given to a padding row as a *query*: it sees every real row, so its output stays finite."""


ANY_CONTEXT = 0
"""Key of the one variant of a graph without a cache."""


ORT_LLM_SINCE = (1, 25)
"""First ONNX Runtime that runs opset 24 (Attention, TensorScatter), all lowerings' but
``portable``'s."""

TILES = "tiles"
"""Symbol of the tiles of an image, where the vision graph takes several."""

WINDOWS = "windows"
"""Symbol of the windows of an image that an encoder of patches attends in."""

SYMBOLS = {"visual": "N", "text": "T"}
"""Counts of the rows that a selection reads something of, by their kind (``ROW_READINGS``)."""

BY_LAYER = ("gates", "row_gain")
"""Inputs of a stage with an entry for each of some of its layers; parts take those of their own."""

NEAREST_WORDS = 3
"""Ids of the vocabulary that the vision graph names for each row, where a selector reads them."""

MANY_ROWS = 64
"""Graphs of the ``branched`` lowering take calls of more rows than this in the form for many."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    ``dtype`` is a NumPy name, ``shape`` mixes integers and the symbols of the module docstring.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one graph, in binding order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def has(self, symbol: str) -> bool:
        """Return whether a dimension of an input is left open under this symbol."""
        return any(symbol in tensor.shape for tensor in self.inputs)

    @property
    def follows_context(self) -> bool:
        """Return whether its sizes follow from how many rows there is room for.

        Where there is no batch, N counts the rows of one image.
        """
        return self.has("S") or (self.has("B") and self.has("N"))


def inject_name(layer: int) -> str:
    """Return the name of the rows that are added to visual rows at the input of a layer."""
    return f"inject.{layer}"


def injected_of(tensors: Mapping[str, Rows]) -> dict[int, Rows]:
    """Return those among named tensors that are added to visual rows, by layer."""
    start = inject_name(0)[:-1]
    return {
        int(name.removeprefix(start)): rows
        for name, rows in tensors.items()
        if name.startswith(start)
    }


def returns_new_rows(spec: GraphSpec) -> bool:
    """Return whether a stage's graph returns new cache rows to write, not whole caches."""
    caches = {appended(tensor.name) for tensor in spec.inputs}
    return any(out.name in caches and "Q" in out.shape[2:] for out in spec.outputs)


def stage_spec(
    text: TextConfig,
    plan: StagePlan,
    part: StagePart,
    dtype: str,
    rows_back: bool,
    fallback: Fp32Fallback = NO_FALLBACK,
    cache: CacheScheme = "float",
) -> GraphSpec:
    """Return the contract of (part of) a stage: Q rows in, updated rows out, caches appended to.

    ``queries`` are the last row's, rotated, of every layer that attends: what a selection or a
    probe of that layer reads, and with the cache all there is to say about the row's attention.
    Those of a layer ahead (``ahead_of``) are the last, its keys the last cache. What else the edge
    behind reads of the rows is handed out by the part that ends the stage.

    ``inject.L`` is added to the rows at the input of layer L, before its norm and before the
    residual is taken: features of visual rows, zeros for all others. In a call without visual rows
    it is all zeros, which executors keep.

    Caches are returned whole, aliased to their inputs; or with ``rows_back`` only the new key and
    value rows ([B,G,Q,d]), which the caller writes at ``write_index``: the portable lowering, and
    engines over an INT8 cache, which their compiler does not update in place. There keys of a layer
    ahead, which no row of this stage looks at, are no input.
    """
    cached = cache_dtype(dtype, cache)
    attending = part.attention_layers(plan)
    gated, gained = part.gated_layers(plan), part.gained_layers(plan)
    rows = fallback.rows_dtype(dtype)
    groups, width = text.kv_heads, text.head_dim
    caches = part_caches(plan, part)
    ahead = part.ends(plan) and ahead_of(plan, part.stage) is not None
    inputs = [
        TensorSpec("rows", rows, ("B", "Q", text.hidden)),
        _positions(text, "Q"),
        TensorSpec("order", "int32", ("B", "Q")),
        TensorSpec("slot_order", "int32", ("B", "S")),
        TensorSpec("write_index", "int64", ("B",)),
    ]
    if gated:
        inputs.append(TensorSpec("gates", dtype, (len(gated), 2, "B", "S")))
    if gained:
        inputs.append(TensorSpec("row_gain", dtype, (len(gained), 2, "B", "Q")))
    inputs += [_injected(text, layer, "Q", rows) for layer in part.injected_layers(text)]
    read = caches[:-1] if ahead and rows_back else caches
    inputs += [TensorSpec(name, cached, ("B", groups, "S", width)) for name in read]

    outputs = [
        TensorSpec("rows.out", rows, ("B", "Q", text.hidden)),
        TensorSpec("queries", dtype, (len(attending) + ahead, "B", text.heads, width)),
    ]
    if part.ends(plan) and part.stage == len(plan.stages) - 1:
        outputs.append(TensorSpec("logits", "float32", ("B", text.vocab)))
    if part.ends(plan):
        outputs += [_reading(text, name, "Q", dtype) for name in row_readings(plan, part.stage)]
    slots = "Q" if rows_back else "S"
    outputs += [TensorSpec(appended(name), cached, ("B", groups, slots, width)) for name in caches]
    return GraphSpec(tuple(inputs), tuple(outputs))


def serve_spec(
    text: TextConfig,
    plan: StagePlan,
    part: StagePart,
    dtype: str,
    fallback: Fp32Fallback = NO_FALLBACK,
    cache: CacheScheme = "float",
) -> GraphSpec:
    """Return the contract of (part of) a stage that visual rows serve: Q rows in, out the new rows
    of every cache, which the caller writes to their slots, in every lowering.

    The rows come out again only where features are added to them.
    """
    rows = fallback.rows_dtype(dtype)
    row = TensorSpec("rows", rows, ("B", "Q", text.hidden))
    inject = [_injected(text, layer, "Q", rows) for layer in part.injected_layers(text)]
    shape = ("B", text.kv_heads, "Q", text.head_dim)
    new = [
        TensorSpec(appended(name), cache_dtype(dtype, cache), shape)
        for name in part_caches(plan, part)
    ]
    out = [TensorSpec("rows.out", rows, row.shape)] if inject else []
    return GraphSpec((row, _positions(text, "Q"), *inject), (*out, *new))


def row_readings(plan: StagePlan, stage: int) -> tuple[str, ...]:
    """Return what ``stage`` hands out of its rows for the edge behind it (``ROW_READINGS``)."""
    return plan.edges[stage].selector.row_readings if probed(plan, stage) else ()


def _positions(text: TextConfig, rows: int | str, ending: str = "") -> TensorSpec:
    """Return the tensor of the positions of ``rows`` rows: of each one, or one on each axis."""
    axes = (text.rope.axes,) if text.rope.axes > 1 else ()
    return TensorSpec(f"positions{ending}", "int32", ("B", rows, *axes))


def _injected(text: TextConfig, layer: int, rows: int | str, dtype: str) -> TensorSpec:
    """Return the tensor of what is added to ``rows`` rows at the input of a layer."""
    return TensorSpec(inject_name(layer), dtype, ("B", rows, text.hidden))


def _reading(text: TextConfig, name: str, rows: str, dtype: str) -> TensorSpec:
    """Return the tensor of one of ``ROW_READINGS``, ``rows`` counting the rows that it is of."""
    if name == "change":
        return TensorSpec(name, "float32", ("B", rows))
    return TensorSpec(name, dtype, ("B", rows, text.heads, text.head_dim))


def scale_specs(text: TextConfig, dtype: str, cache: CacheScheme) -> list[TensorSpec]:
    """Return the last inputs of a graph that reads any layer's cache: the scales of INT8."""
    names = ("key_scale", "value_scale") if cache == "int8" else ()
    return [TensorSpec(name, dtype, (text.kv_heads,)) for name in names]


def select_spec(
    text: TextConfig,
    edge: Edge,
    dtype: str,
    fallback: Fp32Fallback = NO_FALLBACK,
    cache: CacheScheme = "float",
) -> GraphSpec:
    """Return the contract of a selection: N visual rows get a score, the best K leave.

    ``probe_query`` is the last of the ``queries`` of the stage before, ``order`` and
    ``query_order`` say which rows are padding (order ``INVISIBLE``), which is chosen last.

    ``visual_slots`` says which slot of the last layer's cache each offered row has. Of what a score
    does not read there is no input: engine compilers want none that is unused.
    """
    rows = fallback.rows_dtype(dtype)
    assert edge.keep is not None
    cached = cache_dtype(dtype, cache)
    cache_shape = ("B", text.kv_heads, "S", text.head_dim)
    known = (
        TensorSpec("probe_query", dtype, ("B", text.heads, text.head_dim)),
        *(_reading(text, name, SYMBOLS[of], dtype) for name, of in ROW_READINGS.items()),
        TensorSpec("text_order", "int32", ("B", "T")),
        *(TensorSpec(name, cached, cache_shape) for name in CACHE_READINGS),
        TensorSpec("slot_order", "int32", ("B", "S")),
        TensorSpec("query_order", "int32", ("B",)),
        TensorSpec("visual_slots", "int64", ("B", "N")),
        TensorSpec("rows", rows, ("B", "N", text.hidden)),
        _positions(text, "N"),
        TensorSpec("order", "int32", ("B", "N")),
        *scale_specs(text, dtype, cache),
    )
    reads = edge.selector.inputs
    return GraphSpec(
        inputs=tuple(tensor for tensor in known if tensor.name in reads),
        outputs=(
            TensorSpec("rows.out", rows, ("B", edge.keep, text.hidden)),
            _positions(text, edge.keep, ".out"),
            TensorSpec("order.out", "int32", ("B", edge.keep)),
            TensorSpec("scores", "float32", ("B", "N")),
        ),
    )


def probe_spec(text: TextConfig, dtype: str, cache: CacheScheme = "float") -> GraphSpec:
    """Return the contract of a probe: the last row's attention to N visual tokens in one layer.

    ``query`` is that layer's of ``queries``, key and value its cache.
    """
    groups, width, cached = text.kv_heads, text.head_dim, cache_dtype(dtype, cache)
    return GraphSpec(
        inputs=(
            TensorSpec("query", dtype, ("B", text.heads, width)),
            TensorSpec("key", cached, ("B", groups, "S", width)),
            TensorSpec("value", cached, ("B", groups, "S", width)),
            TensorSpec("slot_order", "int32", ("B", "S")),
            TensorSpec("query_order", "int32", ("B",)),
            TensorSpec("visual_slots", "int64", ("B", "N")),
            *scale_specs(text, dtype, cache),
        ),
        outputs=(
            TensorSpec("cosine", "float32", ("B", "N")),
            TensorSpec("norm", "float32", ("B", "N")),
        ),
    )


def graph_specs(
    config: ModelConfig,
    plan: StagePlan,
    dtype: str,
    parts: Sequence[StagePart],
    rows_back: bool,
    fallback: Fp32Fallback = NO_FALLBACK,
    cache: CacheScheme = "float",
) -> dict[str, GraphSpec]:
    """Return the contract of every graph of a bundle, in the order in which a prompt meets them."""
    text = config.text
    check_injected(text.inject, plan)
    _check_axes(text, plan)
    specs = {VISION: vision_spec(config, plan, dtype, fallback)}
    if projects_later(plan):
        specs[PROJECT] = project_spec(config, plan, dtype, fallback)
    for name, part in zip(part_names(parts), parts, strict=True):
        if part.serves(plan):
            specs[serving_name(name)] = serve_spec(text, plan, part, dtype, fallback, cache)
        specs[name] = stage_spec(text, plan, part, dtype, rows_back, fallback, cache)
        if part.ends(plan) and probed(plan, part.stage):
            edge = plan.edges[part.stage]
            specs[f"select{part.stage}"] = select_spec(text, edge, dtype, fallback, cache)
    if plan.probe is not None:
        specs[PROBE] = probe_spec(text, dtype, cache)
    return specs


def _check_axes(text: TextConfig, plan: StagePlan) -> None:
    """Refuse a plan that moves rows which have a place on several axes."""
    moved = plan.positions != "original" or plan.span != plan.visual_tokens
    if moved and text.rope.axes > 1:
        raise PlanError(
            f"plan '{plan.name}' gives rows other positions, and those of this model stand at a "
            "time, a height and a width. Use positions=original, or another entry"
        )


def projects_later(plan: StagePlan) -> bool:
    """Return whether only chosen rows are projected: no selector has to see them projected."""
    if plan.entry is None:
        return False
    return not {*ENTRY_SELECTORS[plan.entry.selector].reads} & {*PROJECTED}


def vision_readings(plan: StagePlan) -> tuple[str, ...]:
    """Return what the vision graph hands out: names of ``EncoderReadings``, in their order.

    Without an entry that is the visual rows alone.
    """
    if plan.entry is None:
        return ("rows",)
    reads = {*ENTRY_SELECTORS[plan.entry.selector].reads}
    reads.add("features" if projects_later(plan) else "rows")
    return tuple(name for name in READINGS if name in reads)


def vision_spec(
    config: ModelConfig, plan: StagePlan, dtype: str, fallback: Fp32Fallback = NO_FALLBACK
) -> GraphSpec:
    """Return the contract of the encoder: pixels in, out what the plan's entry reads.

    Without an entry the projector is in it, and one row per visual token comes out. What is added
    to the rows within the decoder comes out with it, for all visual tokens.

    Raises:
        PlanError: an entry whose selector the encoder has nothing for.
    """
    if config.arranged and plan.entry is not None:
        raise PlanError(
            f"entry {plan.entry.text}: rows of a model of type {config.family} are arranged "
            "behind its projector, where no selector chooses. Leave the entry out"
        )
    vision, tokens = config.vision, "N" if config.varies else config.visual_tokens
    width = config.feature_width
    batch = 1 if config.varies else "B"
    outputs = {
        "similarity": TensorSpec("similarity", "float32", (batch, tokens, tokens)),
        "row_similarity": TensorSpec("row_similarity", "float32", (batch, tokens, tokens)),
        "vocabulary": TensorSpec("vocabulary", "int64", (batch, tokens, NEAREST_WORDS)),
        "rows": TensorSpec(
            "visual_rows", fallback.rows_dtype(dtype), (batch, tokens, config.text.hidden)
        ),
        "features": TensorSpec("features", dtype, (batch, tokens, width)),
        "class_row": TensorSpec("class_row", dtype, (batch, width)),
        "saliency": TensorSpec("saliency", "float32", (batch, tokens)),
        "keys": TensorSpec("keys", "float32", (batch, tokens, vision.hidden // vision.heads)),
    }
    names = vision_readings(plan)
    if not config.has_class_row:
        names = tuple(name for name in names if name != "class_row")
    unread = [name for name in names if vision.kind == PATCHES and name not in PROJECTED]
    if unread and plan.entry is not None:
        known = ENTRY_SELECTORS.items()
        rows = " or ".join(name for name, own in known if {*own.reads} & {*PROJECTED})
        raise PlanError(
            f"entry {plan.entry.text} reads {unread[0]}, which an encoder of patches does not hand "
            f"out for its rows. Take {rows}, or select within the decoder"
        )
    count = TILES if config.varies else "B"
    return GraphSpec(
        inputs=(
            TensorSpec("pixels", "float32", pixel_shape(config, count)),
            *(_patch_inputs(vision, count) if vision.kind == PATCHES else ()),
            *(_packing(config) if config.packs else ()),
        ),
        outputs=(
            *(outputs[name] for name in names),
            *(
                replace(own, shape=(batch, *own.shape[1:]))
                for layer in config.text.inject
                for own in [_injected(config.text, layer, tokens, fallback.rows_dtype(dtype))]
            ),
        ),
    )


def pixel_shape(config: ModelConfig, tiles: int | str) -> tuple[int | str, ...]:
    """Return the shape of the pixels of so many tiles; where patches are tiles, each is flat."""
    vision = config.vision
    if vision.kind == PATCHES:
        return tiles, vision.channels * vision.patch_size**2
    return tiles, vision.channels, vision.image_size, vision.image_size


def _patch_inputs(vision: VisionConfig, count: int | str) -> tuple[TensorSpec, ...]:
    """Return what an encoder of patches takes besides, in the order of its layouts' feeds."""
    learned = (
        TensorSpec("taps", "int32", (count, 4)),
        TensorSpec("weights", "float32", (count, 4)),
    )
    windows = (
        TensorSpec("slots", "int32", (WINDOWS, vision.window_patches)),
        TensorSpec("places", "int32", (count,)),
    )
    return (
        TensorSpec("turns", "int32", (count, 2)),
        *(learned if vision.learned else ()),
        *(windows if vision.window else ()),
    )


def _packing(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return what says which rows of tiles make each row of an image."""
    if config.shrinks:
        return TensorSpec("pack", "int64", ("N", 4)), TensorSpec("weights", "float32", ("N", 4))
    return (TensorSpec("pack", "int64", ("N",)),)


def project_spec(
    config: ModelConfig, plan: StagePlan, dtype: str, fallback: Fp32Fallback = NO_FALLBACK
) -> GraphSpec:
    """Return the contract of the projector alone: features of chosen rows in, visual rows out."""
    count: tuple[int | str, int | str] = (1, "N") if config.varies else ("B", plan.entering)
    rows = TensorSpec("visual_rows", fallback.rows_dtype(dtype), (*count, config.text.hidden))
    features = TensorSpec("features", dtype, (*count, config.feature_width))
    return GraphSpec((features,), (rows,))
