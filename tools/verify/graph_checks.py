"""Checks of one graph: its file in ONNX Runtime, and FP16 arithmetic, against torch in FP32.

The graph's torch module runs one piece at a time with the graph's own weights. Only one layer is in
memory in the type that it computes in, so a 7B stage needs a fraction of a gigabyte. In FP32 that
is the reference; in FP16 it is the arithmetic that a GPU does and ONNX Runtime on x86 does not (it
computes FP16 graphs in FP32 and never overflows).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...compile.layer_stream import without_weights
from ...graphs.caches import is_cache
from ...graphs.contract import ORT_LLM_SINCE
from ...graphs.errors import BundleError
from ...graphs.modules.decoder import DecoderStage
from ...graphs.modules.encoders import make_vision
from ...graphs.modules.ops import Eager
from ...graphs.modules.quantized import is_cache_scale
from ...graphs.modules.select import Prober, Selector
from ...graphs.modules.serving import ServingStage
from ...graphs.modules.vision import Encoder, Projection
from ...graphs.parts import PROBE, PROJECT, SERVE, VISION
from ...graphs.plan.routing import is_router
from ...graphs.precision import NO_FALLBACK, Fp32Fallback
from ...graphs.targets import PORTABLE
from ...graphs.vision_contract import vision_readings
from ...runtime.backends.onnx_runtime import ort
from ...runtime.backends.ort import int8_session_entries
from .compare import GATES, LOOSE, bounds_of, first_wrong, strict, tensor_error
from .stored_graph import (
    BUILD_AGAIN,
    FILLED,
    StoredGraph,
    new_rows,
    quantise_module,
    schemes_of,
)
from .verify_report import CheckResult, ImpossibleError, TensorError, require_memory
from .verify_target import VerifyTarget

PROVIDER = "CPUExecutionProvider"


class ComparedGraph:
    """A graph, and inputs of the calls that together reach all of it.

    ``kinds``: type of its floats, schemes of its layers, ``cache`` where it rounds what it caches
    (``compare.BOUNDS``).
    """

    def __init__(self, graph: StoredGraph):
        self.graph = graph
        self.calls = [graph.feeds(rows) for rows in graph.row_counts]
        schemes = schemes_of(graph.manifest, graph.kind)
        modules = {name.rpartition(".")[0] for name in graph.weights}
        self.kinds = {graph.manifest.dtype, *(schemes[m] for m in modules if m in schemes)}
        if any(map(is_cache_scale, graph.weights)):
            self.kinds.add("cache")
        if any(map(is_router, graph.weights)):
            self.kinds.add(GATES)

    @cached_property
    def wanted(self) -> list[dict[str, np.ndarray]]:
        """Outputs of torch in FP32, the reference."""
        return [run_module(self.graph, feeds, half=False) for feeds in self.calls]

    def compare(
        self, results: Sequence[Mapping[str, np.ndarray]], kinds: Collection[str], how: str = ""
    ) -> CheckResult:
        """Compare outputs of the calls, or of the first, with the reference.

        ``kinds``: what they were computed in; ``how``: the same in words, for reports.
        """
        file, bounds = self.graph.fact.file, bounds_of(kinds)
        errors: list[TensorError] = []
        for got, wanted, rows in zip(results, self.wanted, self.graph.row_counts, strict=False):
            call = "" if wanted is self.wanted[0] else f", {rows} rows"
            for name, want in wanted.items():
                if got[name].shape != want.shape:
                    shapes = f"{list(got[name].shape)}, expected {list(want.shape)}"
                    return CheckResult(f"{name} has the shape {shapes}", (file,))
                # Slots behind the last row are not written; where an output has a buffer of its
                # own, ONNX Runtime's grouped attention leaves them as it finds them.
                pair = got[name], want
                if is_cache(name):
                    pair = got[name][:, :, : FILLED + rows], want[:, :, : FILLED + rows]
                shares = name == "saliency"
                errors.append(
                    tensor_error(name + call + how, *pair, shares=shares, share=bounds.share)
                )
        return CheckResult(first_wrong(errors, bounds.graph), (file,), tuple(errors))


def compared_graph(target: VerifyTarget, name: str) -> ComparedGraph:
    """Return the graph ``name`` of the target, which keeps the last one."""
    if name not in target.compared:
        target.compared = {name: ComparedGraph(StoredGraph(target.bundle, name))}
    return target.compared[name]


def compare_onnxruntime(target: VerifyTarget, name: str) -> CheckResult:
    """Compare a graph's file in ONNX Runtime with its torch module in FP32.

    With weights as the file has them, and where ONNX Runtime makes more of them than a faster
    order (``compare.LOOSE``) once more as the runtime loads them.
    """
    compared = compared_graph(target, name)
    graph = compared.graph
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if graph.manifest.lowering != PORTABLE and found < ORT_LLM_SINCE:
        wanted = ".".join(map(str, ORT_LLM_SINCE))
        raise ImpossibleError(f"needs ONNX Runtime {wanted}, found {ort.__version__}")
    copies = 2 if graph.manifest.dtype == "float16" else 1
    rearranged = bool(compared.kinds & set(LOOSE))
    require_memory(
        f"{graph.fact.file} in ONNX Runtime, which computes in FP32 on a CPU,",
        (copies + rearranged) * graph.weights.nbytes,
        target.free,
    )
    result = _run_file(compared, rearranged=False)
    if result.failure or not rearranged:
        return result
    again = _run_file(compared, rearranged=True)
    return replace(again, errors=(*result.errors, *again.errors))


def compare_half(target: VerifyTarget, name: str) -> CheckResult:
    """Compare a graph's torch module in FP16 arithmetic with FP32."""
    target.require_half()
    compared = compared_graph(target, name)
    got = run_module(compared.graph, compared.calls[0], half=True)
    return compared.compare([got], {"float16", *strict(compared.kinds)})


