"""Attention that asks how many rows are new, for ONNX Runtime on a CPU.

Written in place of ``onnx_ops.CONDITIONAL_ATTENTION``, once a graph is flat, as an ``If`` of two
forms of the same sum, and of ``onnx_ops.APPENDED_ATTENTION`` as one of three:

    many rows   Values under their gates, then fused attention. Where rows come in order, in
                ``PIECES`` pieces, each over the slots that its last row may see: most of what a
                causal mask hides is not computed, nor are slots that hold nothing yet.
    a few       Fused attention, which copies no part of a cache. Under gates instead scores,
                softmax, and gates on the weights of slots: values are read once, where gates on
                values read and write them three times over, for each token of an answer.
    one         ONNX Runtime's own ``GroupQueryAttention``, where the row of each lane sees all
                slots before it, as those of an answer do: it appends the row, and reads no slot
                behind it. Others pay for every slot, of which there are up to 127 too many.

Measurements: docs/cpu.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx_ir

from ...graphs.contract import MANY_ROWS
from ...graphs.modules.onnx_ops import APPENDED_ATTENTION, CONDITIONAL_ATTENTION
from ...graphs.modules.ops import SOFTMAX_FLOOR

PIECES = 4

DOMAIN, _, OPERATOR = CONDITIONAL_ATTENTION.partition("::")
APPENDING = APPENDED_ATTENTION.partition("::")[2]

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def write_conditional_attention(model: onnx_ir.Model) -> None:
    """Write out every ``onnx_ops.CONDITIONAL_ATTENTION`` and ``APPENDED_ATTENTION`` of a flat
    graph, in place.
    """
    calls = [node for node in model.graph if node.domain == DOMAIN]
    if not calls:
        return
    first = calls[0]
    appending = [call for call in calls if call.op_type == APPENDING]
    visible, write_index = _placed(first)
    nodes = Nodes(model.graph, "attention")
    rows = nodes.add("Shape", [visible], start=2, end=3)
    many = nodes.add("Greater", [rows, nodes.constant("many", [MANY_ROWS])])
    cuts, step = None, None
    if first.attributes["in_order"].as_int():
        cuts = _cuts(nodes, rows, write_index)
    if appending:
        step = _step(nodes, rows, visible, write_index)
        model.graph.opset_imports[CONTRIB] = 1
    model.graph.insert_before(first, nodes.made)
    for index, call in enumerate(calls):
        assert _placed(call)[1] is write_index, "one call of a graph writes in one place"
        shared = AttentionCall(AttentionSizes.of(call), many, cuts)
        if call.op_type == APPENDING:
            assert step is not None
            forms = {
                "then_branch": partial(_one, call=shared, step=step),
                "else_branch": partial(_appended, call=shared),
            }
            _write_out(model.graph, call, f"attention{index}", step.here, forms)
        else:
            _write_out(model.graph, call, f"attention{index}", many, _by_rows(shared))


def _placed(call: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Return ``visible`` and ``write_index`` of a call."""
    first = 5 if call.op_type == APPENDING else 3
    visible, write_index = call.inputs[first : first + 2]
    assert visible is not None
    assert write_index is not None
    return visible, write_index


