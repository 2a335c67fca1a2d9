"""Export of a stage module to an ONNX file whose weights stay where they are.

Initializers point at byte ranges of the bundle's weight files. Names, types and axes come from the
stage's contract. Two exports of the same plan and model give the same bytes wherever they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...graphs.bundle_contract import graph_specs
from ...graphs.config import ModelConfig
from ...graphs.contract import GraphSpec
from ...graphs.linears import linear_groups
from ...graphs.modules.decoder import DecoderStage
from ...graphs.modules.encoders import make_vision
from ...graphs.modules.onnx_ops import Llm, LlmConditional, LlmRows
from ...graphs.modules.portable_ops import Portable
from ...graphs.modules.quantized import is_cache_scale, replace_linears, round_caches
from ...graphs.modules.rope import frequencies
from ...graphs.modules.select import Prober, Selector
from ...graphs.modules.serving import ServingStage
from ...graphs.modules.vision import Encoder, Projection
from ...graphs.parts import (
    PROBE,
    PROJECT,
    VISION,
    StagePart,
    part_names,
    serving_name,
    step_name,
    whole_stages,
)
from ...graphs.plan.plan import StagePlan
from ...graphs.precision import NO_FALLBACK, Fp32Fallback
from ...graphs.quantization import FLOAT, Quantization, Scheme
from ...graphs.targets import LLM, LLM_CONDITIONAL, PORTABLE, Target, check_operators
from ...graphs.text_config import TextConfig
from ...graphs.vision_contract import projects_later, vision_readings
from .stitch import Stitcher

FREQUENCIES = "head.inverse_frequencies"
"""The one buffer of a stage: small, computed, stored inside the graph."""

LAYER_WEIGHT = re.compile(r"(?:^|\.)(layers\.\d+)\.")

Pieces = Encoder | Projection | DecoderStage | ServingStage | Selector | Prober
"""Modules that a graph is made from."""


@dataclass(frozen=True)
class WeightSpan:
    """Place of the bytes of one weight: a file beside the graph, an offset, a length."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Graph:
    """One graph to export: its module (of fake tensors), its contract, its ONNX opset."""

    name: str
    module: Pieces
    spec: GraphSpec
    opset: int

    @property
    def weights(self) -> list[str]:
        """Checkpoint names of the parameters it reads; scales of caches are not a checkpoint's."""
        return [name for name, _ in self.module.named_parameters() if not is_cache_scale(name)]


def graphs_of(
    config: ModelConfig,
    plan: StagePlan,
    dtype: str,
    lowering: str,
    parts: Sequence[StagePart] | None = None,
    fallback: Fp32Fallback = NO_FALLBACK,
    quantization: Quantization = FLOAT,
    engines: bool = False,
) -> list[Graph]:
    """Return every graph of a bundle, in the order in which a prompt meets them.

    Args:
        config: the model's.
        plan: its stages and edges.
        dtype: ``float32`` or ``float16``.
        lowering: one of ``targets.LOWERINGS``.
        parts: cuts of stages into several graphs; by default each is one.
        fallback: what of an FP16 decoder must be wider.
        quantization: which linear layers and caches are integers.
        engines: layers of one input round it once (``quantized.replace_linears``), and INT8 caches
            are returned row by row (``onnx_ops.LlmRows``).
    """
    parts = parts or whole_stages(plan)
    cache = quantization.cache
    ops: Llm | Portable = Portable() if lowering == PORTABLE else Llm()
    if engines and quantization.quantises_cache and lowering == LLM:
        ops = LlmRows()
    groups = linear_groups(config)
    steps = bool(quantization.decode)
    specs = graph_specs(
        config, plan, dtype, parts, ops.returns_new_rows, fallback, cache, steps=steps
    )
    out = []

    def add(
        name: str, module: Pieces, schemes: Mapping[str, Scheme] = quantization.schemes
    ) -> None:
        replace_linears(module, schemes, groups, engines=engines)
        round_caches(module, cache)
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))
        out.append(Graph(name, module, specs[name], ops.opset))

    with FakeTensorMode():
        add(VISION, make_vision(config, ops, fallback, vision_readings(config, plan)))
        if projects_later(config, plan):
            add(PROJECT, Projection(config, ops, fallback))
        for name, part in zip(part_names(parts), parts, strict=True):
            index = part.stage
            # Rows that were gathered are not the last ones of their cache.
            whole = not (plan.routing is not None and plan.routing.gathers)
            if part.serves(plan):
                add(serving_name(name), ServingStage(config.text, plan, part, ops))
            own: Llm | Portable = ops
            if lowering == LLM_CONDITIONAL:
                own = LlmConditional(in_order=index == 0 and whole, whole=whole)
            add(name, DecoderStage(config.text, plan, part, own, fallback))
            if steps:
                one = LlmConditional(in_order=False, whole=whole)
                step = DecoderStage(config.text, plan, part, one, fallback)
                add(step_name(name), step, quantization.decode)
            if f"select{index}" in specs and part.ends(plan):
                add(f"select{index}", Selector(plan.edges[index], ops))
        if plan.probe is not None:
            add(PROBE, Prober(ops))
    return out


