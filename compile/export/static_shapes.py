"""What engines want of a bundle: context lengths, stages cut into parts, graphs with slots fixed.

A compiler that keeps the cache in place needs to know its length, and one prompt at a time is what
a board runs. So each graph gets a copy (kilobytes, the weights are shared) in which batch and slots
are numbers. Attention in FP32 has no fused kernel and carries a leave to be taken apart, which
ONNX Runtime would refuse as an unknown attribute. Nothing else may differ; a test holds us to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir

from ...graphs.bundle import ANY_CONTEXT
from ...graphs.config import ModelConfig
from ...graphs.contract import SLOT_STEP, StagePart, stage_of, stage_slots
from ...graphs.errors import CapacityError, TargetError
from ...graphs.plan.plan import StagePlan
from ...graphs.targets import LLM, MAX_HEAD, Target
from .export import Graph
from .split import split
from .stitch import TORCH_DTYPES

DEFAULT_CONTEXT = 1024
"""Rows that engines have room for unless told otherwise: a picture, a question and an answer."""

BATCH = 1
"""Prompts at a time in engines."""

DECOMPOSABLE = "TRT_decomposable"
"""Attribute by which TensorRT may build attention from basic layers."""


def resolve_contexts(target: Target, config: ModelConfig, given: Sequence[int]) -> tuple[int, ...]:
    """Context lengths to compile for, ascending; none where nothing is compiled.

    Raises:
        TargetError: ``given`` for a target without engines.
        CapacityError: a length that a picture does not fit in, or that the model does not know.
    """
    if not target.engines:
        if given:
            raise TargetError(
                f"target '{target.name}' grows its caches as needed, --context fixes nothing "
                "there. Leave it out"
            )
        return ()
    most = config.text.max_positions
    contexts = sorted(set(given)) or [min(DEFAULT_CONTEXT, most)]
    least = config.visual_tokens + SLOT_STEP
    for context in contexts:
        if not least <= context <= most:
            raise CapacityError(
                f"a context of {context} rows cannot be: a picture and {SLOT_STEP} rows of text "
                f"take {least}, the model knows {most}. Choose --context between them"
            )
    return tuple(contexts)


def resolve_parts(
    target: Target, config: ModelConfig, plan: StagePlan, dtype: str, budget: int | None
) -> list[StagePart] | None:
    """How stages are cut so that compiling each part stays within ``budget`` bytes.

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
            "Run this model on ONNX Runtime: make engines TARGET=cpu"
        )
    assert target.build_memory is not None
    itemsize = TORCH_DTYPES[dtype].itemsize
    return split(config.text, plan, itemsize, budget or target.build_memory)


def variants_of(
    graph: Graph, target: Target, plan: StagePlan, visual_tokens: int, contexts: Sequence[int]
) -> dict[int, tuple[str, int | None]]:
    """File name and slots of a graph's variants, by context; none where sizes may stay open.

    A graph without a cache has one, under ``ANY_CONTEXT``.
    """
    if not target.static_slots:
        return {}
    if not graph.spec.has("S"):
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
