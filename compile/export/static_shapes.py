"""Requirements of engines on a bundle: context lengths, stages cut into parts, fixed slots.

A compiler that keeps the cache in place needs to know its length, and one prompt at a time is what
a board runs. So each graph gets a copy (kilobytes, the weights are shared) in which batch and slots
are numbers. Attention in FP32 has no fused kernel and carries a leave to be taken apart, which
ONNX Runtime would refuse as an unknown attribute. Nothing else may differ; a test holds us to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import onnx_ir
import torch

from ...graphs.bundle import ANY_CONTEXT
from ...graphs.caches import SLOT_STEP, stage_slots
from ...graphs.config import ModelConfig
from ...graphs.errors import CapacityError, TargetError
from ...graphs.modules.layer import HALVES
from ...graphs.parts import StagePart, stage_of, stage_parts
from ...graphs.plan.plan import StagePlan
from ...graphs.targets import LLM, MAX_HEAD, Target
from ...graphs.text_config import TextConfig
from ..checkpoint.names import HEAD_WEIGHT, decoder_shapes
from .export import Graph

DEFAULT_CONTEXT = 1024
"""Rows that engines have space for by default: an image, a question and an answer."""

DEFAULT_TEXT = 448
"""Rows of a question and an answer among them, which larger images leave space for, too."""

BATCH = 1
"""Prompts at a time in engines."""

DECOMPOSABLE = "TRT_decomposable"
"""Attribute by which TensorRT may build attention from basic layers."""

COMPILER_COPIES = 3
"""Times a part's weights that compiling it takes at its peak: two copies and the mapped file."""

COMPILER_BASE = 512 << 20
"""Bytes that the compiler takes besides."""


