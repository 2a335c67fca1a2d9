"""Every rung, in the order in which a ladder climbs them: what it compares, and when it passes.

    files ─ weights, prefix ─ Hugging Face ─ torch stages ─ ONNX Runtime ─ variants ─ engines
                                    float ─┴─ quantised

torch and onnx are imported by the rungs that need them: a machine with the runtime alone climbs
the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from ... import runtime
from ...graphs.errors import MissingDependencyError
from ...graphs.targets import ONNXRUNTIME
from . import answer_checks as answers
from . import stored
from .check_steps import ImpossibleError, NothingError, Step
from .compare import bounds_of, strict
from .verify_report import Finding
from .verify_target import Subject

TORCH = ("torch", "onnx_ir")
"""What the torch rungs import; the next, all that the compiler brings."""

COMPILER = (*TORCH, "onnx", "transformers")


def rungs(subject: Subject) -> Iterator[Step]:
    """Every rung, the cheap and decisive ones first."""
    bundle, near = subject.bundle, "of the reference's spread"
    kinds = subject.kinds
    same = "tokens and selections equal"
    tied = f"{same} but for near ties"
    floats = bounds_of([bundle.manifest.dtype])
    strictly, loosely = bounds_of(strict(kinds)), bounds_of(kinds)
    halved = bounds_of({"float16", *strict(kinds)})
    graph, answer = (
        f"errors up to {strictly.graph:g} {near}",
        f"{tied if strictly.tie else same}, logits within {strictly.whole:g} of their spread",
    )
    if subject.loose:
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
        partial(_weights, subject),
        TORCH,
    )
    yield Step(
        "prefix",
        "the checkpoint and the shipped prefix cache",
        f"errors up to {floats.graph:g} {near}",
        partial(_prefix, subject),
        TORCH,
    )
    yield Step(
        "hugging face",
        "Hugging Face and the torch stages, both unpruned, in FP32",
        f"tokens equal, logits within {bounds_of(['float32']).whole:g} of their spread",
        partial(_hugging_face, subject),
        COMPILER,
    )
    yield Step(
        "quantisation",
        "the checkpoint's own weights and the rounded ones, both in torch, same plan",
        "logits finite, within their spread in the root mean square",
        partial(_quantisation, subject),
        TORCH,
    )
    for name in bundle.manifest.graphs:
        yield Step(
            f"graph {name}",
            "the torch stage in FP32 and the file in ONNX Runtime",
            graph,
            partial(_run_graph, subject, name, half=False),
            TORCH,
        )
        yield Step(
            f"half {name}",
            "the torch stage in FP32 and in FP16 arithmetic",
            f"errors up to {halved.graph:g} {near}, all finite",
            partial(_run_graph, subject, name, half=True),
            TORCH,
        )
    yield Step(
        "runtime",
        "answers of the runtime: new, from its caches, by a new session",
        "all equal, logits finite",
        partial(answers.repeat, subject.load, subject.samples, subject.max_tokens),
    )
    yield Step(
        "answers",
        "the torch chain in FP32 and the runtime on ONNX Runtime",
        answer,
        partial(_answers, subject),
        TORCH,
    )
    yield Step(
        "half answers",
        "the torch chain in FP32 and in FP16 arithmetic",
        f"{tied}, logits within {halved.whole:g} of their spread, all finite",
        partial(_half_answers, subject),
        TORCH,
    )
    yield Step(
        "variants",
        "the graphs for engine compilers and those that ONNX Runtime ran",
        "equal but for fixed sizes and leave to take attention apart",
        partial(_variants, subject),
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
        "ONNX Runtime, and the engines or OpenVINO",
        "errors within the precision's tolerance",
        partial(_engine_run, subject),
    )


def _weights(subject: Subject) -> Finding:
    from .origin import weights

    return weights(subject.bundle, subject.required_origin(), subject.calibration)


def _prefix(subject: Subject) -> Finding:
    from .origin import prefix

    return prefix(subject.bundle, subject.required_origin())


def _hugging_face(subject: Subject) -> Finding:
    from .hugging_face import compare_dense

    # Only the checkpoint's own weights are Hugging Face's, too.
    origin = subject.required_origin()
    quantised = subject.bundle.manifest.quantization.rounds
    stages = subject.original if quantised else subject.reference
    return compare_dense(
        subject.bundle, origin, stages, subject.asked, subject.max_tokens, subject.free
    )


def _quantisation(subject: Subject) -> Finding:
    from .rounding_cost import compare_rounding

    if not subject.bundle.manifest.quantization.rounds:
        raise NothingError("every layer and every cache is a float one")
    subject.required_origin()
    return compare_rounding(
        subject.bundle, subject.original, subject.reference, subject.asked, subject.max_tokens
    )


def _run_graph(subject: Subject, name: str, *, half: bool) -> Finding:
    if half:
        subject.require_half()
    rungs = subject.graph(name)
    return rungs.half() if half else rungs.onnxruntime()


def _answers(subject: Subject) -> Finding:
    from .chains import compare_runtime

    def compare(session: runtime.Session, kinds: set[str]) -> Finding:
        bounds = bounds_of(kinds)
        steps = subject.max_tokens
        return compare_runtime(
            subject.bundle, subject.reference, session, subject.asked, steps, bounds
        )

    found = compare(subject.session, subject.kinds)
    manifest = subject.bundle.manifest
    if found.failure or not subject.loose or manifest.dtype == "float16":
        return found  # FP16 graphs are widened on a CPU, never mapped
    # With weights that are mapped nothing is rounded but what the graphs round.
    with runtime.load(
        subject.bundle.path, backend=ONNXRUNTIME, memory_limit=manifest.weight_bytes
    ) as mapped:
        exact = compare(mapped, strict(subject.kinds))
    facts = {f"mapped weights, {name}": fact for name, fact in exact.facts.items()}
    errors = [replace(one, tensor=f"{one.tensor}, mapped weights") for one in exact.errors]
    return replace(exact, errors=(*found.errors, *errors), facts={**found.facts, **facts})


def _half_answers(subject: Subject) -> Finding:
    from .chains import TorchChain, compare_half

    subject.require_half()
    reference, asked = subject.reference, subject.asked
    half = TorchChain.stored(subject.bundle, half=True, free=subject.free)
    bounds = bounds_of({"float16", *strict(subject.kinds)})
    return compare_half(subject.bundle, reference, half, asked, subject.max_tokens, bounds)


def _variants(subject: Subject) -> Finding:
    from .variants import compare_variants

    return compare_variants(subject.bundle)


def _engine_run(subject: Subject) -> Finding:
    from .engine_runs import compare_engines

    stored.check_engines_run(subject.bundle)

    def load() -> runtime.Session:
        try:
            return runtime.load(subject.bundle.path)
        except MissingDependencyError as error:
            raise ImpossibleError(str(error)) from error

    return compare_engines(subject.session, load, subject.samples, subject.max_tokens)
