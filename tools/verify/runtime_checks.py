"""Checks that need the runtime alone, neither torch nor onnx.

Files and engines are those that were built. An image that is new, one whose rows are cached, one
that another image pushed out, and a new session make no difference to an answer; neither do
engines, but for their precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import runtime
from ...graphs.bundle import Bundle
from ...graphs.commands import visistage
from ...graphs.engine_index import Engines
from ...graphs.engine_spec import engine_specs_of
from ...graphs.errors import EngineError
from ...graphs.targets import OPENVINO, find_target
from ...runtime.device.engine_trt import check_machine
from ...runtime.device.tensorrt import find_trt_variant
from ...runtime.hardware import find_gpu
from .compare import bounds_of, first_wrong, tensor_error
from .verify_report import CheckResult, ImpossibleError, NothingError
from .verify_target import VerifyTarget

if TYPE_CHECKING:
    from ...runtime import Answer, Session


def check_files(target: VerifyTarget) -> CheckResult:
    """Hash every file, and make sure that the manifest has a hash of every file that it uses."""
    manifest = target.bundle.manifest
    target.bundle.check(rehash=True)
    return CheckResult(
        files=tuple(manifest.files),
        facts={
            "hashed": len(manifest.files),
            "bytes": sum(fact.nbytes for fact in manifest.files.values()),
        },
    )


def check_engines(target: VerifyTarget) -> CheckResult:
    """Make sure that all engines of this very bundle are there and unchanged."""
    engines = _engines(target.bundle)
    engines.check(rehash=True)
    sources = {spec.name: spec.source for spec in engine_specs_of(target.bundle.manifest)}
    folder = engines.folder.name
    return CheckResult(
        files=tuple(f"{folder}/{engine.file}" for engine in engines.engines),
        facts={
            "compiled by": f"{engines.backend} {engines.version}",
            "compiled for": engines.gpus(),
            "compiled from": {f"{folder}/{name}.engine": file for name, file in sources.items()},
            "bytes": sum(engine.nbytes for engine in engines.engines),
        },
    )


def ask(session: Session, image: Any, prompt: str, steps: int) -> Answer:
    """Answer greedily: a checkpoint's own settings may draw at random, or punish repetition."""
    greedy = replace(session.sampling, temperature=0.0, repetition_penalty=1.0)
    return session.infer(image, prompt, max_tokens=steps, sampling=greedy)


def compare_repeats(target: VerifyTarget) -> CheckResult:
    """Ask every sample twice in one session, and once in another in reverse order."""
    samples, steps = target.samples, target.max_tokens
    failure = ""
    with target.load() as session:
        first, again = (
            [ask(session, sample.image, sample.prompt, steps).tokens for sample in samples]
            for _ in range(2)
        )
        for sample, tokens in zip(samples, first, strict=True):
            if not np.isfinite(session.score(sample.image, sample.prompt, tokens[:-1])).all():
                failure = failure or f"{sample.name}: the logits are not finite"
    with target.load() as session:
        alone = [ask(session, s.image, s.prompt, steps).tokens for s in reversed(samples)][::-1]
    for sample, *answers in zip(samples, first, again, alone, strict=True):
        if len(set(answers)) > 1:
            failure = failure or (
                f"{sample.name}: the answer is {answers[0]}, asked again {answers[1]}, by a new "
                f"session {answers[2]}"
            )
    facts = {"prompts": len(samples), "tokens": sum(map(len, first))}
    return CheckResult(failure, target.files, facts=facts)


def compare_engines(target: VerifyTarget) -> CheckResult:
    """Compare every logit of engines or OpenVINO, along the answers of ONNX Runtime."""
    require_engines_run(target.bundle)
    graphs, errors, bounds = target.session, [], bounds_of(target.kinds)
    with runtime.load(target.bundle.path) as engines:
        for sample in target.samples:
            given = (sample.image, sample.prompt)
            tokens = ask(graphs, *given, target.max_tokens).tokens
            got, want = (session.score(*given, tokens[:-1]) for session in (engines, graphs))
            errors.append(tensor_error(sample.name, got, want, share=bounds.share))
    return CheckResult(
        failure=first_wrong(errors, bounds.whole),
        errors=tuple(errors),
        facts={"prompts": len(target.samples), "tolerance": bounds.whole},
    )


def require_engines_run(bundle: Bundle) -> None:
    """Make sure that this machine can run the bundle's engines; OpenVINO compiles none.

    Raises:
        ImpossibleError: it cannot; says why.
        NothingError: the bundle has no engines.
    """
    if find_target(bundle.manifest.target).backend == OPENVINO:
        return
    engines = _engines(bundle)
    try:
        check_machine(engines, find_trt_variant(engines.backend), find_gpu())
    except EngineError as error:
        raise ImpossibleError(str(error)) from error


def _engines(bundle: Bundle) -> Engines:
    target = find_target(bundle.manifest.target)
    if not target.engines:
        raise NothingError(f"target '{target.name}' runs graphs as they are, without engines")
    engines = Engines.open(bundle)
    if engines is None:
        raise NothingError(
            f"no engines were compiled yet for target '{target.name}'. On the machine that is to "
            f"run them: {visistage('build', bundle.path.name)}"
        )
    return engines
