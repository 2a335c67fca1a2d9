"""Engines that ONNX Runtime runs at the addresses they are given, as strict as real ones.

An engine's file names the graph that it was "compiled" from. A run reads its inputs where they are
bound and writes its outputs where those are bound, when the device comes to it; shapes outside of
the profile, memory that is not alive, scratch that is too small and contexts changed after they
were captured are errors.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from visistage.compile.engines import engines
from visistage.compile.engines.worker_process import CompileOutcome
from visistage.graphs.bundle import MANIFEST, sha256
from visistage.graphs.caches import appended, is_cache
from visistage.graphs.engine_index import ENGINES_FOLDER, ENGINES_INDEX, EngineFact
from visistage.graphs.engine_spec import engine_specs_of
from visistage.graphs.targets import find_target
from visistage.runtime.device import engine_trt
from visistage.runtime.device.engine_ort import OrtApi
from visistage.runtime.device.tensorrt import TensorRtVariant
from visistage.runtime.hardware import GpuInfo
from visistage.tests.support.numpy_device import HostDevice

VERSION = "1.7.1"
GPU = GpuInfo("Stand-in", (8, 6), 8 << 30)
SCRATCH = {"stage0": 4096, "stage1": 8192}


def write_engines(bundle, capabilities=((8, 6),), version=VERSION):
    """Files in place of engines, and an index that is as the compiler's would be."""
    folder = bundle.path / ENGINES_FOLDER
    folder.mkdir(exist_ok=True)
    facts = []
    for engine_spec in engine_specs_of(bundle.manifest):
        text = json.dumps({"source": engine_spec.source, "graph": engine_spec.graph}).encode()
        file = folder / f"{engine_spec.name}.engine"
        file.write_bytes(text)
        facts.append(
            EngineFact(
                name=engine_spec.name,
                graph=engine_spec.graph,
                context=engine_spec.context,
                slots=engine_spec.slots,
                file=file.name,
                nbytes=len(text),
                sha256=hashlib.sha256(text).hexdigest(),
                profiles=[
                    {name: [list(shape) for shape in shapes] for name, shapes in one.items()}
                    for one in engine_spec.profiles
                ],
                layers={},
                precisions={},
                fused_attention=0,
                decomposable_attention=0,
                caches_in_place=0,
                seconds=0.0,
                peak_bytes=0,
                peak_anonymous_bytes=0,
            )
        )
    index = {
        "format": 1,
        "backend": find_target(bundle.manifest.target).backend,
        "version": version,
        "capabilities": capabilities,
        "built_on": "Linux x86_64",
        "bundle": sha256(bundle.path / MANIFEST),
        "engines": [asdict(fact) for fact in facts],
    }
    (folder / ENGINES_INDEX).write_text(json.dumps(index))
    return bundle


@dataclass
class Machine:
    """What ``stand_in`` put in place of GPU and engines."""

    device: HostDevice
    api: "StrictApi"


def stand_in(monkeypatch, *, memory=1 << 40, capturable=True, version=VERSION, gpu=GPU):
    """Make this machine look as if it had a GPU and an engine library."""
    device = HostDevice(memory=memory)
    api = StrictApi(device, capturable)
    module = type("TensorRT", (), {"__version__": version})
    device.stream = 7
    monkeypatch.setattr(engine_trt, "find_gpu", lambda: gpu)
    monkeypatch.setattr(
        engine_trt,
        "find_trt_variant",
        lambda backend: TensorRtVariant(backend, module, True, False),
    )
    monkeypatch.setattr(engine_trt, "CudaDevice", lambda: device)
    monkeypatch.setattr(engine_trt, "TrtApi", lambda trt_variant, stream, kernels: api)
    return Machine(device, api)


