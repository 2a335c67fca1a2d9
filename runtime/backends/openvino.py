"""OpenVINO on this CPU: one compiled model per graph, tensors over NumPy memory bound once.

Graphs are those of the ``portable`` lowering: they read the caches in place and return new rows,
which are written here. A stage's compiled model takes any number of rows; every number has an infer
request of its own, whose arrays stay bound for as long as the caches keep their place. A decode
step then fills a few kilobytes and starts.

Every number of rows that comes first has kernels compiled for it (15 ms for the demo model, 50 for
llava-45m), so questions are padded to multiples of 8, and decode steps are run once at load.
Numbers of slots cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.caches import appended, is_cache
from ...graphs.chain.executor import StageResult
from ...graphs.commands import install
from ...graphs.contract import GraphSpec, TensorSpec, row_readings
from ...graphs.errors import BundleError, MissingDependencyError
from ...graphs.targets import OPENVINO, Target, find_target
from ..autotune import choose_threads
from .backend import BackendOptions
from .cpu_caches import BUCKET, HostExecutor
from .feeds import inject_feeds, shape_of, stage_feeds

ROW_STEP = 8
"""Numbers of rows that a question is padded to are multiples of this."""

MOST_ROWS = 192
"""Rows of one call. Attention here writes its scores to memory; those of a whole image leave the
processor's caches (576 rows of llava-45m: a fifth to a third of the call)."""