def resolve_contexts(target: Target, config: ModelConfig, given: Sequence[int]) -> tuple[int, ...]:
    """Return context lengths to compile for, ascending; none where nothing is compiled.

    Raises:
        TargetError: ``given`` for a target without engines.
        CapacityError: a length that an image does not fit in, or that the model does not know.
    """
    if not target.engines:
        if given:
            raise TargetError(
                f"target '{target.name}' grows its caches as needed, --context fixes nothing "
                "there. Leave it out"
            )
        return ()
    most = config.text.max_positions
    whole = -(-(config.visual_tokens + DEFAULT_TEXT) // SLOT_STEP) * SLOT_STEP
    contexts = sorted(set(given)) or [min(max(DEFAULT_CONTEXT, whole), most)]
    least = config.visual_tokens + SLOT_STEP
    fewer = ", or fewer tokens of an image by --image-tokens" if config.varies else ""
    for context in contexts:
        if not least <= context <= most:
            raise CapacityError(
                f"a context of {context} rows cannot be: an image and {SLOT_STEP} rows of text "
                f"take {least}, the model knows {most}. Choose --context between them{fewer}"
            )
    return tuple(contexts)


def resolve_parts(
    target: Target, config: ModelConfig, plan: StagePlan, dtype: str, budget: int | None
) -> list[StagePart] | None:
    """Cut stages so that compiling each part stays within ``budget`` bytes.

    Raises:
        TargetError: no compiler of the target's can take this model.
        CapacityError: one layer alone takes more than the budget.
    """
    if not target.engines:
        if budget is not None:
            raise TargetError(
                f"target '{target.name}' compiles no engines, --build-memory limits nothing there. "
                "Leave it out"
            )
        return None
    widest = max(config.text.head_dim, config.vision.hidden // config.vision.heads)
    if widest > MAX_HEAD and target.lowering == LLM:
        raise TargetError(
            f"attention heads are {widest} wide, {target.backend} has kernels up to {MAX_HEAD}. "
            "Run this model on ONNX Runtime: --target cpu"
        )
    assert target.build_memory is not None
    itemsize = getattr(torch, dtype).itemsize
    return split(config.text, plan, itemsize, budget or target.build_memory)


def compiler_peak(weight_bytes: int) -> int:
    """Return the bytes that compiling a graph with so many bytes of weights is expected to take."""
    return COMPILER_BASE + COMPILER_COPIES * weight_bytes


def split(text: TextConfig, plan: StagePlan, itemsize: int, budget: int) -> list[StagePart]:
    """Return as few parts as ``budget`` bytes of compiler memory allow, equally deep in a stage.

    A part is a graph with the contract of a stage over some of its layers: peak memory of a
    compiler grows with a part's weights. Parts follow each other as stages do.

    Args:
        text: shape of the decoder.
        plan: its stages.
        itemsize: bytes of one weight.
        budget: bytes that compiling one part may take.

    Raises:
        CapacityError: a single layer takes more.
    """
    shapes = decoder_shapes(text)
    of_layer = [0] * text.layers
    tail = 0
    dropped = tuple(
        f"model.layers.{layer}.{module}."
        for stage in plan.stages
        for layer in range(*stage.layers)
        for part in {*HALVES} - {*stage.parts_of(layer)}
        for module in HALVES[part]
    )
    for name, shape in shapes.items():
        if name.startswith(dropped):
            continue
        nbytes = math.prod(shape) * itemsize
        if name.startswith("model.layers."):
            of_layer[int(name.split(".")[2])] += nbytes
        elif name == HEAD_WEIGHT:
            tail = nbytes
    parts = []
    for index in range(len(plan.stages)):
        extra = tail if index == len(plan.stages) - 1 else 0
        parts += cut_stage(plan, index, of_layer, extra, budget)
    return parts


def cut_stage(
    plan: StagePlan, stage: int, of_layer: list[int], tail: int, budget: int
) -> list[StagePart]:
    """Return the fewest equal parts of one stage that all fit; ``tail`` weighs on the last."""
    first, stop = plan.stages[stage].layers
    attending = len(plan.stages[stage].attention_layers)
    for count in range(1, attending + 1):
        bounds = [attending * i // count for i in range(count + 1)]
        parts = stage_parts(plan, stage, [end - start for start, end in pairwise(bounds)])
        sizes = [sum(of_layer[slice(*part.layers)]) for part in parts]
        sizes[-1] += tail
        if all(compiler_peak(size) <= budget for size in sizes):
            return parts
    needed = compiler_peak(max(max(of_layer[first:stop]), of_layer[stop - 1] + tail))
    raise CapacityError(
        f"compiling one layer of stage {stage} takes about {needed / 2**30:.1f} GiB, the budget is "
        f"{budget / 2**30:.1f} GiB. Give more: --build-memory {math.ceil(needed / 2**30)}GiB"
    )


def variants_of(
    graph: Graph, target: Target, plan: StagePlan, visual_tokens: int, contexts: Sequence[int]
) -> dict[int, tuple[str, int | None]]:
    """Return file name and slots of a graph's variants, by context; none if sizes may stay open.

    A graph without a cache has one, under ``ANY_CONTEXT``.
    """
    if not target.static_slots:
        return {}
    if not graph.spec.follows_context:
        return {ANY_CONTEXT: (f"{graph.name}.fixed.onnx", None)}
    stage = stage_of(graph.name)
    return {
        context: (
            f"{graph.name}.context{context}.onnx",
            stage_slots(plan, visual_tokens, context)[stage],
        )
        for context in contexts
    }


def write_variant(source: Path, target: Path, slots: int | None) -> None:
    """Copy ``source`` to ``target`` with batch 1 and ``slots`` cache slots fixed."""
    model = onnx_ir.load(source)
    sizes = {"B": BATCH} | ({} if slots is None else {"S": slots})
    graph = model.graph
    values = [*graph.inputs, *graph.outputs]
    for node in graph.all_nodes():
        values += node.outputs
        if node.op_type == "Attention" and node.outputs[0].dtype == onnx_ir.DataType.FLOAT:
            node.attributes.add(onnx_ir.AttrInt64(DECOMPOSABLE, 1))
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_fixed(dim, sizes) for dim in value.shape])
    onnx_ir.save(model, target)


def _fixed(dim: int | onnx_ir.SymbolicDim, sizes: dict[str, int]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return sizes.get(str(dim.value), dim.value)
