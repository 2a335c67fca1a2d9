"""Composition of an ONNX graph from pieces, each kind traced once.

A module made of alike layers says how its pieces follow each other (``compose``). Here every call
of a piece becomes a call of an ONNX function, traced by ``torch.onnx.export`` when its kind is
first met; inlining then gives the flat graph. Thirty-two layers cost one trace, no weight is ever
read: pieces are traced with fake tensors, parameters become inputs of the function and named
initializers of the graph.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from ...graphs.contract import GraphSpec, TensorSpec
from ...graphs.modules.quantized import WEIGHT
from ...graphs.vision_contract import TILES, WINDOWS
from .branched_attention import write_conditional_attention

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:  # not a public name: where torch has moved it, tracing takes longer
    ONNXRegistry = None

DOMAIN = "visistage"
IR_VERSION = 10
EXAMPLE_SIZES = {"B": 10007, "Q": 10009, "S": 10037, "N": 10039, "T": 10061, TILES: 4 * 10039}
EXAMPLE_SIZES[WINDOWS] = 10069
"""Sizes to trace with, as fake tensors that take no memory. Primes that no model has for a width,
so that a size tells its symbol; above the largest K: a selection offers more than it keeps. Tiles
are four for each of N: where they are patches, a square of them becomes a row."""

SYMBOLS = {size: name for name, size in EXAMPLE_SIZES.items()}
SYMBOLS[EXAMPLE_SIZES["S"] + EXAMPLE_SIZES["Q"]] = "S+Q"

_REGISTRIES: dict[tuple, Any] = {}
"""Tables of ``cached_torchlib_registry``, by what they were asked for with."""


class Stitcher:
    """Records calls of pieces; ``model`` gives the graph.

    ``names`` maps each parameter and buffer (by identity) to the name of its initializer.
    """

    def __init__(self, names: dict[int, str], opset: int):
        self.names, self.opset = names, opset
        self.nodes: list[onnx_ir.Node] = []
        self.initializers: dict[str, onnx_ir.Value] = {}
        self.functions: dict[tuple, Traced] = {}

    def input(self, spec: TensorSpec) -> onnx_ir.Value:
        """Return a graph input."""
        return onnx_ir.Value(
            name=spec.name,
            shape=onnx_ir.Shape(spec.shape),
            type=onnx_ir.TensorType(_ir_dtype(spec.dtype)),
        )

    def call(self, piece: nn.Module, *args: onnx_ir.Value | None) -> Any:
        """Note one call; return a value, or a tuple of them where the piece returns a tuple."""
        specs = tuple(None if arg is None else _spec(arg) for arg in args)
        key = _key(piece, specs, self.opset)
        if key not in _TRACED:
            _TRACED[key] = _trace(key, piece, specs, self.opset)
        function, outputs, is_tuple = self.functions[key] = _TRACED[key]
        weights = [self._initializer(tensor) for tensor in _tensors(piece).values()]
        node = onnx_ir.Node(
            DOMAIN,
            function.name,
            [*(arg for arg in args if arg is not None), *weights],
            num_outputs=len(outputs),
            name=f"call{len(self.nodes)}",
        )
        for value, spec in zip(node.outputs, outputs, strict=True):
            value.shape = onnx_ir.Shape(spec.shape)
            value.type = onnx_ir.TensorType(_ir_dtype(spec.dtype))
        self.nodes.append(node)
        return tuple(node.outputs) if is_tuple else node.outputs[0]

    def model(
        self,
        name: str,
        inputs: Sequence[onnx_ir.Value],
        spec: GraphSpec,
        outputs: Sequence[onnx_ir.Value],
    ) -> onnx_ir.Model:
        """Return the flat graph with the contract's names on its outputs."""
        graph = onnx_ir.Graph(
            list(inputs),
            list(outputs),
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.opset, DOMAIN: 1},
            name=name,
        )
        functions = [traced.function for traced in self.functions.values()]
        model = onnx_ir.Model(
            graph, ir_version=IR_VERSION, producer_name="visistage", functions=functions
        )
        Sequential(
            InlinePass(),
            IdentityEliminationPass(),
            CommonSubexpressionEliminationPass(),
            RemoveUnusedNodesPass(),
        )(model)
        # Weights have no values yet, so only what shapes and axes are computed from folds: engine
        # compilers want those as plain constants.
        fold_constants(model, onnx_shape_inference=False)
        write_conditional_attention(model)
        graph.opset_imports.pop(DOMAIN, None)
        for index, (value, tensor) in enumerate(zip(graph.outputs, spec.outputs, strict=True)):
            assert value.producer() is not None, f"{name}: output {index} is an input"
            value.name = tensor.name
            value.shape = onnx_ir.Shape(tensor.shape)
        return model

    def _initializer(self, tensor: Tensor) -> onnx_ir.Value:
        name = self.names[id(tensor)]
        if name not in self.initializers:
            dtype = _ir_dtype(str(tensor.dtype).removeprefix("torch."))
            if name.endswith(WEIGHT["w4"]):  # torch has no such type
                dtype = onnx_ir.DataType.INT4
            self.initializers[name] = onnx_ir.Value(
                name=name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(dtype)
            )
        return self.initializers[name]