def stand_in_compiler(monkeypatch):
    """Make engines of a few bytes where there is no compiler."""
    content = b"engine"
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "layers": {}, "precisions": {}}
    facts |= dict.fromkeys(("fused_attention", "decomposable_attention", "caches_in_place"), 0)
    known = type("ComputeCapability", (), {"SM86": 86, "SM120": 120})
    module = type("TensorRT", (), {"__version__": VERSION, "ComputeCapability": known})

    def run_worker(job, what, log, advance=None):
        Path(job["output"]).write_bytes(content)
        log.write_text("said")
        return CompileOutcome(facts, 0.0, 0, 0)

    for name, stand in {
        "can_compile": lambda target, device: None,
        "load_trt_variant": lambda target: TensorRtVariant(target.backend, module, True, False),
        "run_worker": run_worker,
    }.items():
        monkeypatch.setattr(engines, name, stand)


class StrictApi:
    """``EngineApi``; ``runs`` notes graph, rows (or -1) and profile of every run, in order."""

    def __init__(self, device, capturable=True):
        self.device, self.capturable = device, capturable
        self.ort = OrtApi(submit=device.submit, threads=1)
        self.runs = []
        self.loaded = []
        self.contexts = []
        self.closed = False

    def load(self, compiled):
        source = json.loads(compiled.file.read_text())["source"]
        graph = replace(compiled, file=compiled.file.parents[1] / source)
        self.loaded.append(compiled.file.name)
        return StrictEngine(self, compiled, self.ort.load(graph))

    def close(self):
        self.closed = True


class StrictEngine:
    def __init__(self, api, compiled, engine):
        self.api, self.compiled, self.engine = api, compiled, engine
        self.scratch_bytes = SCRATCH.get(compiled.graph, 1024)

    def context(self, profile, scratch, *, replayed=False):
        assert 0 <= profile < len(self.compiled.profiles)
        assert scratch is not None
        assert scratch.nbytes >= self.scratch_bytes
        context = StrictContext(self, profile, scratch, replayed)
        self.api.contexts.append(context)
        return context


class StrictContext:
    def __init__(self, engine, profile, scratch, replayed):
        self.engine, self.profile, self.replayed = engine, profile, replayed
        self.scratch = (scratch.address, scratch.nbytes)
        self.context = engine.engine.context(profile, scratch)
        self.bound = {}
        self.captured = False
        self.enqueued = 0

    @property
    def capturable(self):
        return self.engine.api.capturable

    def bind(self, name, shape, address):
        assert not self.captured, "a captured context must not change"
        assert address % 256 == 0
        limits = self.engine.compiled.profiles[self.profile].get(name)
        if limits is not None:
            low, high = limits
            assert all(a <= n <= b for n, a, b in zip(shape, low, high, strict=True)), (name, shape)
        self.bound[name] = (shape, address)
        self.context.bind(name, shape, address)

    def enqueue(self):
        api, compiled = self.engine.api, self.engine.compiled
        names = {one.name for one in (*compiled.spec.inputs, *compiled.spec.outputs)}
        assert set(self.bound) == names
        for one in compiled.spec.outputs:  # updated in place where the contract says so
            for source in compiled.spec.inputs:
                if appended(source.name) == one.name and source.shape == one.shape:
                    same = self.bound[one.name][1] == self.bound[source.name][1]
                    assert same == is_cache(source.name)
        bound = dict(self.bound)
        if api.device.captured is not None:
            assert self.replayed, "kernels for any shapes would stay in the graph"
            assert self.enqueued, "an engine settles what it left for later in its first run"
            self.captured = True
        self.enqueued += 1
        rows = bound["rows"][0][1] if "rows" in bound else -1
        dtypes = {
            o.name: np.dtype(o.dtype) for o in (*compiled.spec.inputs, *compiled.spec.outputs)
        }

        def check():
            for name, (shape, address) in bound.items():
                api.device.bytes(address, int(np.prod(shape)) * dtypes[name].itemsize)
            api.device.bytes(*self.scratch)
            api.runs.append((compiled.graph, rows, self.profile))

        api.device.submit("check", check)
        self.context.enqueue()
