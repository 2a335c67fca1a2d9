"""ONNX Runtime on this CPU: one session per graph, caches written in place through I/O binding.

Every buffer is a NumPy array that an ``OrtValue`` looks into, so a cache is read, rewound and
snapshot without a copy. Graphs that return whole caches have each bound as input and output at
once; those that return new rows (``contract.returns_new_rows``) have them written here.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ...graphs.bundle import Bundle
from ...graphs.caches import appended
from ...graphs.chain.executor import StageResult
from ...graphs.commands import rebuild_command
from ...graphs.contract import ORT_LLM_SINCE, GraphSpec, returns_new_rows, row_readings
from ...graphs.errors import BundleError, CapacityError
from ...graphs.parts import STEP
from ...graphs.targets import PORTABLE, Target
from ..autotune import choose_threads
from ..hardware import cores
from .backend import BackendOptions
from .cpu_caches import HostExecutor
from .denormals import AVAILABLE, flushed
from .feeds import inject_feeds, layers_taking, shape_of, stage_feeds
from .onnx_runtime import find_cuda_libraries, ort
from .ort_packages import collision, install_gpu

STAGE = "stage"
KINDS = (STAGE, STEP)
"""Graphs of a stage: of all its calls, or where there are some for one row, of all others."""

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"

NO_GEMM = ("optimization.disable_specified_optimizers", "MatMulAddFusion")
"""Integer products are computed in integers only without this fusion. Measured with 1.31: a product
with an addition behind it (a bias, the residual) becomes ``Gemm`` before its rounding is looked at,
and then runs in float, from weights that are restored in every call."""

EXACT = ("session.x64quantprecision", "1")
"""On x86 processors without VNNI the fast product of unsigned and signed bytes saturates at 16
bits; with this both are unsigned, which is exact, and slower where it is not needed."""

CPUINFO = Path("/proc/cpuinfo")


class OrtExecutor(HostExecutor):
    """``graphs.chain.executor.Executor`` over ONNX Runtime, for one prompt at a time or a batch."""

    def __init__(self, bundle: Bundle, options: BackendOptions, batch: int = 1):
        manifest = bundle.manifest
        _check_version(bundle)
        super().__init__(bundle, options.threads or cores(), batch)
        self.returns_new_rows = returns_new_rows(self.graphs[manifest.parts_of(0)[0]].spec)
        widened = manifest.dtype == "float16"
        self.prepacked = _prepack(manifest.weight_bytes, widened, options.memory_limit)
        self.sessions = {name: self._load(bundle, name, options) for name in self.graphs}
        stages = range(len(self.plan.stages))
        self.part_names = {kind: [manifest.parts_of(s, kind) for s in stages] for kind in KINDS}
        self.split()

    def split(self) -> None:
        """Bind the caches of these lanes."""
        self.parts = {
            kind: [
                [OrtStage(self.graphs[name].spec, self.sessions[name]) for name in names]
                for names in stages
            ]
            for kind, stages in self.part_names.items()
        }
        for stage in range(len(self.plan.stages)):
            self.rebind(stage)

    def append(
        self, stage, rows, positions, order, slot_order, write_index, by_layer, inject
    ) -> StageResult:
        """Call a stage, part after part; contract: ``contract.stage_spec``."""
        count = rows.shape[1]
        feeds = stage_feeds(positions, order, slot_order, write_index, by_layer)
        outputs: dict[str, np.ndarray] = {"rows.out": rows}
        queries = []
        kind = STEP if count == 1 and self.part_names[STEP][stage] else STAGE
        with self.timed(f"{kind}{stage}"):
            for part in self.parts[kind][stage]:
                feeds["rows"] = outputs["rows.out"]
                feeds |= inject_feeds(part.spec.inputs, inject, rows.shape[:2])
                outputs |= part.run(feeds, count)
                queries.append(outputs["queries"])
                for name, depth in part.layers_taking.items():  # each part takes those of its own
                    feeds[name] = feeds[name][depth:]
            if self.returns_new_rows:
                self._write(stage, outputs, np.broadcast_to(write_index, len(rows)), count)
        all_queries = queries[0] if len(queries) == 1 else np.concatenate(queries)
        readings = {name: outputs[name] for name in row_readings(self.plan, stage)}
        return StageResult(outputs["rows.out"], all_queries, outputs.get("logits"), readings)

    def _write(
        self, stage: int, outputs: Mapping[str, np.ndarray], first: np.ndarray, count: int
    ) -> None:
        """Write ``count`` new rows of each lane, from slot ``first`` (B,) on."""
        for name, cache in self.caches[stage].items():
            for lane, at in enumerate(first):
                cache[lane, :, at : at + count] = outputs[appended(name)][lane]

    def call_graph(
        self, graph: str, stage: int, feeds: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        spec = self.graphs[graph].spec
        read = {tensor.name: np.ascontiguousarray(feeds[tensor.name]) for tensor in spec.inputs}
        names = [tensor.name for tensor in spec.outputs]
        with self.timed(graph):
            outputs = flushed(self.sessions[graph].run, names, read)
        return dict(zip(names, outputs, strict=True))

    def end_profiles(self) -> dict[str, Path]:
        """Stop recording operators; the file of every graph (``BackendOptions.profile``)."""
        return {name: Path(session.end_profiling()) for name, session in self.sessions.items()}

    def close(self) -> None:
        """Drop sessions and buffers."""
        self.parts.clear()
        self.sessions.clear()
        super().close()

    def rebind(self, stage: int) -> None:
        for part in (part for kind in KINDS for part in self.parts[kind][stage]):
            part.bind_caches(self.caches[stage], aliased=not self.returns_new_rows)

    def _load(self, bundle: Bundle, name: str, options: BackendOptions) -> ort.InferenceSession:
        session = ort.SessionOptions()
        session.intra_op_num_threads = self.threads
        session.log_severity_level = 3
        # Graphs take turns: threads that go on spinning would steal the next graph's cores.
        session.add_session_config_entry("session.force_spinning_stop", "1")
        if AVAILABLE:  # its own threads; they would stay so in the caller's, too
            session.add_session_config_entry("session.set_denormal_as_zero", "1")
        if bundle.manifest.quantization.schemes:
            for entry, value in int8_session_entries().items():
                session.add_session_config_entry(entry, value)
        if not self.prepacked:
            session.add_session_config_entry("session.disable_prepacking", "1")
        if options.profile is not None:
            session.enable_profiling = True
            session.profile_file_prefix = str(options.profile / name)
        return load_session(bundle.file(self.graphs[name].file), session, [CPU_PROVIDER])


class OrtStage:
    """A graph of a stage, or one of several that are run one after another.

    Its caches stay bound for as long as they keep their size. A call of one row, of which an answer
    is made, goes through arrays that stay bound as well: it copies a few kilobytes and binds
    nothing. Other calls bind what they are given.
    """

    def __init__(self, spec: GraphSpec, session: ort.InferenceSession):
        self.spec, self.session = spec, session
        self.layers_taking = layers_taking(spec)
        self.bind_caches({}, aliased=False)

    def bind_caches(self, caches: Mapping[str, np.ndarray], *, aliased: bool) -> None:
        """Bind the caches of its layers as inputs, and as outputs where aliased."""
        self.caches = {
            tensor.name: caches[tensor.name] for tensor in self.spec.inputs if tensor.name in caches
        }
        self.aliased = aliased
        self.step: OrtCall | None = None

    def run(self, feeds: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
        """Run once; return every output that is not written in place, in arrays of their own."""
        inputs = {}
        for tensor in self.spec.inputs:
            if tensor.name not in self.caches:
                given = feeds[tensor.name]
                given = given[: self.layers_taking.get(tensor.name)]
                inputs[tensor.name] = np.ascontiguousarray(given, tensor.dtype)
        if rows > 1:
            return OrtCall(self, inputs).run()
        if self.step is None:
            self.step = OrtCall(self, {name: array.copy() for name, array in inputs.items()})
        for name, array in inputs.items():
            np.copyto(self.step.inputs[name], array)
        return {name: out.copy() for name, out in self.step.run().items()}


class OrtCall:
    """A call of a stage with every array bound, which must outlive it."""

    def __init__(self, stage: OrtStage, inputs: dict[str, np.ndarray]):
        self.inputs, self.session = inputs, stage.session
        self.binding = stage.session.io_binding()
        written = set()
        for name, cache in stage.caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            self.binding.bind_ortvalue_input(name, value)
            if stage.aliased:
                self.binding.bind_ortvalue_output(appended(name), value)
                written.add(appended(name))
        for name, array in inputs.items():
            self.binding.bind_cpu_input(name, array)
        (batch, count), (_, slots) = inputs["order"].shape, inputs["slot_order"].shape
        sizes = {"B": batch, "Q": count, "S": slots}
        self.outputs = {
            tensor.name: np.empty(shape_of(tensor, sizes), tensor.dtype)
            for tensor in stage.spec.outputs
            if tensor.name not in written
        }
        for name, out in self.outputs.items():
            self.binding.bind_output(name, "cpu", 0, out.dtype, out.shape, out.ctypes.data)

    def run(self) -> dict[str, np.ndarray]:
        """Run, and return the outputs that are not caches."""
        flushed(self.session.run_with_iobinding, self.binding)
        return self.outputs


def load_session(
    file: Path, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
    """Load a graph, folding its constants with denormals flushed as in its runs.

    Raises:
        BundleError: ONNX Runtime does not take it.
    """
    if any(CUDA_PROVIDER in provider for provider in providers):
        find_cuda_libraries()
    try:
        return flushed(ort.InferenceSession, str(file), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base but this
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load {file}: {error}. "
            "Build the bundle again with this version: visistage build MODEL"
        ) from error


def int8_session_entries() -> dict[str, str]:
    """Return the session configuration for a graph with quantised layers, by entry."""
    return dict([NO_GEMM, *([EXACT] if saturates(platform.machine(), CPUINFO) else [])])


@lru_cache(maxsize=1)
def saturates(machine: str, cpuinfo: Path) -> bool:
    """Return whether the processor's byte products may saturate; yes where nothing says."""
    if machine.lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in cpuinfo.read_text()
    except OSError:
        return True


