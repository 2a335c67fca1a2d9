"""The rungs of one graph: torch against ONNX Runtime, and torch in FP16 arithmetic against FP32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import onnxruntime as ort

from ..graphs.contract import ORT_LLM_SINCE
from .compare import TOLERANCE, first_wrong, tensor_error
from .modules import run_module
from .report import Finding, TensorError
from .steps import ImpossibleError, require_memory
from .stored_graph import StoredGraph

PROVIDER = "CPUExecutionProvider"


class GraphRungs:
    """Both rungs of one graph; the reference is computed once.

    ``free``: bytes of memory that may be used.
    """

    def __init__(self, graph: StoredGraph, free: int):
        self.graph, self.free = graph, free
        self.precision = graph.manifest.precision

    def onnxruntime(self) -> Finding:
        """The graph's file in ONNX Runtime against its torch module in FP32.

        Raises:
            ImpossibleError: too little memory, or an ONNX Runtime that is too old.
        """
        graph = self.graph
        found = tuple(int(part) for part in ort.__version__.split(".")[:2])
        if graph.manifest.lowering == "llm" and found < ORT_LLM_SINCE:
            wanted = ".".join(map(str, ORT_LLM_SINCE))
            raise ImpossibleError(f"needs ONNX Runtime {wanted}, found {ort.__version__}")
        widened = 2 if self.precision == "fp16" else 1
        require_memory(
            f"{graph.fact.file} in ONNX Runtime, which computes in FP32 on a CPU,",
            widened * graph.nbytes,
            self.free,
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = ort.InferenceSession(str(graph.path), options, providers=[PROVIDER])
        failure = _contract(graph, session)
        if failure:
            return Finding(failure=failure, files=(graph.fact.file,))
        outputs = [spec.name for spec in graph.spec.outputs]
        got = dict(zip(outputs, session.run(outputs, self.feeds), strict=True))
        del session
        return self._finding(got, TOLERANCE[self.precision])

    def half(self) -> Finding:
        """The torch module in FP16 arithmetic: finite, and near FP32."""
        got = run_module(self.graph, self.feeds, half=True)
        return self._finding(got, TOLERANCE["fp16"])

    @cached_property
    def feeds(self) -> dict[str, np.ndarray]:
        """What both rungs are given."""
        return self.graph.feeds()

    @cached_property
    def wanted(self) -> dict[str, np.ndarray]:
        """The reference: torch in FP32."""
        return run_module(self.graph, self.feeds, half=False)

    def _finding(self, got: Mapping[str, np.ndarray], tolerance: float) -> Finding:
        errors: list[TensorError] = []
        for name, want in self.wanted.items():
            if got[name].shape != want.shape:
                shapes = f"{list(got[name].shape)}, expected {list(want.shape)}"
                return Finding(f"{name} has the shape {shapes}", (self.graph.fact.file,))
            errors.append(tensor_error(name, got[name], want))
        return Finding(first_wrong(errors, tolerance), (self.graph.fact.file,), tuple(errors))


def _contract(graph: StoredGraph, session: ort.InferenceSession) -> str:
    """What the file's inputs or outputs have that the contract has not, or the other way round."""
    for side, have, want in (
        ("inputs", session.get_inputs(), graph.spec.inputs),
        ("outputs", session.get_outputs(), graph.spec.outputs),
    ):
        names = [value.name for value in have]
        if names != [spec.name for spec in want]:
            return (
                f"{graph.fact.file} has the {side} {', '.join(names)}, the manifest says "
                f"{', '.join(spec.name for spec in want)}"
            )
    return ""
