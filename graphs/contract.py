"""Names, types and shapes of every graph's inputs and outputs, said once.

Export, buffers and engine profiles are derived from these specs; nothing else spells a tensor
name. Dimensions are integers or symbols:

    B  batch              Q  rows in this call        S  slots of the stage's cache
    N  visual rows offered to a selection             T  rows of the question, where it reads them

The rest are facts of the model.

Source: docs/design.md, "Append rows".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from .caches import ahead_of, appended, cache_dtype, part_caches
from .parts import StagePart, probed
from .plan.plan import StagePlan
from .plan.stages import Edge
from .precision import NO_FALLBACK, Fp32Fallback
from .quantization import CacheScheme
from .selectors.edge import CACHE_READINGS, ROW_READINGS
from .text_config import TextConfig

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

SYMBOLS = {"visual": "N", "text": "T"}
"""Counts of the rows that a selection reads something of, by their kind (``ROW_READINGS``)."""

BY_LAYER = ("gates", "row_gain")
"""Inputs of a stage with an entry for each of some of its layers; parts take those of their own."""

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
    inputs += [injected_spec(text, layer, "Q", rows) for layer in part.injected_layers(text)]
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
    inject = [injected_spec(text, layer, "Q", rows) for layer in part.injected_layers(text)]
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


def injected_spec(text: TextConfig, layer: int, rows: int | str, dtype: str) -> TensorSpec:
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
