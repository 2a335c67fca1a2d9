"""The rungs of one graph: torch against ONNX Runtime, and torch in FP16 arithmetic against FP32."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnxruntime as ort

from ...graphs.contract import ORT_LLM_SINCE
from ...graphs.modules.quantized import is_cache_scale
from ...graphs.targets import PORTABLE
from ...runtime.backends.ort import int8_session_entries
from .check_steps import ImpossibleError, require_memory
from .compare import LOOSE, bounds_of, first_wrong, strict, tensor_error
from .module_checks import run_module
from .stored_graph import StoredGraph
from .verify_report import CheckResult, TensorError

PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)
class ComparedCall:
    """One call of a graph; what it should give is computed once."""

    graph: StoredGraph
    rows: int

    @cached_property
    def feeds(self) -> dict[str, np.ndarray]:
        """What every rung is given."""
        return self.graph.feeds(self.rows)

    @cached_property
    def wanted(self) -> dict[str, np.ndarray]:
        """The reference: torch in FP32."""
        return run_module(self.graph, self.feeds, half=False)


class GraphChecks:
    """Both rungs of one graph; the reference is computed once.

    ``free``: bytes of memory that may be used.
    """

    def __init__(self, graph: StoredGraph, free: int):
        self.graph, self.free = graph, free
        self.kinds = kinds_of(graph)
        self.calls = [ComparedCall(graph, rows) for rows in graph.row_counts]

    def onnxruntime(self) -> CheckResult:
        """The graph's file in ONNX Runtime against its torch module in FP32.

        With weights as the file has them, and where ONNX Runtime makes more of them than a faster
        order (``compare.LOOSE``) once more as the runtime loads them.

        Raises:
            ImpossibleError: too little memory, or an ONNX Runtime that is too old.
        """
        graph = self.graph
        found = tuple(int(part) for part in ort.__version__.split(".")[:2])
        if graph.manifest.lowering != PORTABLE and found < ORT_LLM_SINCE:
            wanted = ".".join(map(str, ORT_LLM_SINCE))
            raise ImpossibleError(f"needs ONNX Runtime {wanted}, found {ort.__version__}")
        copies = 2 if graph.manifest.dtype == "float16" else 1
        rearranged = bool(self.kinds & set(LOOSE))
        require_memory(
            f"{graph.fact.file} in ONNX Runtime, which computes in FP32 on a CPU,",
            (copies + rearranged) * graph.weights.nbytes,
            self.free,
        )
        result = self._run(rearranged=False)
        if result.failure or not rearranged:
            return result
        again = self._run(rearranged=True)
        return replace(again, errors=(*result.errors, *again.errors))

    def _run(self, *, rearranged: bool) -> CheckResult:
        """Load and run the file; ``rearranged``: with weights in the order that kernels like."""
        graph = self.graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if graph.manifest.quantization.schemes:
            for entry, value in int8_session_entries().items():
                options.add_session_config_entry(entry, value)
        if not rearranged:
            options.add_session_config_entry("session.disable_prepacking", "1")
        session = ort.InferenceSession(str(graph.path), options, providers=[PROVIDER])
        failure = _contract(graph, session)
        if failure:
            return CheckResult(failure=failure, files=(graph.fact.file,))
        outputs = [spec.name for spec in graph.spec.outputs]
        kinds = self.kinds if rearranged else strict(self.kinds)
        how = ", inputs rounded by ONNX Runtime" if rearranged else ""
        results = [session.run(outputs, call.feeds) for call in self.calls]
        del session  # the reference wants its memory
        checked = [
            self._result(call, dict(zip(outputs, found, strict=True)), kinds, how)
            for call, found in zip(self.calls, results, strict=True)
        ]
        worst = next((one for one in checked if one.failure), checked[0])
        return replace(worst, errors=tuple(error for one in checked for error in one.errors))

    def half(self) -> CheckResult:
        """The torch module in FP16 arithmetic: finite, and near FP32."""
        call = self.calls[0]
        got = run_module(self.graph, call.feeds, half=True)
        return self._result(call, got, {"float16", *strict(self.kinds)})

    def _result(
        self,
        call: ComparedCall,
        got: Mapping[str, np.ndarray],
        kinds: Collection[str],
        how: str = "",
    ) -> CheckResult:
        errors: list[TensorError] = []
        if call is not self.calls[0]:
            how = f", {call.rows} rows{how}"
        for name, want in call.wanted.items():
            if got[name].shape != want.shape:
                shapes = f"{list(got[name].shape)}, expected {list(want.shape)}"
                return CheckResult(f"{name} has the shape {shapes}", (self.graph.fact.file,))
            errors.append(tensor_error(name + how, got[name], want))
        wrong = first_wrong(errors, bounds_of(kinds).graph)
        return CheckResult(wrong, (self.graph.fact.file,), tuple(errors))


def kinds_of(graph: StoredGraph) -> set[str]:
    """Type of the graph's floats, schemes of its layers, ``cache`` where it rounds what it caches
    (``compare.BOUNDS``).
    """
    schemes = graph.manifest.quantization.schemes
    modules = {name.rpartition(".")[0] for name in graph.weights}
    found = {graph.manifest.dtype, *(schemes[one] for one in modules if one in schemes)}
    return found | {"cache"} if any(map(is_cache_scale, graph.weights)) else found


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
