"""The same measurement with a stock tool: Polygraphy runs every graph or engine by itself.

Here it runs what this machine can run: its ONNX Runtime runner the sessions of a bundle on a CPU,
its TensorRT runner the engines on a GPU. For other machines, a command line is printed:

    polygraphy run stage0.onnx --trt --strongly-typed --trt-min-shapes ... --input-shapes ...

Graphs are strongly typed: their precision is in them, and no flag changes it. Integer inputs get
ranges that stay inside the cache, for a random slot number would write beside it; orders let every
row see every slot, which costs as much as any other mask.

Commands are checked against Polygraphy 0.53.6 (``--gen-script``, in the tests).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata, util
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle, Manifest
from ...graphs.commands import install
from ...graphs.contract import BY_LAYER, GraphSpec
from ...graphs.engine_index import ENGINES_FOLDER, Engines
from ...graphs.engine_spec import Shape, engine_specs_of
from ...graphs.parts import PROJECT, VISION, stage_of
from ...graphs.plan.call_cost import GraphCall
from ...graphs.targets import ONNXRUNTIME, TENSORRT, TENSORRT_RTX, find_target
from ...graphs.vision_contract import TILES
from ...runtime.backends.denormals import flushed
from ...runtime.device.tensorrt import MODULES, find_trt_variant
from .timing import Spread, image_layout, repeated

ITERATIONS, WARM_UP = 50, 10
TIMING = ("--iterations", str(ITERATIONS), "--warm-up", str(WARM_UP), "--sequential-runners")
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1"
"""Environment that makes Polygraphy use TensorRT-RTX."""

SECONDS = 5.0
"""Most time for one graph in one shape; it runs at least twice, the first time to warm up."""


@dataclass(frozen=True)
class PolygraphyRun:
    """A graph or an engine in the shapes of one call.

    Attributes:
        call: its graph in the bundle, rows and slots; 0 where it has none.
        about: graph, shapes and engine in words.
        file: what to run, in the bundle.
        spec: the graph's inputs.
        flags: of ``polygraphy run``.
        shapes: of every input.
        profile: of an engine, the optimisation profile that the shapes are in.
        environment: variable that the command needs, if any.
    """

    call: GraphCall
    about: str
    file: str
    spec: GraphSpec
    flags: tuple[str, ...]
    shapes: Mapping[str, Shape]
    profile: int | None = None
    environment: str = ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command in words, to be typed in the bundle's folder."""
        ranges = [f"{name}:[{low},{high}]" for name, (low, high) in self.ranges.items()]
        return (
            *("polygraphy", "run", self.file, *self.flags),
            *("--input-shapes", *_show_shapes(self.shapes)),
            *("--val-range", *ranges, *TIMING),
        )

    @property
    def text(self) -> str:
        """The line to type."""
        return " ".join([*filter(None, [self.environment]), *map(shlex.quote, self.arguments)])

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Least and largest value of every input: small numbers, and integers that fit."""
        slots = max(self.call.slots, 1)
        rows = self.shapes["rows"][1] if "rows" in self.shapes else 1
        known = {
            **dict.fromkeys(BY_LAYER, (0, 1)),
            "positions": (0, rows - 1),
            "write_index": (0, 0),
            "turns": (0, 1),
            "taps": (0, 1),
            "slots": (0, 1),
            "places": (0, 1),
            "pack": (0, 1),
            "slot_order": (0, 0),
            "visual_slots": (0, slots - 1),
            "order": (slots, slots),
            "query_order": (slots, slots),
        }
        floats, cached = (-1, 1), (-127, 127)
        return {
            tensor.name: known.get(tensor.name, cached if tensor.dtype == "int8" else floats)
            for tensor in self.spec.inputs
        }

    def feeds(self) -> dict[str, np.ndarray]:
        """Draw every input from its range."""
        random, feeds = np.random.default_rng(0), {}
        for tensor in self.spec.inputs:
            name, dtype, shape = tensor.name, tensor.dtype, self.shapes[tensor.name]
            low, high = self.ranges[name]
            if dtype.startswith("float"):
                feeds[name] = random.uniform(low, high, shape).astype(dtype)
            else:
                feeds[name] = random.integers(low, high, shape, dtype, endpoint=True)
        return feeds


def polygraphy_runs(bundle: Bundle, calls: Iterable[GraphCall] = ()) -> list[PolygraphyRun]:
    """Return a run for every engine of a bundle, or for the graphs that ONNX Runtime runs.

    ``calls``: for ONNX Runtime, those whose shapes are wanted; engines have shapes of their own,
    and are compiled from their graphs where they were not yet.
    """
    target = find_target(bundle.manifest.target)
    if target.engines:
        return list(_engine_runs(bundle, RTX if target.backend == TENSORRT_RTX else ""))
    return graph_runs(bundle.manifest, calls)


def graph_runs(manifest: Manifest, calls: Iterable[GraphCall]) -> list[PolygraphyRun]:
    """Return a run in ONNX Runtime for every graph of every call."""
    provider = "cuda" if manifest.target == "cuda" else "cpu"
    layout = image_layout(manifest.config)
    runs = []
    for call in dict.fromkeys(calls):
        for name, fact in manifest.graphs.items():
            # A stage in parts has several graphs, and so has an image that is projected later.
            whole = VISION if name == PROJECT else name.split(".")[0]
            if whole != call.graph:
                continue
            visual = layout.rows
            if name.startswith("select"):
                visual = min(visual, manifest.plan.stages[stage_of(name)].visual_tokens)
            sizes = {"B": 1, "Q": call.rows, "S": call.slots, "N": visual, "T": call.rows}
            sizes[TILES] = layout.tiles
            shapes = {
                i.name: layout.feeds[i.name].shape
                if i.name in layout.feeds
                else tuple(sizes[d] if isinstance(d, str) else d for d in i.shape)
                for i in fact.spec.inputs
            }
            about = f"{name}, {call.rows} rows, {call.slots} slots" if call.slots else name
            own = replace(call, graph=name)
            flags = ("--onnxrt", "--providers", provider)
            runs.append(PolygraphyRun(own, about, fact.file, fact.spec, flags, shapes))
    return runs


def _engine_runs(bundle: Bundle, environment: str) -> Iterator[PolygraphyRun]:
    """Yield a run for every profile of every engine: decoding and prefill."""
    engines = Engines.open(bundle)
    compiled = {engine.name: engine.file for engine in engines.engines} if engines else {}
    for engine in engine_specs_of(bundle.manifest):
        file, flags, what = engine.source, ["--trt", "--strongly-typed"], "compiled first"
        for profile in engine.profiles:
            for which, index in (("min", 0), ("opt", 1), ("max", 2)):
                bounds = {name: shapes[index] for name, shapes in profile.items()}
                flags += [f"--trt-{which}-shapes", *_show_shapes(bounds)]
        if engine.name in compiled:
            file, what = f"{ENGINES_FOLDER}/{compiled[engine.name]}", "its engine"
            flags = ["--trt", "--model-type", "engine"]
        for number, profile in enumerate(engine.profiles):
            likely = {name: shapes[1] for name, shapes in profile.items()}
            rows = likely["rows"][1] if engine.spec.has("Q") else 0
            slots = likely["slot_order"][1] if engine.spec.has("S") else 0
            yield PolygraphyRun(
                GraphCall(engine.graph, rows, slots),
                f"{engine.name}, {rows} rows, {what}" if rows else f"{engine.name}, {what}",
                file,
                engine.spec,
                (*flags, "--optimization-profile", str(number)),
                likely,
                number,
                environment,
            )


def polygraphy_facts(
    bundle: Bundle,
    backend: str,
    call_ms: Mapping[GraphCall, float],
    sessions: Mapping[str, Any],
    repetitions: int,
) -> dict[str, Any]:
    """Run every graph, or every engine, in Polygraphy; return its times as plain data.

    Args:
        bundle: whose graphs or engines.
        backend: that runs the bundle.
        call_ms: calls whose shapes are wanted, with the time that the runtime took for them.
        sessions: of ONNX Runtime by graph, as far as they are loaded; Polygraphy loads others.
        repetitions: of each run, within ``SECONDS``.
    """
    facts: dict[str, Any] = {"version": None, "runner": None, "reason": None, "runs": []}
    if util.find_spec("polygraphy") is None:
        reason = f"polygraphy is not installed. Type: {install('compile')}"
        return facts | {"reason": reason}
    facts["version"] = metadata.version("polygraphy")
    if backend not in (ONNXRUNTIME, TENSORRT, TENSORRT_RTX):
        return facts | {"reason": f"Polygraphy has no runner for {backend}"}
    onnx = backend == ONNXRUNTIME
    facts["runner"] = "OnnxrtRunner" if onnx else "TrtRunner"
    for run in graph_runs(bundle.manifest, call_ms) if onnx else polygraphy_runs(bundle):
        try:
            ms = _latencies(run, _runner(bundle, backend, run, sessions), repetitions)
        except Exception as error:  # Polygraphy's, ONNX Runtime's and TensorRT's share no base
            return facts | {"reason": f"{facts['runner']} failed with {run.about}: {error}"}
        own_ms = call_ms.get(replace(run.call, graph=run.call.graph.split(".")[0]))
        facts["runs"].append({**asdict(run.call), **asdict(Spread.of(ms)), "own_ms": own_ms})
    return facts


def _latencies(run: PolygraphyRun, runner: Any, repetitions: int) -> list[float]:
    """Return milliseconds of some runs after a first one, by Polygraphy's own clock."""
    feeds = run.feeds()

    def infer() -> float:
        flushed(runner.infer, feeds)  # a session that flushes denormals sets its caller to it
        return 1e3 * runner.last_inference_time()

    with runner:
        infer()
        return repeated(infer, repetitions, SECONDS)


def _runner(bundle: Bundle, backend: str, run: PolygraphyRun, sessions: Mapping[str, Any]) -> Any:
    file = str(bundle.path / run.file)  # names were checked when bundle and index were read
    if backend == ONNXRUNTIME:
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

        loaded = sessions.get(run.call.graph)
        return OnnxrtRunner(loaded or SessionFromOnnx(file, providers=["cuda"]))
    from polygraphy import config

    config.USE_TENSORRT_RTX = backend == TENSORRT_RTX  # read when its TensorRT part is imported
    variant = find_trt_variant(backend)
    if variant is not None:  # the RTX wheels bring it under another name than Polygraphy's
        sys.modules.setdefault(MODULES[backend][0], variant.module)
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return TrtRunner(EngineFromBytes(BytesFromPath(file)), optimization_profile=run.profile)


def _show_shapes(shapes: Mapping[str, Shape]) -> list[str]:
    return [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
