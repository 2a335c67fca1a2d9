"""Attention that asks how many rows are new, for ONNX Runtime on a CPU.

Written in place of ``onnx_ops.CONDITIONAL_ATTENTION``, once a graph is flat, as an ``If`` of two
forms of the same sum:

    many rows   Values under their gates, then fused attention. Where rows come in order, in
                ``PIECES`` pieces, each over the slots that its last row may see: most of what a
                causal mask hides is not computed, nor are slots that hold nothing yet.
    a few       Fused attention, which copies no part of a cache. Under gates instead scores,
                softmax, and gates on the weights of slots: values are read once, where gates on
                values read and write them three times over, for each token of an answer.

Measurements: docs/cpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx_ir

from ...graphs.contract import MANY_ROWS
from ...graphs.modules.onnx_ops import CONDITIONAL_ATTENTION
from ...graphs.modules.ops import SOFTMAX_FLOOR

PIECES = 4

DOMAIN, _, OPERATOR = CONDITIONAL_ATTENTION.partition("::")


def write_conditional_attention(model: onnx_ir.Model) -> None:
    """Write out every ``onnx_ops.CONDITIONAL_ATTENTION`` of a flat graph, in place."""
    calls = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    if not calls:
        return
    first = calls[0]
    visible, write_index = first.inputs[3:5]
    assert write_index is not None
    nodes = Nodes(model.graph, "attention")
    rows = nodes.add("Shape", [visible], start=2, end=3)
    many = nodes.add("Greater", [rows, nodes.constant("many", [MANY_ROWS])])
    cuts = None
    if first.attributes["in_order"].as_int():
        cuts = _cuts(nodes, rows, write_index)
    model.graph.insert_before(first, nodes.made)
    for index, call in enumerate(calls):
        assert call.inputs[4] is write_index, "one call of a graph writes in one place"
        _write_out(model.graph, call, f"attention{index}", many, cuts)


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
        node = onnx_ir.node(operator, inputs, attributes, num_outputs=outputs)
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


Cuts = tuple[list[onnx_ir.Value], list[onnx_ir.Value]]
"""(1,) each: rows where the pieces begin and the last one ends, and how many slots each sees."""


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
    graph: onnx_ir.Graph, call: onnx_ir.Node, name: str, many: onnx_ir.Value, cuts: Cuts | None
) -> None:
    """Put an ``If`` in the place of one call."""
    out = call.outputs[0]
    branches = {}
    sizes = AttentionSizes(*(call.attributes[size].as_int() for size in AttentionSizes._fields))
    for branch, form in (("then_branch", partial(_many, cuts=cuts)), ("else_branch", _few)):
        nodes = Nodes(graph, f"{name}_{branch[:4]}")
        made = form(nodes, call.inputs, sizes)
        made.shape, made.type = out.shape, out.type
        branches[branch] = onnx_ir.Graph([], [made], nodes=nodes.made, name=nodes.name)
    node = onnx_ir.node("If", [many], branches, name=name)
    replaced = node.outputs[0]
    replaced.name, replaced.shape, replaced.type = out.name, out.shape, out.type
    onnx_ir.convenience.replace_nodes_and_values(graph, call, [call], [node], [out], [replaced])


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
