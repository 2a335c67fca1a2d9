"""The whole ladder over one bundle: every rung in its order, and what each of them shares.

    files ─ weights, prefix ─ Hugging Face ─ torch stages ─ ONNX Runtime ─ variants ─ engines

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
from ..graphs.errors import MissingDependencyError
from ..graphs.targets import ONNXRUNTIME, TENSORRT, TENSORRT_RTX, show_capability
from ..trt.device import find_device
from ..trt.flavour import find
from . import answers, stored
from .compare import TOLERANCE, WHOLE_TOLERANCE
from .report import FAILED, Finding, Report, Rung
from .steps import ImpossibleError, NothingError, Step, attempt, refuse

if TYPE_CHECKING:
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
    max_tokens: int = DEFAULT_MAX_TOKENS,
    memory: int | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """Run every rung that this machine can run over the files of ``bundle``.

    Args:
        bundle: nothing of it is believed but that it has a manifest.
        samples: prompts for the rungs of whole answers; at least one.
        model: the checkpoint it was built from, on this machine; None leaves its rungs out.
        max_tokens: length of the answers.
        memory: bytes that a rung may take; None: what is free when it begins.
        watcher: told of every rung.

    Raises:
        ModelError: ``model`` cannot be opened, or is not the bundle's.
        ModuleNotFoundError: ``model`` was given and torch is not there to read it.
    """
    watcher = watcher or Silent()
    origin = None
    if model is not None:
        from .origin import open_origin

        origin = open_origin(bundle, model)
    ladder = _Ladder(bundle, samples, origin, max_tokens, memory)
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
        max_tokens: int,
        memory: int | None,
    ):
        self.bundle, self.samples, self.origin = bundle, samples, origin
        self.max_tokens, self.memory = max_tokens, memory
        self.graph = lru_cache(maxsize=1)(self._graph)  # one graph's arrays at a time

    def __enter__(self) -> _Ladder:
        return self

    def __exit__(self, *_) -> None:
        if "session" in vars(self):
            self.session.close()

    def steps(self) -> Iterator[Step]:
        """Every rung, the cheap and decisive ones first."""
        bundle, precision = self.bundle, self.bundle.manifest.precision
        near = f"errors up to {TOLERANCE[precision]:g} of the reference's spread"
        nearly = f"errors up to {TOLERANCE['fp16']:g} of the reference's spread, all finite"
        whole, loose = (f"logits within {WHOLE_TOLERANCE[p]:g}" for p in (precision, "fp16"))
        tokens = (
            "tokens and selections equal"
            if precision == "fp32"
            else "tokens and selections equal but for near ties"
        )
        yield Step(
            "files",
            "the bundle's files and the manifest's hashes",
            "every byte as it was built",
            partial(stored.rehash, bundle),
        )
        yield Step(
            "weights",
            "the checkpoint and the graphs' weights",
            "every bit equal after rounding to the bundle's precision",
            self._weights,
            TORCH,
        )
        yield Step(
            "prefix", "the checkpoint and the shipped prefix cache", near, self._prefix, TORCH
        )
        yield Step(
            "hugging face",
            "Hugging Face and the torch stages, both unpruned, in FP32",
            f"tokens equal, logits within {WHOLE_TOLERANCE['fp32']:g} of their spread",
            self._hugging_face,
            COMPILER,
        )
        for name in bundle.manifest.graphs:
            yield Step(
                f"graph {name}",
                "the torch stage in FP32 and the file in ONNX Runtime",
                near,
                partial(self._run_graph, name, half=False),
                TORCH,
            )
            yield Step(
                f"half {name}",
                "the torch stage in FP32 and in FP16 arithmetic",
                nearly,
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
            f"{tokens}, {whole} of their spread",
            self._answers,
            TORCH,
        )
        yield Step(
            "half answers",
            "the torch chain in FP32 and in FP16 arithmetic",
            f"tokens and selections equal but for near ties, {loose} of their spread, all finite",
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

        return TorchChain(self.bundle, half=False, free=self.free)

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

        return weights(self.bundle, self._origin())

    def _prefix(self) -> Finding:
        from .origin import prefix

        return prefix(self.bundle, self._origin())

    def _hugging_face(self) -> Finding:
        from .hugging_face import compare_dense

        return compare_dense(
            self.bundle, self._origin(), self.reference, self.asked, self.max_tokens, self.free
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

        return compare_runtime(
            self.bundle, self.reference, self.session, self.asked, self.max_tokens
        )

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
        half = TorchChain(self.bundle, half=True, free=self.free)
        return compare_half(self.bundle, reference, half, asked, self.max_tokens)

    def _variants(self) -> Finding:
        from .variants import compare_variants

        return compare_variants(self.bundle)

    def _computes_half(self, wanted: bool) -> None:
        precision = self.bundle.manifest.precision
        if wanted and precision != "fp16":
            raise NothingError(f"the bundle computes in {precision}")


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