MOST_CALLS = 8
"""Numbers of rows whose arrays stay bound."""

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
        super().__init__(bundle, threads)
        self._ov = library()
        self._core = self._ov.Core()
        properties = PROPERTIES | {"INFERENCE_NUM_THREADS": threads}
        self.models = {
            name: self._compile(bundle.file(graph.file), graph.spec, properties)
            for name, graph in self.graphs.items()
        }
        self.requests: dict[str, Any] = {}
        self.stages: list[OpenVinoStage] = []
        for index in range(len(self.plan.stages)):
            (name,) = bundle.manifest.parts_of(index)  # parts are for compilers of engines
            stage = OpenVinoStage(self._ov, self.models[name], self.graphs[name].spec)
            self.stages.append(stage)
            self.ensure_slots(index, BUCKET)
            stage.call(1, self.blocks[index]).run()

    def padding(self, stage: int, count: int) -> int:
        """Return how many rows before ``count`` rows of a question make its call one of a few."""
        return -count % ROW_STEP

    def append(
        self, stage, rows, positions, order, slot_order, write_index, by_layer, inject
    ) -> StageResult:
        """See ``Executor``; more orders than rows: those on the left are padding."""
        block, graph = self.blocks[stage], self.stages[stage]
        padding = order.shape[1] - rows.shape[1]
        if padding:
            rows = np.pad(rows, ((0, 0), (padding, 0), (0, 0)))
        added = inject_feeds(graph.spec.inputs, inject, order.shape, padding)
        wanted = ("rows.out", *row_readings(self.plan, stage))
        done: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        with self.timed(f"stage{stage}"):
            whole = [(0, order.shape[1])]
            for start, stop in whole if self.plan.fixed_calls else row_chunks(order):
                at, first = slice(start, stop), write_index + start
                call = graph.call(stop - start, block)
                call.fill("rows", rows[:, at])
                own = {name: by_layer[name] for name in by_layer if name != "row_gain"}
                if "row_gain" in by_layer:
                    own["row_gain"] = by_layer["row_gain"][..., at]
                feeds = stage_feeds(positions[:, at], order[:, at], slot_order, first, own)
                feeds |= {name: values[:, at] for name, values in added.items()}
                for name, values in feeds.items():
                    call.fill(name, values)
                call.run()
                block[:, :, :, first : first + call.count] = call.new_rows
                for name, parts in done.items():
                    parts.append(call.copy(name))
        out = {name: self.concatenate(parts)[:, padding:] for name, parts in done.items()}
        return StageResult(out.pop("rows.out"), call.copy("queries"), call.copy("logits"), out)

    def call_graph(
        self, graph: str, stage: int, feeds: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        spec = self.graphs[graph].spec
        with self.timed(graph):
            if graph not in self.requests:
                self.requests[graph] = self.models[graph].create_infer_request()
            request = self.requests[graph]
            held = []  # OpenVINO looks into these arrays
            for tensor in spec.inputs:
                held.append(np.require(feeds[tensor.name], requirements=["C", "W"]))
                request.set_tensor(tensor.name, self._ov.Tensor(held[-1], shared_memory=True))
            request.start_async()
            request.wait()
            return {
                tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in spec.outputs
            }

    def close(self) -> None:
        """Drop models and buffers."""
        self.stages.clear()
        self.requests.clear()
        self.models.clear()
        super().close()

    def rebind(self, stage: int) -> None:
        self.stages[stage].calls.clear()

    def _compile(self, file: Path, spec: GraphSpec, properties: Mapping[str, Any]) -> Any:
        try:
            model = self._core.read_model(file)
            # One prompt at a time: with the batch known fewer shapes are computed in every call.
            model.reshape({tensor.name: _opened(tensor) for tensor in spec.inputs})
            return self._core.compile_model(model, "CPU", dict(properties))
        except RuntimeError as error:
            raise BundleError(
                f"OpenVINO {self._ov.__version__} cannot load {file}: {error}. Run it with ONNX "
                "Runtime: --backend onnxruntime"
            ) from error


class OpenVinoStage:
    """A stage's compiled model, and calls of it by their number of rows, latest last."""

    def __init__(self, ov: Any, model: Any, spec: GraphSpec):
        self.ov, self.model, self.spec = ov, model, spec
        self.calls: dict[int, BoundRequest] = {}

    def call(self, count: int, block: np.ndarray) -> BoundRequest:
        """Return the call of ``count`` rows, bound to the caches in ``block``."""
        call = self.calls.pop(count, None)
        if call is None:
            if len(self.calls) == MOST_CALLS:
                del self.calls[next(iter(self.calls))]
            call = BoundRequest(self.ov, self.model, self.spec, count, block)
        self.calls[count] = call
        return call


class BoundRequest:
    """One infer request with every tensor bound.

    Attributes:
        count: Q.
        arrays: inputs and outputs other than caches, by name.
        new_rows: (caches, 1, G, Q, d), to be written into the caches.
    """

    def __init__(self, ov: Any, model: Any, spec: GraphSpec, count: int, block: np.ndarray):
        self.count = count
        self.request = model.create_infer_request()
        self.new_rows = np.empty((*block.shape[:3], count, block.shape[4]), block.dtype)
        self.arrays: dict[str, np.ndarray] = {}
        sizes = {"B": 1, "Q": count, "S": block.shape[3]}
        grown = [tensor.name for tensor in spec.outputs if is_cache(tensor.name)]
        caches = [name.removesuffix(appended("")) for name in grown]
        bound = dict(zip(caches, block, strict=True))
        bound |= dict(zip(grown, self.new_rows, strict=True))
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name not in bound:
                array = np.zeros(shape_of(tensor, sizes), tensor.dtype)
                bound[tensor.name] = self.arrays[tensor.name] = array
            self.request.set_tensor(tensor.name, ov.Tensor(bound[tensor.name], shared_memory=True))

    def fill(self, name: str, values: np.ndarray) -> None:
        """Copy an input in."""
        self.arrays[name][...] = values

    def copy(self, name: str) -> np.ndarray | None:
        """Copy an output, None where the graph has none of that name."""
        array = self.arrays.get(name)
        return None if array is None else array.copy()

    def run(self) -> None:
        """Compute the outputs in ``arrays`` and ``new_rows``."""
        # Starting and waiting returns nothing, where infer() would copy every output.
        self.request.start_async()
        self.request.wait()


def _opened(tensor: TensorSpec) -> list[int]:
    """Return a shape as OpenVINO takes it: -1 where any size will do."""
    known = {"B": 1}
    return [known.get(size, -1) if isinstance(size, str) else size for size in tensor.shape]


def row_chunks(order: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut the rows of a call into pieces of one size, (start, stop) each: ``order`` (1, Q).

    Where orders rise, no row sees a later one, and what a row sees is there when its turn comes.
    """
    count = order.shape[1]
    rising = (np.diff(order[0]) > 0).all()
    step = -(-count // -(-count // MOST_ROWS)) if rising else count
    for start in range(0, count, step):
        yield start, min(start + step, count)


def open_bundle(bundle: Bundle, options: BackendOptions) -> OpenVinoExecutor:
    """Load the bundle's graphs; where no number of threads was asked for, it is measured."""

    def load(threads: int) -> OpenVinoExecutor:
        return OpenVinoExecutor(bundle, threads)

    engine = f"openvino {library().__version__}"
    return load(options.threads or choose_threads(bundle, engine, load))


def missing(target: Target) -> Iterator[str]:
    """Yield what lacks to run graphs for ``target`` here.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    found = metadata.version("openvino")
    if not target.serves(found):
        yield f"OpenVINO {target.versions[0]}, found {found}"


def library() -> Any:
    """Return the module of OpenVINO.

    Raises:
        MissingDependencyError: it is not installed, or too old.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"this bundle runs on OpenVINO, which is not installed ({error}). Type: "
            f"{install('openvino')}; or run it with ONNX Runtime: --backend onnxruntime"
        ) from error
    target = find_target(OPENVINO)
    if not target.serves(openvino.__version__):
        first = target.versions[0]
        raise MissingDependencyError(
            f"OpenVINO {first} or newer is needed, found {openvino.__version__}. Type: pip install "
            f"'openvino>={first}', or run the bundle with ONNX Runtime: --backend onnxruntime"
        )
    return openvino