def open_bundle(bundle: Bundle, options: BackendOptions) -> OrtExecutor:
    """Load the bundle's graphs; where no number of threads was asked for, it is measured."""

    def load(threads: int) -> OrtExecutor:
        return OrtExecutor(bundle, replace(options, threads=threads, profile=None))

    engine = f"onnxruntime {ort.__version__}"
    threads = options.threads or choose_threads(bundle, engine, load)
    return OrtExecutor(bundle, replace(options, threads=threads), options.lanes or 1)


def missing(target: Target, provider: str = CPU_PROVIDER) -> Iterator[str]:
    """Yield what lacks to run graphs for ``target`` here."""
    if provider not in ort.get_available_providers():
        yield collision() or f"an ONNX Runtime with {provider} ({install_gpu()})"
    elif not target.serves(ort.__version__):
        yield f"ONNX Runtime {target.versions[0]}, found {ort.__version__}"


def _check_version(bundle: Bundle) -> None:
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if bundle.manifest.lowering != PORTABLE and found < ORT_LLM_SINCE:
        raise BundleError(
            f"{bundle.path} needs ONNX Runtime {ORT_LLM_SINCE[0]}.{ORT_LLM_SINCE[1]} or newer, "
            f"found {ort.__version__}. Upgrade it, or build for this one: "
            f"{rebuild_command(bundle.manifest, target='cpu-portable')}"
        )


def _prepack(weight_bytes: int, widened: bool, memory_limit: int | None) -> bool:
    """Return whether the weights fit twice (mapped file and rearranged copy).

    Raises:
        CapacityError: they do not even fit once.
    """
    limit = memory_limit or psutil.virtual_memory().available
    resident = 2 * weight_bytes if widened else weight_bytes
    if resident > limit and (widened or memory_limit is not None):
        why = " in FP32, which is what a CPU computes FP16 graphs in," if widened else ""
        source = "the memory limit is" if memory_limit else "this machine has free"
        raise CapacityError(
            f"the weights take {resident / 2**20:.0f} MiB{why} and {source} "
            f"{limit / 2**20:.0f} MiB. "
            + ("Raise --memory-limit" if memory_limit else "Use a machine with more")
        )
    return 2 * weight_bytes <= limit
