"""OpenVINO on this CPU: one compiled model per graph, tensors over NumPy memory bound once.

Graphs are those of the ``portable`` lowering: they read the caches where they lie and hand back new
rows, which are written here. A call's arrays are bound when its number of rows comes first; a
decode step then fills a few kilobytes and starts.

Every number of rows that comes first has kernels compiled for it (15 ms for the demo model, 50 for
llava-45m), so questions are padded to multiples of 8, and decode steps are tried at load. Numbers
of slots cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.chain.executor import Kept, StageResult
from ...graphs.contract import PROBE, GraphSpec
from ...graphs.errors import BundleError, MissingDependencyError
from ...graphs.targets import OPENVINO, find_target
from .cpu_caches import BUCKET, HostExecutor
from .openvino_calls import OpenVinoStage, row_chunks, shape_of

ROW_STEP = 8
"""Numbers of rows that a question is padded to are multiples of this."""

PROPERTIES = {
    "PERFORMANCE_HINT": "LATENCY",
    # Left to itself OpenVINO computes in BF16 where the processor can.
    "INFERENCE_PRECISION_HINT": "f32",
}


class OpenVinoExecutor(HostExecutor):
    """``graphs.chain.executor.Executor`` over OpenVINO's CPU plugin, one prompt at a time.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        BundleError: it cannot read a graph.
    """

    def __init__(self, bundle: Bundle, threads: int):
        manifest = bundle.manifest
        super().__init__(manifest)
        self.threads: int | None = threads
        self._ov = library()
        self._core = self._ov.Core()
        properties = PROPERTIES | {"INFERENCE_NUM_THREADS": threads}
        self.models = {
            name: self._compile(bundle.file(graph.file), graph.spec, properties)
            for name, graph in manifest.graphs.items()
        }
        self.requests: dict[str, Any] = {}
        self.stages = [
            OpenVinoStage(self._ov, self.models[name], manifest.graphs[name].spec)
            for index in range(len(self.plan.stages))
            for name in manifest.parts_of(index)
        ]
        for index, stage in enumerate(self.stages):
            self.ensure_slots(index, BUCKET)
            stage.call(1, self.blocks[index]).run()

    def padding(self, stage: int, count: int) -> int:
        """Rows to put before a question of ``count`` rows so that its call is one of a few."""
        return -count % ROW_STEP

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (1, C, H, W) float32 -> visual rows (1, N, D)."""
        return self._call("vision", {"pixels": pixels})["visual_rows"]

    def append(self, stage, rows, positions, order, slot_order, write_index, gates) -> StageResult:
        """See ``Executor``; more orders than rows: those on the left are padding."""
        block, graph = self.blocks[stage], self.stages[stage]
        padding = order.shape[1] - rows.shape[1]
        if padding:
            rows = np.pad(rows, ((0, 0), (padding, 0), (0, 0)))
        done = []
        with self._timed(f"stage{stage}"):
            for start, stop in row_chunks(order):
                at = slice(start, stop)
                first = write_index + start
                call = graph.call(stop - start, block)
                call.fill("rows", rows[:, at])
                call.fill("positions", positions[:, at])
                call.fill("order", order[:, at])
                call.fill("slot_order", slot_order)
                call.fill("write_index", first)
                if gates is not None:
                    call.fill("gates", gates)
                call.run()
                block[:, :, :, first : first + call.count] = call.new_rows
                done.append(call.copy("rows.out"))
        out = self.concatenate(done)[:, padding:]
        return StageResult(out, call.copy("queries"), call.copy("logits"))

    def select(
        self, edge, probe_query, slot_order, query_order, visual_slots, rows, positions, order
    ) -> Kept:
        """One call of a selection over the last layer's cache of stage ``edge``."""
        key, value = list(self.caches[edge].values())[-2:]
        feeds = {
            "probe_query": probe_query,
            "key": key,
            "value": value,
            "slot_order": slot_order,
            "query_order": query_order,
            "visual_slots": visual_slots,
            "rows": rows,
            "positions": positions,
            "order": order,
        }
        return Kept(*self._call(f"select{edge}", feeds).values())

    def probe(
        self, stage, layer, query, slot_order, query_order, visual_slots
    ) -> tuple[np.ndarray, np.ndarray]:
        """One probe of a layer of stage ``stage``."""
        feeds = {
            "query": query,
            "key": self.caches[stage][f"key.{layer}"],
            "value": self.caches[stage][f"value.{layer}"],
            "slot_order": slot_order,
            "query_order": query_order,
            "visual_slots": visual_slots,
        }
        out = self._call(PROBE, feeds)
        return out["cosine"], out["norm"]

    def end_profiles(self) -> dict[str, Path]:
        """None: nobody can ask for them here (``backend.open_backend``)."""
        return {}

    def close(self) -> None:
        """Drop models and buffers."""
        self.stages.clear()
        self.requests.clear()
        self.models.clear()
        self.caches.clear()
        self.blocks.clear()

    def _moved(self, stage: int) -> None:
        self.stages[stage].calls.clear()

    def _call(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a graph that a prompt calls once; ``feeds`` may hold more than it reads."""
        with self._timed(name):
            model = self.models[name]
            if name not in self.requests:
                self.requests[name] = model.create_infer_request()
            request = self.requests[name]
            held = []  # OpenVINO looks into these arrays
            for port in model.inputs:
                one = next(key for key in feeds if key in port.names)
                held.append(np.require(feeds[one], requirements=["C", "W"]))
                request.set_tensor(port, self._ov.Tensor(held[-1], shared_memory=True))
            request.start_async()
            request.wait()
            outputs = {}
            for port in model.outputs:
                outputs[port.any_name] = request.get_tensor(port).data.copy()
            return outputs

    def _compile(self, file: Path, spec: GraphSpec, properties: Mapping[str, Any]) -> Any:
        try:
            model = self._core.read_model(file)
            # One prompt at a time: with the batch known fewer shapes are computed in every call.
            model.reshape({one.name: shape_of(one.shape, {"B": 1}) for one in spec.inputs})
            return self._core.compile_model(model, "CPU", dict(properties))
        except RuntimeError as error:
            raise BundleError(
                f"OpenVINO {self._ov.__version__} cannot load {file}: {error}. Run it with ONNX "
                "Runtime: --backend onnxruntime"
            ) from error


def library() -> Any:
    """OpenVINO.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"this bundle runs on OpenVINO, which is not installed ({error}). Type: pip install "
            "'visistage[openvino]', or run it with ONNX Runtime: --backend onnxruntime"
        ) from error
    first = find_target(OPENVINO).versions[0]
    if _numbers(openvino.__version__) < _numbers(first):
        raise MissingDependencyError(
            f"OpenVINO {first} or newer is needed, found {openvino.__version__}. Type: pip install "
            f"'openvino>={first}', or run the bundle with ONNX Runtime: --backend onnxruntime"
        )
    return openvino


def engine() -> str:
    """OpenVINO's name and version, as trials note them (``threads.choose_threads``)."""
    return f"openvino {library().__version__}"


def _numbers(version: str) -> list[int]:
    """Year and release: 2026.4.1-22982 is [2026, 4]."""
    return [int(part) for part in version.split(".")[:2]]