def export(
    graph: Graph,
    text: TextConfig,
    path: Path,
    weights: Mapping[str, WeightSpan],
    target: Target | None = None,
) -> None:
    """Write ``graph`` to ``path``; its parameters become references into ``weights``.

    Raises:
        TargetError: ``target`` lacks an operator that the graph uses.
    """
    module = graph.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stitcher = Stitcher({id(tensor): name for name, tensor in tensors.items()}, graph.opset)
    inputs = [stitcher.input(spec) for spec in graph.spec.inputs]
    named = {spec.name: value for spec, value in zip(graph.spec.inputs, inputs, strict=True)}
    if isinstance(module, DecoderStage):
        out = module.compose_named(stitcher.call, named)
        outputs = [*out.singles, *out.flat_caches]
    elif isinstance(module, ServingStage):
        outputs = module.compose_named(stitcher.call, named)
    elif isinstance(module, Encoder | Projection):
        outputs = list(module.compose(stitcher.call, *inputs))
    else:
        ordered = module.ordered(named) if isinstance(module, Selector) else inputs
        outputs = list(stitcher.call(module, *ordered))
    model = stitcher.model(graph.name, inputs, graph.spec, outputs)
    if target is not None:
        operators = {node.op_type for node in model.graph.all_nodes()}
        check_operators(target, graph.name, graph.opset, operators)
    _strip(model)
    prefix_node_names(model)
    separate_node_names(model)
    _attach(model, text, weights, path.parent)
    onnx_ir.save(model, path)


def _strip(model: onnx_ir.Model) -> None:
    """Remove what names this machine: torch notes source files and stack traces on every node."""
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def prefix_node_names(model: onnx_ir.Model) -> int:
    """Prefix node names with their layer, ``layers.N/``; return how many nodes got one.

    A traced layer names its nodes alike in every layer (``node_mul_106``, ``node_mul_106_2``, ...).
    ONNX Runtime, TensorRT and Polygraphy report times by node name; with the layer in front they
    add up by layer: ``layers.3/node_mul_106_4``.

    The nodes of a layer are neighbours. A layer begins where a weight of its own is first read and
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
            for inner in (node, *_nodes_of_branches(node)):
                inner.name = f"{current}/{inner.name}"
                labelled += 1
    return labelled


def separate_node_names(model: onnx_ir.Model) -> None:
    """Write numbers behind other nodes' names apart: beside ``node`` there is no ``node_3`` but
    ``node.3``.

    TensorRT makes several layers of some nodes, numbers them behind the node's name, and refuses a
    graph in which another node has that name already.
    """
    names = {node.name for node in model.graph.all_nodes()}
    for node in model.graph.all_nodes():
        stem, _, number = (node.name or "").rpartition("_")
        if number.isdigit() and stem in names:
            node.name = f"{stem}.{number}"


def _nodes_of_branches(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    """Yield the nodes of the branches of an ``If``, and of those within."""
    for attribute in node.attributes.values():
        if attribute.type is onnx_ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield inner
                yield from _nodes_of_branches(inner)


def _attach(
    model: onnx_ir.Model, text: TextConfig, weights: Mapping[str, WeightSpan], folder: Path
) -> None:
    """Point every parameter at its bytes; the rotary frequencies are stored in the graph."""
    for name, value in model.graph.initializers.items():
        if name == FREQUENCIES:
            value.const_value = onnx_ir.tensor(frequencies(text)[0].numpy(), name=name)
            continue
        if value.const_value is not None:
            continue  # a small constant of the graph's own
        span = weights[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = onnx_ir.ExternalTensor(
            span.file,
            span.offset,
            span.nbytes,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=folder,
        )
