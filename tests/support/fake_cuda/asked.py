"""Calls that a bundle for target ``cuda`` makes of CUDA, as JSON on stdout.

    FAKE_CUDA_LOG=FILE LD_LIBRARY_PATH=FOLDER python asked.py BUNDLE [capture]

Python is one with onnxruntime-gpu and cuda-core, FOLDER holds the libraries of ``build``. Numbers
mean nothing: kernels do not run.
"""

import json
import os
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from visistage.runtime.backends.onnx_runtime import ort
from visistage.runtime.device.engine_ort import OrtApi
from visistage.runtime.session import load

LOG = Path(os.environ["FAKE_CUDA_LOG"])
MARK = "#### "
STEPS = 3
PROBES = 50


def mark(name: str) -> None:
    """Note that a section begins."""
    with LOG.open("a") as file:
        print(MARK + name, file=file)


def sections() -> dict[str, list[str]]:
    """Lines of the log, by section."""
    found, name = {"start": []}, "start"
    for line in LOG.read_text().splitlines():
        if line.startswith(MARK):
            name = line.removeprefix(MARK)
            found[name] = []
        else:
            found[name].append(line)
    return found


def placed_by_copies(folder: Path) -> list[str]:
    """Graphs in which ONNX Runtime put nodes that copy between host and device."""
    marks = (b"MemcpyToHost", b"MemcpyFromHost")
    return sorted(f.name for f in folder.iterdir() if any(m in f.read_bytes() for m in marks))


def noting(folder: Path) -> None:
    """Have every graph written to ``folder`` as it is run."""
    real = OrtApi.load

    def noted(self, compiled):
        self.options.optimized_model_filepath = str(folder / compiled.graph)
        return real(self, compiled)

    OrtApi.load = noted


def probe(session) -> int:
    """Ask about ever new numbers of visual tokens; return how many contexts that took."""
    executor = session.executor
    stage = executor.engine_set.stages[0]
    heads, width = next(
        spec.shape[2:] for spec in stage.parts[0].spec.outputs if spec.name == "queries"
    )
    query = np.zeros((1, heads, width), stage.dtype)
    order = np.zeros((1, stage.slots), np.int32)
    for count in range(1, PROBES + 1):
        slots = np.arange(count, dtype=np.int64)[None]
        executor.probe(0, 0, query, order, np.zeros(1, np.int32), slots)
    return len(executor.engine_set.calls["probe"]._contexts)


def elsewhere(session, picture) -> list[str]:
    """Ask, read and drop in another thread; return errors."""
    errors = []

    def ask() -> None:
        try:
            memory = session.executor.memory
            array = memory.empty((4, 4), np.float32)
            np.asarray(array)
            del array
            session.infer(picture, "And in here?", max_tokens=2)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return errors


def main(bundle: Path, *, capture: bool) -> dict:
    """Ask a bundle, and return what it asked of CUDA."""
    ort.preload_dlls = lambda: None  # the real ones would come first
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    with TemporaryDirectory() as folder:
        noting(Path(folder))
        with load(bundle, capture=capture) as session:
            session.eos = frozenset()
            mark("cold")
            session.infer(picture, "What is it?", max_tokens=8)
            for step in range(STEPS):
                mark(f"step {step}")
                session.context.decode(5)
            mark("after")
            facts = {"stream": f"{session.executor.device.stream:#x}"}
            stages = session.executor.engine_set.stages
            facts["refused"] = [stage.rejected for stage in stages]
            facts["captured"] = [stage.replays[1].graph is not None for stage in stages]
            facts["errors"] = elsewhere(session, picture)
            facts["contexts"] = probe(session) if session.bundle.manifest.plan.probe else 0
        facts["memcpy"] = placed_by_copies(Path(folder))
    return facts | {"sections": sections()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), capture="capture" in sys.argv[2:])))
