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
from .check_steps import Check, ImpossibleError, NothingError
from .compare import bounds_of, strict
from .verify_report import CheckResult
from .verify_target import VerifyTarget

TORCH = ("torch", "onnx_ir")
"""What the torch rungs import; the next, all that the compiler brings."""

COMPILER = (*TORCH, "onnx", "transformers")


def checks(target: VerifyTarget) -> Iterator[Check]:
    """Every rung, the cheap and decisive ones first."""
    bundle, near = target.bundle, "of the reference's spread"
    kinds = target.kinds
    same = "tokens and selections equal"
    tied = f"{same} but for near ties"
    floats = bounds_of([bundle.manifest.dtype])
    strictly, loosely = bounds_of(strict(kinds)), bounds_of(kinds)
    halved = bounds_of({"float16", *strict(kinds)})
    graph, answer = (
        f"errors up to {strictly.graph:g} {near}",
        f"{tied if strictly.tie else same}, logits within {strictly.whole:g} of their spread",
    )
    if target.loose:
        graph += f"; {loosely.graph:g} where ONNX Runtime rounds the inputs"
        answer += f"; {loosely.whole:g} where ONNX Runtime rounds the inputs"
    yield Check(
        "files",
        "the bundle's files and the manifest's hashes",
        "every byte as it was built",
        partial(stored.rehash, bundle),
    )
    yield Check(
        "weights",
        "the checkpoint and the graphs' weights",
        "every bit equal in the bundle's type; integers within half a step",
        partial(_weights, target),
        TORCH,
    )
    yield Check(
        "prefix",
        "the checkpoint and the shipped prefix cache",
        f"errors up to {floats.graph:g} {near}",
        partial(_prefix, target),
        TORCH,
    )
    yield Check(
        "hugging face",
        "Hugging Face and the torch stages, both unpruned, in FP32",
        f"tokens equal, logits within {bounds_of(['float32']).whole:g} of their spread",
        partial(_hugging_face, target),
        COMPILER,
    )
    yield Check(
        "quantisation",
        "the checkpoint's own weights and the rounded ones, both in torch, same plan",
        "logits finite, within their spread in the root mean square",
        partial(_quantisation, target),
        TORCH,
    )
    for name in bundle.manifest.graphs:
        yield Check(
            f"graph {name}",
            "the torch stage in FP32 and the file in ONNX Runtime",
            graph,
            partial(_run_graph, target, name, half=False),
            TORCH,
        )
        yield Check(
            f"half {name}",
            "the torch stage in FP32 and in FP16 arithmetic",
            f"errors up to {halved.graph:g} {near}, all finite",
            partial(_run_graph, target, name, half=True),
            TORCH,
        )
    yield Check(
        "runtime",
        "answers of the runtime: new, from its caches, by a new session",
        "all equal, logits finite",
        partial(answers.compare_repeats, target.load, target.samples, target.max_tokens),
    )
    yield Check(
        "answers",
        "the torch chain in FP32 and the runtime on ONNX Runtime",
        answer,
        partial(_answers, target),
        TORCH,
    )
    yield Check(
        "half answers",
        "the torch chain in FP32 and in FP16 arithmetic",
        f"{tied}, logits within {halved.whole:g} of their spread, all finite",
        partial(_half_answers, target),
        TORCH,
    )
    yield Check(
        "variants",
        "the graphs for engine compilers and those that ONNX Runtime ran",
        "equal but for fixed sizes and leave to take attention apart",
        partial(_variants, target),
        ("onnx", *TORCH),
    )
    yield Check(
        "engines",
        "the engines, their index and the manifest",
        "compiled from this bundle, complete, every byte as it was compiled",
        partial(stored.engine_files, bundle),
    )
    yield Check(
        "engine runs",
        "ONNX Runtime, and the engines or OpenVINO",
        "errors within the precision's tolerance",
        partial(_engine_run, target),
    )


def _weights(target: VerifyTarget) -> CheckResult:
    from .origin import weights

    return weights(target.bundle, target.required_origin(), target.calibration)


def _prefix(target: VerifyTarget) -> CheckResult:
    from .origin import prefix

    return prefix(target.bundle, target.required_origin())


def _hugging_face(target: VerifyTarget) -> CheckResult:
    from .hugging_face import compare_dense

    # Only the checkpoint's own weights are Hugging Face's, too.
    origin = target.required_origin()
    quantised = target.bundle.manifest.quantization.quantises
    stages = target.original if quantised else target.reference
    return compare_dense(
        target.bundle, origin, stages, target.asked, target.max_tokens, target.free
    )


def _quantisation(target: VerifyTarget) -> CheckResult:
    from .rounding_cost import compare_quantised

    if not target.bundle.manifest.quantization.quantises:
        raise NothingError("every layer and every cache is a float one")
    target.required_origin()
    return compare_quantised(
        target.bundle, target.original, target.reference, target.asked, target.max_tokens
    )


def _run_graph(target: VerifyTarget, name: str, *, half: bool) -> CheckResult:
    if half:
        target.require_half()
    graph_checks = target.graph(name)
    return graph_checks.half() if half else graph_checks.onnxruntime()


def _answers(target: VerifyTarget) -> CheckResult:
    from .chains import compare_runtime

    def compare(session: runtime.Session, kinds: set[str]) -> CheckResult:
        bounds = bounds_of(kinds)
        steps = target.max_tokens
        return compare_runtime(
            target.bundle, target.reference, session, target.asked, steps, bounds
        )

    found = compare(target.session, target.kinds)
    manifest = target.bundle.manifest
    if found.failure or not target.loose or manifest.dtype == "float16":
        return found  # FP16 graphs are widened on a CPU, never mapped
    # With weights that are mapped nothing is rounded but what the graphs round.
    with runtime.load(
        target.bundle.path, backend=ONNXRUNTIME, memory_limit=manifest.weight_bytes
    ) as mapped:
        exact = compare(mapped, strict(target.kinds))
    facts = {f"mapped weights, {name}": fact for name, fact in exact.facts.items()}
    errors = [replace(one, tensor=f"{one.tensor}, mapped weights") for one in exact.errors]
    return replace(exact, errors=(*found.errors, *errors), facts={**found.facts, **facts})


def _half_answers(target: VerifyTarget) -> CheckResult:
    from .chains import TorchChain, compare_half

    target.require_half()
    reference, asked = target.reference, target.asked
    half = TorchChain.stored(target.bundle, half=True, free=target.free)
    bounds = bounds_of({"float16", *strict(target.kinds)})
    return compare_half(target.bundle, reference, half, asked, target.max_tokens, bounds)


def _variants(target: VerifyTarget) -> CheckResult:
    from .variants import compare_variants

    return compare_variants(target.bundle)


def _engine_run(target: VerifyTarget) -> CheckResult:
    from .engine_runs import compare_engines

    stored.check_engines_run(target.bundle)

    def load() -> runtime.Session:
        try:
            return runtime.load(target.bundle.path)
        except MissingDependencyError as error:
            raise ImpossibleError(str(error)) from error

    return compare_engines(target.session, load, target.samples, target.max_tokens)
