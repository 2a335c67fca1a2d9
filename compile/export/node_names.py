"""Names that say which layer a node belongs to, so that profiles of a graph can be read.

A traced layer names its nodes alike in every layer (``node_mul_106``, ``node_mul_106_2``, ...).
ONNX Runtime, TensorRT and Polygraphy report times by node name; with the layer in front of it they
add up by layer: ``layers.3/node_mul_106_4``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir

LAYER_WEIGHT = re.compile(r"(?:^|\.)(layers\.\d+)\.")


def prefix_node_names(model: onnx_ir.Model) -> int:
    """Prefix node names with ``layers.N/``; returns how many nodes got one.

    The nodes of a layer stand together. A layer begins where a weight of its own is first read and
    ends where one of another layer, or of none, is.
    """
    current, labelled = None, 0
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and "." in (value.name or ""):
                found = LAYER_WEIGHT.search(value.name or "")
                current = found and found[1]
                break
        if current is not None:
            for one in (node, *_inside(node)):
                one.name = f"{current}/{one.name}"
                labelled += 1
    return labelled


def _inside(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    """Nodes of the branches of an ``If``."""
    for attribute in node.attributes.values():
        if attribute.type is onnx_ir.AttributeType.GRAPH:
            yield from attribute.as_graph()