class Nodes:
    """Nodes in the making, with names of their own; constants go to ``graph``'s initializers."""

    def __init__(self, graph: onnx_ir.Graph, name: str):
        self.graph, self.name = graph, name
        self.made: list[onnx_ir.Node] = []

    def add(self, operator: str, inputs: Sequence[Any], **attributes: Any) -> onnx_ir.Value:
        """Add a node with one output."""
        return self.split(operator, inputs, 1, **attributes)[0]

    def split(
        self, operator: str, inputs: Sequence[Any], outputs: int, **attributes: Any
    ) -> Sequence[onnx_ir.Value]:
        """Add a node with several outputs."""
        domain = attributes.pop("domain", "")
        node = onnx_ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs)
        node.name = f"{self.name}_{len(self.made)}"
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}_{place}"
        self.made.append(node)
        return node.outputs

    def constant(self, name: str, numbers: Any) -> onnx_ir.Value:
        """Return a constant, INT64 or FP32; one name is one value for all of the graph."""
        name = f"attention_{name}"
        if name not in self.graph.initializers:
            array = np.asarray(numbers)
            kind = np.int64 if array.dtype.kind == "i" else np.float32
            tensor = onnx_ir.tensor(array.astype(kind), name=name)
            value = onnx_ir.Value(
                name=name,
                shape=onnx_ir.Shape(array.shape),
                type=onnx_ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


class AttentionSizes(NamedTuple):
    """H query heads, G heads of keys and values, d channels of each."""

    heads: int
    groups: int
    width: int

    @classmethod
    def of(cls, call: onnx_ir.Node) -> AttentionSizes:
        """Return those of a call."""
        return cls(*(call.attributes[size].as_int() for size in cls._fields))


Cuts = tuple[list[onnx_ir.Value], list[onnx_ir.Value]]
"""(1,) each: rows where the pieces begin and the last one ends, and how many slots each sees."""


class AttentionCall(NamedTuple):
    """The facts that the forms of a call share; ``many`` (1,): whether many rows are new."""

    sizes: AttentionSizes
    many: onnx_ir.Value
    cuts: Cuts | None


class Step(NamedTuple):
    """A call of one row: whether it is one that sees all before it (1,), the slots before that row
    in each lane (B,), and how many the longest lane has with it, INT32.
    """

    here: onnx_ir.Value
    before: onnx_ir.Value
    longest: onnx_ir.Value


Form = Callable[["Nodes", Sequence[Any]], Sequence[onnx_ir.Value]]
"""A writer of one form of a call, which returns the call's outputs for its inputs."""


def _step(
    nodes: Nodes, rows: onnx_ir.Value, visible: onnx_ir.Value, write_index: onnx_ir.Value
) -> Step:
    """Ask whether one row is new in each lane, and sees all up to itself.

    Slots behind it are free, and nothing sees them: so counting what all lanes see is enough.
    """
    last = nodes.add("Gather", [visible, nodes.constant("last", -1)], axis=2)
    counts = nodes.add("Cast", [last], to=onnx_ir.DataType.INT64)
    seen = nodes.add("ReduceSum", [nodes.add("Flatten", [counts], axis=0)], keepdims=1)
    ends = nodes.add("Add", [write_index, rows])
    all_ends = nodes.add("ReduceSum", [ends], keepdims=1)
    single = nodes.add("Equal", [rows, nodes.constant("single", [1])])
    whole = nodes.add(
        "Reshape", [nodes.add("Equal", [seen, all_ends]), nodes.constant("flat", [1])]
    )
    longest = nodes.add("ReduceMax", [ends], keepdims=0)
    return Step(
        nodes.add("And", [single, whole]),
        nodes.add("Cast", [write_index], to=onnx_ir.DataType.INT32),
        nodes.add("Cast", [longest], to=onnx_ir.DataType.INT32),
    )


def _cuts(nodes: Nodes, rows: onnx_ir.Value, write_index: onnx_ir.Value) -> Cuts:
    """Cut rows into pieces of as equal a size as ``rows`` (1,) allows."""
    shares = nodes.add("Mul", [rows, nodes.constant("shares", list(range(1, PIECES + 1)))])
    stops = nodes.add("Div", [shares, nodes.constant("pieces", [PIECES])])
    start = nodes.add("Gather", [write_index, nodes.constant("first", [0])], axis=0)
    seen = nodes.add("Add", [stops, start])
    begin = nodes.constant("first", [0])
    ends = nodes.split("Split", [stops], PIECES, axis=0, num_outputs=PIECES)
    slots = nodes.split("Split", [seen], PIECES, axis=0, num_outputs=PIECES)
    return [begin, *ends], list(slots)


def _write_out(
    graph: onnx_ir.Graph,
    call: onnx_ir.Node,
    name: str,
    condition: onnx_ir.Value,
    forms: Mapping[str, Form],
) -> None:
    """Put an ``If`` in the place of one call."""
    nodes = Nodes(graph, name)
    replaced = _choice(nodes, condition, forms, call.inputs, call.outputs)
    (node,) = nodes.made
    node.name = name
    for value, out in zip(replaced, call.outputs, strict=True):
        value.name = out.name
    onnx_ir.convenience.replace_nodes_and_values(
        graph, call, [call], [node], call.outputs, replaced
    )


def _choice(
    nodes: Nodes,
    condition: onnx_ir.Value,
    forms: Mapping[str, Form],
    inputs: Sequence[Any],
    like: Sequence[onnx_ir.Value],
) -> Sequence[onnx_ir.Value]:
    """Write an ``If``, whose outputs are ``like`` others in type and shape."""
    branches = {}
    for branch, form in forms.items():
        own = Nodes(nodes.graph, f"{nodes.name}_{branch[:4]}")
        made = form(own, inputs)
        for value, out in zip(made, like, strict=True):
            value.shape, value.type = out.shape, out.type
        branches[branch] = onnx_ir.Graph([], made, nodes=own.made, name=own.name)
    chosen = nodes.split("If", [condition], len(like), **branches)
    for value, out in zip(chosen, like, strict=True):
        value.shape, value.type = out.shape, out.type
    return chosen


def _by_rows(call: AttentionCall) -> dict[str, Form]:
    """Return the forms for many rows and for a few, over whole caches."""

    def many(nodes: Nodes, inputs: Sequence[Any]) -> Sequence[onnx_ir.Value]:
        return [_many(nodes, inputs, call.sizes, call.cuts)]

    def few(nodes: Nodes, inputs: Sequence[Any]) -> Sequence[onnx_ir.Value]:
        return [_few(nodes, inputs, call.sizes)]

    return {"then_branch": many, "else_branch": few}


def _one(
    nodes: Nodes, inputs: Sequence[Any], call: AttentionCall, step: Step
) -> Sequence[onnx_ir.Value]:
    """Write the form for one row of each lane: (B, heads, 1, d) is (B, 1, heads * d), too."""
    heads, groups, width = call.sizes
    *rows, key_cache, value_cache, _, _ = inputs
    side_by_side = nodes.constant("side_by_side", [0, 1, -1])
    flat = [nodes.add("Reshape", [own, side_by_side]) for own in rows]
    out, keys, values = nodes.split(
        "GroupQueryAttention",
        [*flat, key_cache, value_cache, step.before, step.longest],
        3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=groups,
    )
    of_heads = nodes.constant("of_heads", [0, heads, 1, width])
    return [nodes.add("Reshape", [out, of_heads]), keys, values]


def _appended(nodes: Nodes, inputs: Sequence[Any], call: AttentionCall) -> Sequence[onnx_ir.Value]:
    """Write the other forms, over caches to which the new rows are appended."""
    q, k, v, key_cache, value_cache, visible, write_index = inputs
    keys, values = (
        nodes.add("TensorScatter", [cache, rows, write_index], axis=-2)
        for cache, rows in ((key_cache, k), (value_cache, v))
    )
    if call.cuts is None:
        return [nodes.add("Attention", [q, keys, values, visible]), keys, values]
    over = [q, keys, values, visible, write_index]
    return [*_choice(nodes, call.many, _by_rows(call), over, [q]), keys, values]


def _many(
    nodes: Nodes, inputs: Sequence[Any], sizes: AttentionSizes, cuts: Cuts | None
) -> onnx_ir.Value:
    """Write attention with gates on values; in pieces where ``cuts`` say so."""
    q, k, v, visible, _, *gates = inputs
    if gates:
        v = _gated_values(nodes, v, sizes, *gates)
    if cuts is None:
        return nodes.add("Attention", [q, k, v, visible])
    begin, along_rows, along_slots = (
        nodes.constant("first", [0]),
        nodes.constant("rows", [2]),
        nodes.constant("slots", [3]),
    )
    bounds, slots = cuts
    pieces = []
    for start, stop, seen in zip(bounds[:-1], bounds[1:], slots, strict=True):
        mask = nodes.add("Slice", [visible, start, stop, along_rows])
        operands = [
            nodes.add("Slice", [q, start, stop, along_rows]),
            nodes.add("Slice", [k, begin, seen, along_rows]),
            nodes.add("Slice", [v, begin, seen, along_rows]),
            nodes.add("Slice", [mask, begin, seen, along_slots]),
        ]
        pieces.append(nodes.add("Attention", operands))
    return nodes.add("Concat", pieces, axis=2)


def _gated_values(
    nodes: Nodes,
    v: onnx_ir.Value,
    sizes: AttentionSizes,
    value: onnx_ir.Value,
    sink: onnx_ir.Value | None = None,
) -> onnx_ir.Value:
    """Write ``ops.Gate.values``."""
    column = nodes.constant("column", [1, 3])
    gated = nodes.add("Mul", [v, nodes.add("Unsqueeze", [value, column])])
    if sink is None:
        return gated
    open_ = nodes.add("Unsqueeze", [sink, column])
    shared = nodes.add("Mul", [open_, _first(nodes, v, sink, sizes)])
    return nodes.add("Add", [gated, shared])


def _few(nodes: Nodes, inputs: Sequence[Any], sizes: AttentionSizes) -> onnx_ir.Value:
    """Write attention with gates on the weights of slots."""
    q, k, v, visible, _, *gates = inputs
    if not gates:
        return nodes.add("Attention", [q, k, v, visible])
    value, *sinks = gates
    heads, groups, width = sizes
    row = nodes.constant("row", [1, 2])
    q = nodes.add("Mul", [q, nodes.constant("scale", width**-0.5)])
    if heads != groups:  # queries of one group share its keys
        q = nodes.add("Reshape", [q, nodes.constant("grouped", [0, groups, -1, width])])
    scores = nodes.add("MatMul", [q, nodes.add("Transpose", [k], perm=[0, 1, 3, 2])])
    if heads != groups:
        visible = nodes.add(
            "Tile", [visible, nodes.constant("repeats", [1, 1, heads // groups, 1])]
        )
    scores = nodes.add("Where", [visible, scores, nodes.constant("floor", SOFTMAX_FLOOR)])
    weights = nodes.add("Softmax", [scores], axis=-1)
    open_ = nodes.add("Mul", [weights, nodes.add("Unsqueeze", [value, row])])
    out = nodes.add("MatMul", [open_, v])
    for sink in sinks:
        column = nodes.add("Unsqueeze", [sink, nodes.constant("column", [1, 3])])
        sunk = nodes.add("MatMul", [weights, column])
        out = nodes.add("Add", [out, nodes.add("Mul", [sunk, _first(nodes, v, sink, sizes)])])
    if heads != groups:
        out = nodes.add("Reshape", [out, nodes.constant("heads", [0, heads, -1, width])])
    return out


def _first(
    nodes: Nodes, v: onnx_ir.Value, sink: onnx_ir.Value, sizes: AttentionSizes
) -> onnx_ir.Value:
    """Write ``ops.Gate.first_visual``: (B, G, 1, d) of v (B, G, S, d)."""
    _, groups, width = sizes
    index = nodes.add("ArgMax", [sink], axis=1, keepdims=1)
    index = nodes.add("Unsqueeze", [index, nodes.constant("row", [1, 2])])
    batch = nodes.add("Shape", [v], start=0, end=1)
    shape = nodes.add("Concat", [batch, nodes.constant("one", [groups, 1, width])], axis=0)
    return nodes.add("GatherElements", [v, nodes.add("Expand", [index, shape])], axis=2)