def _tensors(piece: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of a piece, by the name they have in it."""
    return {**dict(piece.named_parameters()), **dict(piece.named_buffers())}


class Traced(NamedTuple):
    """A piece as an ONNX function, what it returns, and whether as a tuple."""

    function: onnx_ir.Function
    outputs: list[TensorSpec]
    is_tuple: bool


_TRACED: dict[tuple, Traced] = {}
"""Every kind of piece traced in this process: stages of one plan, and plans of one model, share."""


def _key(piece: nn.Module, specs: Sequence[TensorSpec | None], opset: int) -> tuple:
    """Return what a trace depends on; ``kind`` holds all that is not in a shape."""
    tensors = tuple((n, tuple(t.shape), str(t.dtype)) for n, t in _tensors(piece).items())
    return (type(piece).__qualname__, piece.kind, tuple(specs), tensors, opset)


def _trace(key: tuple, piece: nn.Module, specs: Sequence[TensorSpec | None], opset: int) -> Traced:
    """Trace one piece; its parameters become the function's last inputs."""
    known = list(_tensors(piece).values())
    mode = detect_fake_mode(known) or FakeTensorMode()
    with mode:
        examples = tuple(None if spec is None else _example(spec) for spec in specs)
    shapes: Any = tuple(
        None
        if spec is None
        else {
            axis: torch.export.Dim.DYNAMIC
            for axis, d in enumerate(spec.shape)
            if isinstance(d, str)
        }
        for spec in specs
    )
    if _is_variadic(piece):
        shapes = (shapes,)
    with warnings.catch_warnings(), _quiet("torch.onnx"), mode, cached_torchlib_registry():
        warnings.simplefilter("ignore")
        returned = piece.eval()(*examples)
        program = torch.onnx.export(
            piece,
            examples,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=shapes,
        )
    graph = program.model.graph
    _merge_shared(graph, piece)
    weights = []
    for weight in _tensors(piece):
        value = graph.initializers.pop(weight, None)
        # A parameter this kind does not read still takes its place among the inputs.
        weights.append(value if value is not None else onnx_ir.Value(name=weight))
    graph.inputs.extend(weights)
    _inline_constants(graph)
    tensors = returned if isinstance(returned, tuple) else (returned,)
    outputs = [
        TensorSpec("", str(t.dtype).removeprefix("torch."), tuple(map(_dim, t.shape)))
        for t in tensors
    ]
    # Named by what it is, never by when it was traced: equal exports must give equal bytes.
    name = f"{type(piece).__name__}_{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    function = onnx_ir.Function(DOMAIN, name, graph=graph, attributes=())
    return Traced(function, outputs, isinstance(returned, tuple))


def _dim(size: int) -> int | str:
    """Return a size's symbol: rows of all tiles are N."""
    return SYMBOLS.get(size, size if size % EXAMPLE_SIZES[TILES] else "N")


def _merge_shared(graph: onnx_ir.Graph, piece: nn.Module) -> None:
    """Let a parameter that modules share be one value, under its first name."""
    names: dict[int, list[str]] = {}
    for name, tensor in piece.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    for first, *others in names.values():
        for name in others:
            value = graph.initializers.pop(name, None)
            if value is not None and first in graph.initializers:
                onnx_ir.convenience.replace_all_uses_with(value, graph.initializers[first])
            elif value is not None:
                value.name = first
                graph.initializers.add(value)


def _inline_constants(graph: onnx_ir.Graph) -> None:
    """Functions hold no initializers: turn the small lifted constants into nodes."""
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        node = onnx_ir.node("Constant", [], {"value": value.const_value}, num_outputs=1)
        node.outputs[0].name = name
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        graph.insert_before(graph[0], node)
        onnx_ir.convenience.replace_all_uses_with(value, node.outputs[0])


def _is_variadic(piece: nn.Module) -> bool:
    """Return whether ``forward`` takes ``*states``: one tuple to ``torch.export``."""
    return bool(piece.forward.__code__.co_flags & 0x04)


def _example(spec: TensorSpec) -> Tensor:
    sizes = {name: size for size, name in SYMBOLS.items()}
    shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _spec(value: onnx_ir.Value) -> TensorSpec:
    """Return type and shape of a value; its name does not matter to a trace."""
    assert value.dtype is not None, value
    assert value.shape is not None, value
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec("", value.dtype.numpy().name, shape)


def _ir_dtype(name: str) -> onnx_ir.DataType:
    return onnx_ir.DataType.from_numpy(np.dtype(name))


@contextmanager
def cached_torchlib_registry() -> Iterator[None]:
    """Let traces in here share one table of torch's translations to ONNX for each opset.

    ``torch.onnx.export`` makes the table anew in every call, for which it parses the sources of
    some 250 functions twice: half of the time of tracing a small piece (torch 2.13). The table
    depends on nothing but the opset, and we add no translations of our own. This patches a private
    class of torch; it can go once ``torch.onnx.export`` keeps its table between calls.
    """
    if not hasattr(ONNXRegistry, "from_torchlib"):
        yield
        return
    own, make = vars(ONNXRegistry)["from_torchlib"], ONNXRegistry.from_torchlib

    def table(*args: Any, **options: Any) -> Any:
        key = (args, *sorted(options.items()))
        if key not in _REGISTRIES:
            _REGISTRIES[key] = make(*args, **options)
        return _REGISTRIES[key]

    ONNXRegistry.from_torchlib = staticmethod(table)
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep one library's progress chatter below errors for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
