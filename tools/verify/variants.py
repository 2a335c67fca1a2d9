"""The check of the engine compilers' files: they are the files that ONNX Runtime ran.

A variant may have sizes where its source has the symbols B and S, and attention may be marked as
decomposable. Everything else (nodes, attributes, weights, constants, types) is equal, so what
holds of the one holds of the other.
"""

from __future__ import annotations

import onnx

from ...compile.export.static_shapes import BATCH, DECOMPOSABLE
from ...graphs.bundle import ANY_CONTEXT
from ...graphs.caches import stage_slots
from ...graphs.parts import stage_of
from .verify_report import CheckResult
from .verify_target import NothingError, VerifyTarget


def compare_variants(target: VerifyTarget) -> CheckResult:
    """Compare every variant with its source."""
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
    graph, marked = source.graph, 0
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for node in variant.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != DECOMPOSABLE]
        if node.op_type == "Attention" and len(kept) < len(node.attribute):
            marked += 1
            del node.attribute[:]
            node.attribute.extend(kept)
    for kind in ("input", "output", "value_info", "node", "initializer"):
        wanted, found = (getattr(model.graph, kind) for model in (source, variant))
        if len(wanted) != len(found):
            return f"it has {len(found)} {kind}s, expected {len(wanted)}", marked
        for theirs, ours in zip(wanted, found, strict=True):
            if theirs == ours:
                continue
            if not isinstance(ours, onnx.ValueInfoProto):
                return f"{kind} '{ours.name}' is not the same", marked
            shapes = map(onnx.helper.printable_value_info, (ours, theirs))
            return f"{kind} of another shape: {', expected '.join(shapes)}", marked
    equal = source.SerializeToString(deterministic=True) == variant.SerializeToString(
        deterministic=True
    )
    return "" if equal else "its graph is not the same", marked
