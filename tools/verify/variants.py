"""The check of the engine compilers' files: they are the files that ONNX Runtime ran.

A variant may have sizes where its source has the symbols B and S, and attention may be marked as
decomposable. Everything else (nodes, attributes, weights, constants, types) is equal, so what
holds of the one holds of the other.
"""

from __future__ import annotations

import onnx

from ...compile.export.static_shapes import BATCH, DECOMPOSABLE
from ...graphs.bundle import ANY_CONTEXT
from ...graphs.contract import stage_of, stage_slots
from .verify_report import CheckResult
from .verify_target import NothingError, VerifyTarget


def compare_variants(target: VerifyTarget) -> CheckResult:
    """Compare every variant with its source.

    Raises:
        NothingError: the bundle has no variants.
    """
    bundle, manifest = target.bundle, target.bundle.manifest
    failure, facts = "", {}
    for name, fact in manifest.graphs.items():
        for context, file in fact.variants.items():
            sizes = {"B": BATCH}
            if context != ANY_CONTEXT:
                slots = stage_slots(manifest.plan, manifest.config.visual_tokens, context)
                sizes["S"] = slots[stage_of(name)]
            source = onnx.load(bundle.file(fact.file), load_external_data=False)
            variant = onnx.load(bundle.file(file), load_external_data=False)
            wrong, marked = difference(source, variant, sizes)
            failure = failure or (wrong and f"{file} differs from {fact.file}: {wrong}")
            fixed = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
            facts[file] = f"{fact.file} with {fixed}" + (
                f" and {DECOMPOSABLE} on {marked} nodes" if marked else ""
            )
    if not facts:
        raise NothingError("the bundle's back end reads the files that ONNX Runtime ran")
    return CheckResult(failure, tuple(facts), facts=facts)


def difference(
    source: onnx.ModelProto, variant: onnx.ModelProto, sizes: dict[str, int]
) -> tuple[str, int]:
    """Return the first thing that may not differ (empty: none), and the number of marked nodes.

    Changes both models.
    """
    wrong = _shapes(source, variant, sizes)
    marked = 0
    for node in variant.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != DECOMPOSABLE]
        if node.op_type == "Attention" and len(kept) < len(node.attribute):
            marked += 1
            del node.attribute[:]
            node.attribute.extend(kept)
    for kind in ("node", "initializer"):
        pair = [getattr(model.graph, kind) for model in (source, variant)]
        if wrong or len(pair[0]) != len(pair[1]):
            wrong = wrong or f"it has {len(pair[1])} {kind}s, expected {len(pair[0])}"
            break
        for theirs, ours in zip(*pair, strict=True):
            if theirs != ours:
                wrong = wrong or f"{kind} '{ours.name}' is not the same"
    if not wrong and source.SerializeToString(deterministic=True) != variant.SerializeToString(
        deterministic=True
    ):
        wrong = "its graph is not the same"
    return wrong, marked


def _shapes(source: onnx.ModelProto, variant: onnx.ModelProto, sizes: dict[str, int]) -> str:
    """Return what is wrong with the variant's shapes; those of both are cleared."""
    wrong = ""
    for kind in ("input", "output", "value_info"):
        values = [
            {value.name: value for value in getattr(model.graph, kind)}
            for model in (source, variant)
        ]
        if list(values[0]) != list(values[1]):
            return wrong or f"it has other {kind}s"
        for name, theirs in values[0].items():
            ours = values[1][name]
            wanted = [_dim(dim, sizes) for dim in theirs.type.tensor_type.shape.dim]
            found = [_dim(dim, {}) for dim in ours.type.tensor_type.shape.dim]
            if wanted != found:
                wrong = wrong or f"{kind} '{name}' has the shape {found}, expected {wanted}"
            for value in (theirs, ours):
                value.type.tensor_type.ClearField("shape")
    return wrong


def _dim(dim: onnx.TensorShapeProto.Dimension, sizes: dict[str, int]) -> int | str:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return sizes.get(dim.dim_param, dim.dim_param)
