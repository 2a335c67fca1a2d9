"""The whole ladder over one bundle: every rung in its order, and what each of them shares.

    files ─ weights, prefix ─ Hugging Face ─ torch stages ─ ONNX Runtime ─ variants ─ engines
                                    float ─┴─ quantised

torch and onnx are imported by the rungs that need them: a machine with the runtime alone climbs
the others, and the report says what it could not.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from .. import __version__, runtime
from ..calib.samples import Sample
from ..graphs.bundle import MANIFEST, Bundle, sha256
from ..graphs.errors import DataError, MissingDependencyError
from ..graphs.targets import ONNXRUNTIME, TENSORRT, TENSORRT_RTX, show_capability
from ..trt.device import find_device
from ..trt.flavour import find
from . import answers, stored
from .compare import LOOSE, bounds_of, strict
from .report import FAILED, Finding, Report, Rung
from .steps import ImpossibleError, NothingError, Step, attempt, refuse

if TYPE_CHECKING:
    from pathlib import Path

    from ..calib.calibration import Calibration
    from ..compile.checkpoint import Checkpoint
    from .chains import Asked, TorchChain
    from .graphs import GraphRungs

DEFAULT_MAX_TOKENS = 16

TORCH = ("torch", "onnx_ir")
"""What the torch rungs import; the next, all that the compiler brings."""

COMPILER = (*TORCH, "onnx", "transformers")

SMALL_BYTES = 256 << 20
"""Weights of a model that one thread is enough for."""

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "onnx", "onnx-ir")
"""Whose versions a report names."""


class Watcher(Protocol):
    """Who is told how a ladder goes."""

    def start(self, step: Step) -> None:
        """A rung is tried."""

    def done(self, rung: Rung) -> None:
        """It is over."""


class Silent:
    """A watcher that tells nobody."""

    def start(self, step: Step) -> None:
        """Nothing."""

    def done(self, rung: Rung) -> None:
        """Nothing."""


def verify(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    model: str | None = None,
    calibration: Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    memory: int | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """Run every rung that this machine can run over the files of ``bundle``.

    Args:
        bundle: nothing of it is believed but that it has a manifest.
        samples: prompts for the rungs of whole answers; at least one.
        model: the checkpoint it was built from, on this machine; None leaves its rungs out.
        calibration: folder of the calibration it rests on; None: the usual one if it is there.
        max_tokens: length of the answers.
        memory: bytes that a rung may take; None: what is free when it begins.
        watcher: told of every rung.

    Raises:
        ModelError: ``model`` cannot be opened, or is not the bundle's.
        DataError: ``calibration`` cannot be read, or is not the bundle's.
        ModuleNotFoundError: ``model`` was given and torch is not there to read it.
    """
    watcher = watcher or Silent()
    origin, known = None, None
    if model is not None:
        from .origin import open_calibration, open_origin

        origin = open_origin(bundle, model)
        known = open_calibration(bundle, calibration)
    elif calibration is not None:
        raise DataError(
            "a calibration is checked together with the checkpoint: --model CHECKPOINT, or leave "
            "--calib out"
        )
    ladder = _Ladder(bundle, samples, origin, known, max_tokens, memory)
    rungs: list[Rung] = []
    with ladder, _few_threads(bundle.manifest.weight_bytes):
        for step in ladder.steps():
            watcher.start(step)
            if rungs and rungs[0].status == FAILED:
                rungs.append(refuse(step, "the files are not those that were built"))
            else:
                rungs.append(ladder.anonymous(attempt(step)))
            watcher.done(rungs[-1])
    manifest = bundle.manifest
    return Report(
        bundle={
            "model": manifest.model,
            "plan": f"{manifest.plan.name} {manifest.plan.hash[:12]}",
            "target": manifest.target,
            "precision": manifest.precision,
            "lowering": manifest.lowering,
            "manifest": f"sha256 {sha256(bundle.path / MANIFEST)[:12]}",
        },
        rungs=tuple(rungs),
        versions=_versions(bundle),
        machine=_machine(),
    )


def _few_threads(weight_bytes: int) -> AbstractContextManager[None]:
    """One thread of torch's while a small model is verified.

    Sharing out its small matrices takes longer than multiplying them, most of all where ONNX
    Runtime, which takes turns with torch, has threads of its own.
    """
    if weight_bytes >= SMALL_BYTES or importlib.util.find_spec("torch") is None:
        return nullcontext()
    from .modules import one_thread

    return one_thread()


class _Ladder:
    """The steps of one run, and what several of them use: made when first used, kept until then."""

    def __init__(
        self,
        bundle: Bundle,
        samples: Sequence[Sample],
        origin: Checkpoint | None,
        calibration: Calibration | None,
        max_tokens: int,
        memory: int | None,
    ):
        self.bundle, self.samples = bundle, samples
        self.origin, self.calibration = origin, calibration
        self.max_tokens, self.memory = max_tokens, memory
        self.graph = lru_cache(maxsize=1)(self._graph)  # one graph's arrays at a time

    def __enter__(self) -> _Ladder:
        return self

    def __exit__(self, *_) -> None:
        if "session" in vars(self):
            self.session.close()

    def steps(self) -> Iterator[Step]:
        """Every rung, the cheap and decisive ones first."""
        bundle, near = self.bundle, "of the reference's spread"
        kinds = self.kinds
        same = "tokens and selections equal"
        tied = f"{same} but for near ties"
        floats = bounds_of([bundle.manifest.dtype])
        strictly, loosely = bounds_of(strict(kinds)), bounds_of(kinds)
        halved = bounds_of({"float16", *strict(kinds)})
        graph, answer = (
            f"errors up to {strictly.graph:g} {near}",
            f"{tied if strictly.tie else same}, logits within {strictly.whole:g} of their spread",
        )
        if self.loose:
            graph += f"; {loosely.graph:g} where ONNX Runtime rounds the inputs"
            answer += f"; {loosely.whole:g} where ONNX Runtime rounds the inputs"
        yield Step(
            "files",
            "the bundle's files and the manifest's hashes",
            "every byte as it was built",
            partial(stored.rehash, bundle),
        )
        yield Step(
            "weights",
            "the checkpoint and the graphs' weights",
            "every bit equal in the bundle's type; integers within half a step",
            self._weights,
            TORCH,
        )
        yield Step(
            "prefix",
            "the checkpoint and the shipped prefix cache",
            f"errors up to {floats.graph:g} {near}",
            self._prefix,
            TORCH,
        )
        yield Step(
            "hugging face",
            "Hugging Face and the torch stages, both unpruned, in FP32",
            f"tokens equal, logits within {bounds_of(['float32']).whole:g} of their spread",
            self._hugging_face,
            COMPILER,
        )
        yield Step(
            "quantisation",
            "the checkpoint's own weights and the rounded ones, both in torch, same plan",
            "logits finite, within their spread in the root mean square",
            self._quantisation,
            TORCH,
        )
        for name in bundle.manifest.graphs:
            yield Step(
                f"graph {name}",
                "the torch stage in FP32 and the file in ONNX Runtime",
                graph,
                partial(self._run_graph, name, half=False),
                TORCH,
            )
            yield Step(
                f"half {name}",
                "the torch stage in FP32 and in FP16 arithmetic",
                f"errors up to {halved.graph:g} {near}, all finite",
                partial(self._run_graph, name, half=True),
                TORCH,
            )
        yield Step(
            "runtime",
            "answers of the runtime: new, from its caches, by a new session",
            "all equal, logits finite",
            partial(answers.repeat, self._load, self.samples, self.max_tokens),
        )
        yield Step(
            "answers",
            "the torch chain in FP32 and the runtime on ONNX Runtime",
            answer,
            self._answers,
            TORCH,
        )
        yield Step(
            "half answers",
            "the torch chain in FP32 and in FP16 arithmetic",
            f"{tied}, logits within {halved.whole:g} of their spread, all finite",
            self._half_answers,
            TORCH,
        )
        yield Step(
            "variants",
            "the graphs for engine compilers and those that ONNX Runtime ran",
            "equal but for fixed sizes and leave to take attention apart",
            self._variants,
            ("onnx", *TORCH),
        )
        yield Step(
            "engines",
            "the engines, their index and the manifest",
            "compiled from this bundle, complete, every byte as it was compiled",
            partial(stored.engine_files, bundle),
        )
        yield Step(
            "engine runs",
            "ONNX Runtime and the engines",
            "errors within the precision's tolerance",
            self._engine_run,
        )

    def anonymous(self, rung: Rung) -> Rung:
        """The rung without this machine's folders in its reason: reports travel."""
        folders = [(self.bundle.path, "BUNDLE")]
        if self.origin is not None:
            folders.append((self.origin.path, "CHECKPOINT"))
        reason = rung.reason
        for folder, name in folders:
            reason = reason.replace(str(folder), name)
        return replace(rung, reason=reason)

    @property
    def free(self) -> int:
        """Bytes that a rung may take now."""
        return self.memory or psutil.virtual_memory().available

    @cached_property
    def session(self) -> runtime.Session:
        """The bundle in the public runtime."""
        return self._load()

    @cached_property
    def asked(self) -> list[Asked]:
        """The samples, preprocessed and tokenised."""
        from .chains import ask

        return ask(self.session, self.samples)

    @cached_property
    def reference(self) -> TorchChain:
        """The torch chain in FP32."""
        from .chains import TorchChain

        return TorchChain.stored(self.bundle, half=False, free=self.free)

    @property
    def kinds(self) -> set[str]:
        """What the bundle's graphs compute in (``compare.BOUNDS``)."""
        manifest = self.bundle.manifest
        return {manifest.dtype, *manifest.quantization.schemes.values()}

    @property
    def loose(self) -> bool:
        """Whether ONNX Runtime rounds more than the graphs do."""
        return bool(self.kinds & set(LOOSE))

    @cached_property
    def original(self) -> TorchChain:
        """The torch chain over the checkpoint's own weights."""
        from .chains import TorchChain

        return TorchChain.original(self.bundle, self._origin(), free=self.free)

    def _load(self) -> runtime.Session:
        return runtime.load(self.bundle.path, backend=ONNXRUNTIME, memory_limit=self.memory)

    def _origin(self) -> Checkpoint:
        if self.origin is None:
            raise ImpossibleError(
                f"no checkpoint of '{self.bundle.manifest.model}' was named: --model CHECKPOINT"
            )
        return self.origin

    def _weights(self) -> Finding:
        from .origin import weights

        return weights(self.bundle, self._origin(), self.calibration)

    def _prefix(self) -> Finding:
        from .origin import prefix

        return prefix(self.bundle, self._origin())

    def _hugging_face(self) -> Finding:
        from .hugging_face import compare_dense

        # Only the checkpoint's own weights are Hugging Face's, too.
        origin = self._origin()
        quantised = bool(self.bundle.manifest.quantization.schemes)
        stages = self.original if quantised else self.reference
        return compare_dense(self.bundle, origin, stages, self.asked, self.max_tokens, self.free)

    def _quantisation(self) -> Finding:
        from .rounding import compare_rounding

        if not self.bundle.manifest.quantization.schemes:
            raise NothingError("every layer is a float one")
        self._origin()
        return compare_rounding(
            self.bundle, self.original, self.reference, self.asked, self.max_tokens
        )

    def _graph(self, name: str) -> GraphRungs:
        from .graphs import GraphRungs
        from .stored_graph import StoredGraph

        return GraphRungs(StoredGraph(self.bundle, name), self.free)

    def _run_graph(self, name: str, *, half: bool) -> Finding:
        self._computes_half(half)
        rungs = self.graph(name)
        return rungs.half() if half else rungs.onnxruntime()

    def _answers(self) -> Finding:
        from .chains import compare_runtime

        def compare(session: runtime.Session, kinds: set[str]) -> Finding:
            bounds = bounds_of(kinds)
            steps = self.max_tokens
            return compare_runtime(self.bundle, self.reference, session, self.asked, steps, bounds)

        found = compare(self.session, self.kinds)
        manifest = self.bundle.manifest
        if found.failure or not self.loose or manifest.dtype == "float16":
            return found  # FP16 graphs are widened on a CPU, never mapped
        # With weights that are mapped nothing is rounded but what the graphs round.
        with runtime.load(
            self.bundle.path, backend=ONNXRUNTIME, memory_limit=manifest.weight_bytes
        ) as mapped:
            exact = compare(mapped, strict(self.kinds))
        facts = {f"mapped weights, {name}": fact for name, fact in exact.facts.items()}
        errors = [replace(one, tensor=f"{one.tensor}, mapped weights") for one in exact.errors]
        return replace(exact, errors=(*found.errors, *errors), facts={**found.facts, **facts})

    def _engine_run(self) -> Finding:
        from .engine_runs import compare_engines

        stored.check_engines_run(self.bundle)

        def load() -> runtime.Session:
            try:
                return runtime.load(self.bundle.path)
            except MissingDependencyError as error:
                raise ImpossibleError(str(error)) from error

        return compare_engines(self.session, load, self.samples, self.max_tokens)

    def _half_answers(self) -> Finding:
        from .chains import TorchChain, compare_half

        self._computes_half(True)
        reference, asked = self.reference, self.asked
        half = TorchChain.stored(self.bundle, half=True, free=self.free)
        bounds = bounds_of({"float16", *strict(self.kinds)})
        return compare_half(self.bundle, reference, half, asked, self.max_tokens, bounds)

    def _variants(self) -> Finding:
        from .variants import compare_variants

        return compare_variants(self.bundle)

    def _computes_half(self, wanted: bool) -> None:
        dtype = self.bundle.manifest.dtype
        if wanted and dtype != "float16":
            raise NothingError(f"the graphs compute in {dtype}")


def _versions(bundle: Bundle) -> dict[str, str]:
    """What ran, and what had built the bundle."""
    found = {"visistage": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for backend in (TENSORRT, TENSORRT_RTX):
        flavour = find(backend)
        if flavour is not None:
            found[backend] = flavour.version
    return found | {f"built with {name}": v for name, v in bundle.manifest.versions.items()}


def _machine() -> dict[str, Any]:
    """Facts of the machine that say what it can do, and not whose it is."""
    device = find_device()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(),
        "memory in GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": f"{device.name} ({show_capability(device.capability)})" if device else "none",
    }
