"""ONNX Runtime on this CPU: one session per graph, caches written in place through I/O binding.

Every buffer is a NumPy array that an ``OrtValue`` looks into, so a cache is read, rewound and
snapshot without a copy. Graphs that return whole caches have each bound as input and output at
once; those that hand back new rows (``contract.returns_new_rows``) have them written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil

from ...graphs.bundle import Bundle
from ...graphs.chain.executor import Kept, StageResult
from ...graphs.contract import ORT_LLM_SINCE, PROBE, appended, returns_new_rows
from ...graphs.errors import BundleError, CapacityError
from ...graphs.targets import PORTABLE
from ..tensors import stored_cache_scales
from .cpu import cores
from .cpu_caches import HostExecutor
from .denormals import AVAILABLE, flushed
from .ort_int8 import int8_session_entries
from .ort_stage import OrtStage

CPU_PROVIDER = "CPUExecutionProvider"
ENGINE = f"onnxruntime {ort.__version__}"


@dataclass(frozen=True)
class OrtOptions:
    """How graphs are loaded. ``threads`` None: every core (``threads.choose_threads`` tries fewer).

    ``memory_limit``: bytes the weights may take; None: what is available now. Weights are
    rearranged for speed (one more copy) when that fits, and mapped from disk otherwise. FP16 graphs
    on a CPU are computed in FP32, from a copy of twice the size.

    ``profile``: a folder for ONNX Runtime's own times of every operator; they take time themselves.
    """

    threads: int | None = None
    memory_limit: int | None = None
    profile: Path | None = None


class OrtExecutor(HostExecutor):
    """``graphs.chain.executor.Executor`` over ONNX Runtime, for one prompt at a time or a batch."""

    def __init__(self, bundle: Bundle, options: OrtOptions, batch: int = 1):
        manifest = bundle.manifest
        _check_version(bundle)
        super().__init__(manifest, batch)
        self.returns_new_rows = returns_new_rows(manifest.graphs[manifest.parts_of(0)[0]].spec)
        self.scales = stored_cache_scales(bundle)
        self.threads: int | None = options.threads or cores()
        widened = manifest.dtype == "float16"
        self.prepacked = _prepack(manifest.weight_bytes, widened, options)
        self.sessions = {name: self._load(bundle, name, options) for name in manifest.graphs}
        self.parts = [
            [
                OrtStage(manifest.graphs[name].spec, self.sessions[name])
                for name in manifest.parts_of(index)
            ]
            for index in range(len(self.plan.stages))
        ]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (B, C, H, W) float32 -> visual rows (B, N, D)."""
        with self._timed("vision"):
            return flushed(self.sessions["vision"].run, ["visual_rows"], {"pixels": pixels})[0]

    def append(self, stage, rows, positions, order, slot_order, write_index, gates) -> StageResult:
        """One call of a stage, part after part; contract: ``contract.stage_spec``."""
        count = rows.shape[1]
        feeds = {
            "rows": rows,
            "positions": positions,
            "order": order,
            "slot_order": slot_order,
            "write_index": np.full((self.batch,), write_index, np.int64),
        }
        if gates is not None:
            feeds["gates"] = gates.astype(self.dtype, copy=False)
        caches = self.caches[stage]
        outputs: dict[str, np.ndarray] = {}
        queries = []
        with self._timed(f"stage{stage}"):
            for part in self.parts[stage]:
                outputs |= part.run(feeds, {"B": self.batch, "Q": count})
                feeds["rows"] = outputs["rows.out"]
                queries.append(outputs["queries"])
                if "gates" in feeds:  # each part takes those of its own layers
                    feeds["gates"] = feeds["gates"][part.gated :]
            if self.returns_new_rows:
                for name, cache in caches.items():
                    cache[:, :, write_index : write_index + count] = outputs[appended(name)]
        by_layer = queries[0] if len(queries) == 1 else np.concatenate(queries)
        return StageResult(outputs["rows.out"], by_layer, outputs.get("logits"))

    def select(
        self, edge, probe_query, slot_order, query_order, visual_slots, rows, positions, order
    ) -> Kept:
        """One call of a selection over the last layer's cache of stage ``edge``."""
        key, value = list(self.caches[edge])[-2:]
        feeds = {
            **self.scales[self.plan.stages[edge].layers[1] - 1],
            "probe_query": probe_query,
            "key": self.caches[edge][key],
            "value": self.caches[edge][value],
            "slot_order": slot_order,
            "query_order": query_order,
            "visual_slots": visual_slots,
            "rows": rows,
            "positions": positions,
            "order": order,
        }
        read = {one.name for one in self.sessions[f"select{edge}"].get_inputs()}
        feeds = {n: np.ascontiguousarray(array) for n, array in feeds.items() if n in read}
        with self._timed(f"select{edge}"):
            return Kept(*flushed(self.sessions[f"select{edge}"].run, None, feeds))

    def probe(
        self, stage, layer, query, slot_order, query_order, visual_slots
    ) -> tuple[np.ndarray, np.ndarray]:
        """One probe of a layer of stage ``stage``."""
        feeds = {
            **self.scales[layer],
            "query": query,
            "key": self.caches[stage][f"key.{layer}"],
            "value": self.caches[stage][f"value.{layer}"],
            "slot_order": slot_order,
            "query_order": query_order,
            "visual_slots": visual_slots,
        }
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        with self._timed(PROBE):
            cosine, norm = flushed(self.sessions[PROBE].run, ["cosine", "norm"], feeds)
        return cosine, norm

    def end_profiles(self) -> dict[str, Path]:
        """Stop noting operators; the file of every graph (``OrtOptions.profile``)."""
        return {name: Path(session.end_profiling()) for name, session in self.sessions.items()}

    def close(self) -> None:
        """Drop sessions and buffers."""
        self.parts.clear()
        self.sessions.clear()
        self.caches.clear()
        self.blocks.clear()

    def _moved(self, stage: int) -> None:
        for part in self.parts[stage]:
            part.bind_caches(self.caches[stage], aliased=not self.returns_new_rows)

    def _load(self, bundle: Bundle, name: str, options: OrtOptions) -> ort.InferenceSession:
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
        file = bundle.file(bundle.manifest.graphs[name].file)
        try:
            return flushed(ort.InferenceSession, str(file), session, providers=[CPU_PROVIDER])
        except Exception as error:  # ONNX Runtime's exceptions share no base but this
            raise BundleError(
                f"ONNX Runtime {ort.__version__} cannot load {file}: {error}. "
                "Build the bundle again with this version: make engines MODEL=..."
            ) from error


