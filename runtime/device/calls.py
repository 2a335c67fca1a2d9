"""Calls of loaded engines: profile, shapes and addresses; captured, or not.

``Replay`` is for calls that come again and again with the same shapes at the same addresses;
``LooseCall`` for those that come once in a prompt, on arrays at any address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...graphs.contract import GraphSpec
from ...graphs.engine_index import compile_again
from ...graphs.errors import EngineError
from ..backends.feeds import shape_of
from .memory import DeviceArray, Memory
from .protocol import (
    DEVICE_ALIGNMENT,
    Buffer,
    CapturedGraph,
    CaptureError,
    Compiled,
    Device,
    DeviceEngine,
    ExecutionContext,
    Shape,
)

ASK_AGAIN = 16
"""Runs after which an engine that could not be captured is asked again: TensorRT-RTX says so while
it compiles."""

BATCH = 1
"""Prompts at a time on a device."""


class Loaded:
    """An engine on the device, with the scratch memory that it shares with others."""

    def __init__(self, compiled: Compiled, engine: DeviceEngine):
        self.compiled, self.engine = compiled, engine
        self.scratch: Buffer | None = None

    @property
    def spec(self) -> GraphSpec:
        """The graph's contract."""
        return self.compiled.spec

    def context(
        self, sizes: Mapping[str, int], addresses: Mapping[str, int], *, replayed: bool = False
    ) -> ExecutionContext:
        """Return a context with these sizes of the contract's symbols, everything bound.

        ``replayed``: as of ``DeviceEngine.context``.

        Raises:
            EngineError: no profile takes these shapes.
        """
        context = self.engine.context(self.profile(sizes), self.scratch, replayed=replayed)
        bind_all(context, shapes_of(self.spec, sizes), addresses)
        return context

    def profile(self, sizes: Mapping[str, int]) -> int:
        """Return the first profile that takes these sizes of the contract's symbols.

        Raises:
            EngineError: none does.
        """
        shapes = shapes_of(self.spec, sizes)
        profile = self.compiled.profile_for({s.name: shapes[s.name] for s in self.spec.inputs})
        if profile is None:
            asked = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
            raise EngineError(
                f"engine {self.compiled.file.name} was compiled for other sizes than {asked}. "
                f"{compile_again(self.compiled.file.parent.parent)}"
            )
        return profile


def share_scratch(device: Device, engines: Sequence[Loaded]) -> None:
    """Give ``engines`` one scratch buffer that suffices for each."""
    nbytes = max((engine.engine.scratch_bytes for engine in engines), default=0)
    if nbytes:
        scratch = device.allocate(nbytes)
        for engine in engines:
            engine.scratch = scratch


class Replay:
    """Contexts that run one after another, always the same.

    The first time they run as they are, in which an engine settles what it left for later; the
    second time they are captured, from then on replayed. What comes once is not worth a capture.
    An engine that cannot be captured yet is asked again after ``ASK_AGAIN`` runs; what failed in a
    capture is not tried again.
    """

    def __init__(self, device: Device, contexts: Sequence[ExecutionContext]):
        self.device, self.contexts = device, contexts
        self.graph: CapturedGraph | None = None
        self.rejected: str | None = None
        self._settled = self._failed = False
        self._runs_until_asked = 0

    def run(self) -> None:
        """Run them, captured where that pays and can be done."""
        if self.graph is None and self._settled and not self._failed:
            self._capture()
        if self.graph is not None:
            self.graph.launch()
            return
        self._enqueue()
        self._settled = True

    def _capture(self) -> None:
        if self._runs_until_asked:
            self._runs_until_asked -= 1
            return
        if not all(context.capturable for context in self.contexts):
            self.rejected = "an engine says that its work cannot be captured"
            self._runs_until_asked = ASK_AGAIN
            return
        try:
            self.graph, self.rejected = self.device.capture(self._enqueue), None
        except (CaptureError, EngineError) as error:
            self.rejected, self._failed = str(error), True

    def _enqueue(self) -> None:
        for context in self.contexts:
            context.enqueue()


class LooseCall:
    """One engine called on arrays of host and device, its outputs in memory of their own.

    One context for each profile, bound anew in every call: plans that decide per prompt call their
    probe with ever new sizes, and a context costs memory of host and device.
    """

    def __init__(self, memory: Memory, loaded: Loaded):
        self.memory, self.loaded = memory, loaded
        self._contexts: dict[int, ExecutionContext] = {}

    def __call__(
        self, inputs: Mapping[str, np.ndarray | DeviceArray], sizes: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        """Return outputs by name; ``inputs`` may hold more than the engine reads."""
        spec = self.loaded.spec
        shapes = shapes_of(spec, sizes)
        arrays: dict[str, DeviceArray] = {}
        uploads: dict[str, np.ndarray] = {}
        for tensor in spec.inputs:
            array = inputs[tensor.name]
            assert tuple(array.shape) == shapes[tensor.name], (tensor.name, array.shape)
            if isinstance(array, DeviceArray):
                arrays[tensor.name] = self.as_aligned(array)
            else:
                uploads[tensor.name] = np.asarray(array, tensor.dtype)
        if uploads:
            there = self.memory.pack([(array.shape, array.dtype) for array in uploads.values()])
            self.memory.upload(there, list(uploads.values()))
            arrays |= zip(uploads, there, strict=True)
        outputs = self.memory.pack([(shapes[o.name], np.dtype(o.dtype)) for o in spec.outputs])
        named = {tensor.name: array for tensor, array in zip(spec.outputs, outputs, strict=True)}
        addresses = {name: array.address for name, array in (arrays | named).items()}
        self._context(sizes, shapes, addresses).enqueue()
        return named

    def as_aligned(self, array: DeviceArray) -> DeviceArray:
        """Return ``array``, or a copy where a slice starts where engines do not read from."""
        if array.address % DEVICE_ALIGNMENT == 0:
            return array
        copy = self.memory.empty(array.shape, array.dtype)
        self.memory.put(copy.address, array)
        return copy

    def _context(
        self, sizes: Mapping[str, int], shapes: Mapping[str, Shape], addresses: Mapping[str, int]
    ) -> ExecutionContext:
        """Return the context for these sizes, bound to these addresses."""
        profile = self.loaded.profile(sizes)
        if profile not in self._contexts:
            self._contexts[profile] = self.loaded.context(sizes, addresses)
        else:
            bind_all(self._contexts[profile], shapes, addresses)
        return self._contexts[profile]


def bind_all(
    context: ExecutionContext, shapes: Mapping[str, Shape], addresses: Mapping[str, int]
) -> None:
    """Set shape and address of every input and output."""
    for name, shape in shapes.items():
        context.bind(name, shape, addresses[name])


def shapes_of(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shape of every input and output."""
    return {tensor.name: shape_of(tensor, sizes) for tensor in (*spec.inputs, *spec.outputs)}
