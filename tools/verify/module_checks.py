"""A graph's torch module, run one piece at a time with the graph's own weights.

Only one layer is in memory in the type that it computes in, so a 7B stage needs a fraction of a
gigabyte. In FP32 that is the reference of ONNX Runtime's rung; in FP16 the arithmetic that a GPU
does and ONNX Runtime on x86 does not (it computes FP16 graphs in FP32 and never overflows).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...compile.layer_stream import without_weights
from ...graphs.bundle import Bundle, Manifest, TensorRef
from ...graphs.contract import PROBE, StagePart
from ...graphs.errors import BundleError
from ...graphs.linears import linear_groups
from ...graphs.modules.decoder import DecoderStage
from ...graphs.modules.ops import Eager
from ...graphs.modules.quantized import replace_linears, round_caches
from ...graphs.modules.select import Prober, Selector
from ...graphs.modules.vision import Vision
from ...graphs.precision import NO_FALLBACK, Fp32Fallback
from ...graphs.targets import find_target
from .stored_graph import StoredGraph, map_raw, new_rows

STORED_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@torch.no_grad()
def run_module(
    graph: StoredGraph, feeds: Mapping[str, np.ndarray], *, half: bool
) -> dict[str, np.ndarray]:
    """Outputs of the module that ``graph`` was exported from, by their names in the contract.

    ``half``: in FP16 and what the manifest widens, inputs as they are given; otherwise all in FP32.

    Raises:
        BundleError: the file holds other weights than the module has.
    """
    fallback = graph.manifest.fallback if half else NO_FALLBACK
    module = without_weights(partial(_module, graph, fallback))
    dtype = torch.float16 if half else torch.float32
    inputs = {name: _tensor(value, None if half else dtype) for name, value in feeds.items()}
    if isinstance(module, (Selector, Prober)):
        # By name: a score that reads no values has no input for them.
        wanted = inspect.signature(module.forward).parameters
        outputs = list(module(**{name: inputs.get(name) for name in wanted}))
    else:
        call = _streamed(module, graph, dtype)
        if isinstance(module, Vision):
            outputs = [module.compose(call, *inputs.values())]
        else:
            outputs = _stage(module, call, inputs)
    names = [spec.name for spec in graph.spec.outputs]
    return new_rows(
        {name: value.numpy() for name, value in zip(names, outputs, strict=True)}, graph.spec
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on a single thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantise_module(module: nn.Module, manifest: Manifest) -> None:
    """Let the layers and caches of ``module`` be integers that are so in the bundle's graphs."""
    engines = find_target(manifest.target).engines
    groups = linear_groups(manifest.config)
    replace_linears(module, manifest.quantization.schemes, groups, engines=engines)
    round_caches(module, manifest.quantization.cache)


def _module(graph: StoredGraph, fallback: Fp32Fallback) -> nn.Module:
    config, plan = graph.manifest.config, graph.manifest.plan
    if graph.kind == PROBE:
        return Prober()
    if graph.kind == "select":
        return Selector(plan.edges[graph.stage])
    module: nn.Module
    if graph.kind == "vision":
        module = Vision(config, Eager(), fallback)
    else:
        part = StagePart(graph.stage, graph.layers)
        module = DecoderStage(config.text, plan, part, Eager(), fallback)
    quantise_module(module, graph.manifest)
    return module


def _stage(stage: DecoderStage, call: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Compose a stage; its outputs in the order of the contract."""
    caches = [value for name, value in inputs.items() if name.startswith(("key.", "value."))]
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    out = stage.compose(
        call,
        inputs["rows"],
        inputs["positions"],
        inputs["order"],
        inputs["slot_order"],
        inputs["write_index"],
        inputs.get("gates"),
        pairs,
    )
    # Every tensor that the contract has an output for, in its order; then the caches.
    single = [value for value in out[:-1] if value is not None]
    return [*single, *(cache for pair in out.caches for cache in pair)]


def _streamed(module: nn.Module, graph: StoredGraph, dtype: torch.dtype) -> Any:
    """A ``call`` that reads a piece's weights for as long as it runs."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    lacking = sorted(set(names.values()) ^ set(graph.weights))
    if lacking:
        raise BundleError(
            f"{graph.path} is not the graph '{graph.name}': weight {lacking[0]} is in one of the "
            "file and the plan only. Build the bundle again: make engines MODEL=..."
        )

    def call(piece: nn.Module, *args: Any) -> Any:
        weights = {}
        for own, parameter in piece.named_parameters():
            name = names[id(parameter)]
            weights[own] = _tensor(graph.weights[name], dtype)
            if weights[own].shape != parameter.shape:
                raise BundleError(
                    f"{graph.path}: {name} has the shape {tuple(weights[own].shape)}, expected "
                    f"{tuple(parameter.shape)}. Build the bundle again: make engines MODEL=..."
                )
        return torch.func.functional_call(piece, weights, args)

    return call


def _tensor(array: np.ndarray, dtype: torch.dtype | None) -> Tensor:
    """A copy (caches are written in place), floating numbers in ``dtype``; None: as they are."""
    tensor = torch.from_numpy(array.copy())
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def stored_tensor(bundle: Bundle, ref: TensorRef) -> Tensor:
    """A tensor that the manifest places in a file, mapped, in the type it is stored in."""
    dtype = STORED_TORCH_DTYPES[ref.dtype]
    raw = map_raw(bundle, ref.file, ref.offset, math.prod(ref.shape) * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype).view(ref.shape)