def version() -> tuple[int, int]:
    """(major, minor) of the installed ONNX Runtime."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def _check_version(bundle: Bundle) -> None:
    if bundle.manifest.lowering != PORTABLE and version() < ORT_LLM_SINCE:
        raise BundleError(
            f"{bundle.path} needs ONNX Runtime {ORT_LLM_SINCE[0]}.{ORT_LLM_SINCE[1]} or newer, "
            f"found {ort.__version__}. Upgrade it, or build for this one: "
            "make engines TARGET=cpu-portable"
        )


def _prepack(weight_bytes: int, widened: bool, options: OrtOptions) -> bool:
    """Whether the weights fit twice (mapped file and rearranged copy).

    Raises:
        CapacityError: they do not even fit once.
    """
    limit = options.memory_limit or psutil.virtual_memory().available
    resident = 2 * weight_bytes if widened else weight_bytes
    if resident > limit and (widened or options.memory_limit is not None):
        why = " in FP32, which is what a CPU computes FP16 graphs in," if widened else ""
        source = "the memory limit is" if options.memory_limit else "this machine has free"
        raise CapacityError(
            f"the weights take {resident / 2**20:.0f} MiB{why} and {source} "
            f"{limit / 2**20:.0f} MiB. "
            + ("Raise --memory-limit" if options.memory_limit else "Use a machine with more")
        )
    return 2 * weight_bytes <= limit
