"""One graph of a stage in ONNX Runtime, and the buffers that stay bound from call to call.

The caches are bound once for as long as they keep their size. A call of one row, which is what an
answer is made of, goes through buffers that were allocated and bound once as well: it copies a few
kilobytes and binds nothing. Other calls bind what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from ...graphs.contract import GraphSpec, TensorSpec, appended
from .denormals import flushed
from .feeds import gated_depth, shape_of

Arrays = Mapping[str, np.ndarray]


class OrtStage:
    """A stage's graph, or one of several that are run one after another."""

    def __init__(self, spec: GraphSpec, session: ort.InferenceSession):
        self.spec, self.session = spec, session
        self.gated = gated_depth(spec)
        self.caches: dict[str, np.ndarray] = {}
        self.aliased = False
        self.binding = session.io_binding()
        self.step: OrtRowStep | None = None

    def bind_caches(self, caches: Arrays, *, aliased: bool) -> None:
        """Bind the caches of this part's layers as inputs, and as outputs where aliased."""
        names = [spec.name for spec in self.spec.inputs if spec.name in caches]
        self.caches = {name: caches[name] for name in names}
        self.aliased = aliased
        self.binding, self.step = self.bound(), None

    def run(self, feeds: Arrays, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Run once; return every output that is not written in place, in arrays of their own."""
        if sizes["Q"] == 1:
            if self.step is None:
                self.step = OrtRowStep(self, sizes)
            return self.step.run(feeds)
        held = {}  # bound arrays must outlive the call
        for spec in self.inputs():
            array = held[spec.name] = np.ascontiguousarray(self.own(spec, feeds), spec.dtype)
            self.binding.bind_cpu_input(spec.name, array)
        outputs = {s.name: np.empty(shape_of(s, sizes), s.dtype) for s in self.outputs()}
        for name, out in outputs.items():
            self.binding.bind_output(name, "cpu", 0, out.dtype, out.shape, out.ctypes.data)
        flushed(self.session.run_with_iobinding, self.binding)
        return outputs

    def inputs(self) -> list[TensorSpec]:
        """Return the inputs that come with a call."""
        return [spec for spec in self.spec.inputs if spec.name not in self.caches]

    def outputs(self) -> list[TensorSpec]:
        """Return the outputs that a call returns."""
        written = {appended(name) for name in self.caches} if self.aliased else set()
        return [spec for spec in self.spec.outputs if spec.name not in written]

    def own(self, spec: TensorSpec, feeds: Arrays) -> np.ndarray:
        """Return an input of this part; of the gates, those of its own layers, which come first."""
        return feeds[spec.name][: self.gated] if spec.name == "gates" else feeds[spec.name]

    def bound(self) -> ort.IOBinding:
        """Return a binding with the caches bound."""
        binding = self.session.io_binding()
        for name, cache in self.caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(name, value)
            if self.aliased:
                binding.bind_ortvalue_output(appended(name), value)
        return binding


class OrtRowStep:
    """Calls of one row of a part whose caches stay as they are."""

    def __init__(self, part: OrtStage, sizes: Mapping[str, int]):
        self.part = part
        slots = next(iter(part.caches.values())).shape[2]
        sizes = {**sizes, "S": slots}
        self.inputs = [(s, np.zeros(shape_of(s, sizes), s.dtype)) for s in part.inputs()]
        self.outputs = {s.name: np.zeros(shape_of(s, sizes), s.dtype) for s in part.outputs()}
        self.binding = part.bound()
        for spec, array in self.inputs:
            self.binding.bind_cpu_input(spec.name, array)
        for name, out in self.outputs.items():
            self.binding.bind_output(name, "cpu", 0, out.dtype, out.shape, out.ctypes.data)

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run once; the outputs are copies, because the next step writes over its own."""
        for spec, array in self.inputs:
            np.copyto(array, self.part.own(spec, feeds))
        flushed(self.part.session.run_with_iobinding, self.binding)
        return {name: out.copy() for name, out in self.outputs.items()}