def _run_file(compared: ComparedGraph, *, rearranged: bool) -> CheckResult:
    """Load and run the file; ``rearranged``: with weights in the order that kernels prefer."""
    graph = compared.graph
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if graph.manifest.quantization.schemes:
        for entry, value in int8_session_entries().items():
            options.add_session_config_entry(entry, value)
    if not rearranged:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(str(graph.path), options, providers=[PROVIDER])
    outputs = [spec.name for spec in graph.spec.outputs]
    for side, have, want in (
        ("inputs", session.get_inputs(), [spec.name for spec in graph.spec.inputs]),
        ("outputs", session.get_outputs(), outputs),
    ):
        names = [value.name for value in have]
        if names != want:
            failure = (
                f"{graph.fact.file} has the {side} {', '.join(names)}, the manifest says "
                f"{', '.join(want)}"
            )
            return CheckResult(failure, (graph.fact.file,))
    kinds = compared.kinds if rearranged else strict(compared.kinds)
    how = ", inputs rounded by ONNX Runtime" if rearranged else ""
    results = [
        dict(zip(outputs, session.run(outputs, feeds), strict=True)) for feeds in compared.calls
    ]
    del session  # the reference needs its memory
    return compared.compare(results, kinds, how)


@torch.no_grad()
def run_module(
    graph: StoredGraph, feeds: Mapping[str, np.ndarray], *, half: bool
) -> dict[str, np.ndarray]:
    """Return outputs of the module that ``graph`` was exported from, by their contract's names.

    ``half``: in FP16 and what the manifest widens, inputs as they are given; otherwise all in FP32.

    Raises:
        BundleError: the file holds other weights than the module has.
    """
    fallback = graph.manifest.fallback if half else NO_FALLBACK
    module = without_weights(partial(_module, graph, fallback))
    dtype = torch.float16 if half else torch.float32
    inputs = {name: _tensor(value, None if half else dtype) for name, value in feeds.items()}
    if isinstance(module, Selector):
        outputs = list(module.of(inputs))
    elif isinstance(module, Prober):
        outputs = list(module(*(inputs[spec.name] for spec in graph.spec.inputs)))
    else:
        call = _streamed(module, graph, dtype)
        if isinstance(module, Encoder | Projection):
            outputs = list(module.compose(call, *inputs.values()))
        elif isinstance(module, ServingStage):
            outputs = module.compose_named(call, inputs)
        else:
            out = module.compose_named(call, inputs)
            outputs = [*out.singles, *out.flat_caches]
    names = [spec.name for spec in graph.spec.outputs]
    return new_rows(
        {name: value.numpy() for name, value in zip(names, outputs, strict=True)}, graph.spec
    )


def _module(graph: StoredGraph, fallback: Fp32Fallback) -> nn.Module:
    config, plan = graph.manifest.config, graph.manifest.plan
    if graph.kind == PROBE:
        return Prober()
    if graph.kind == "select":
        return Selector(plan.edges[graph.stage])
    module: nn.Module
    if graph.kind == VISION:
        module = make_vision(config, Eager(), fallback, vision_readings(config, plan))
    elif graph.kind == PROJECT:
        module = Projection(config, Eager(), fallback)
    elif graph.kind == SERVE:
        module = ServingStage(config.text, plan, graph.part, Eager())
    else:
        module = DecoderStage(config.text, plan, graph.part, Eager(), fallback)
    quantise_module(module, graph.manifest, graph.kind)
    return module


def _streamed(module: nn.Module, graph: StoredGraph, dtype: torch.dtype) -> Any:
    """Return a ``call`` that reads a piece's weights for as long as the piece runs."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    lacking = sorted(set(names.values()) ^ set(graph.weights))
    if lacking:
        raise BundleError(
            f"{graph.path} is not the graph '{graph.name}': weight {lacking[0]} is in one of the "
            f"file and the plan only. {BUILD_AGAIN}"
        )

    def call(piece: nn.Module, *args: Any) -> Any:
        weights = {}
        for own, parameter in piece.named_parameters():
            name = names[id(parameter)]
            weights[own] = _tensor(graph.weights[name], dtype)
            if weights[own].shape != parameter.shape:
                raise BundleError(
                    f"{graph.path}: {name} has the shape {tuple(weights[own].shape)}, expected "
                    f"{tuple(parameter.shape)}. {BUILD_AGAIN}"
                )
        return torch.func.functional_call(piece, weights, args)

    return call


def _tensor(array: np.ndarray, dtype: torch.dtype | None) -> Tensor:
    """Copy an array (caches are written in place), floats in ``dtype``; None: as they are."""
    tensor = torch.from_numpy(array.copy())
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
