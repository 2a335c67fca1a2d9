"""Checks of the public runtime against itself: it needs neither torch nor onnx.

An image that is new, one whose rows are cached, one that another image pushed out, and a new
session make no difference to an answer; neither do engines, but for their precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import runtime
from .compare import bounds_of, first_wrong, tensor_error
from .file_checks import require_engines_run
from .verify_report import CheckResult
from .verify_target import VerifyTarget

if TYPE_CHECKING:
    from ...runtime import Answer, Session


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
    """Compare every logit of engines or OpenVINO, along the answers of ONNX Runtime.

    Raises:
        ImpossibleError: this machine cannot run them.
        NothingError: the bundle has no engines.
    """
    require_engines_run(target.bundle)
    graphs, errors = target.session, []
    with runtime.load(target.bundle.path) as engines:
        for sample in target.samples:
            given = (sample.image, sample.prompt)
            tokens = ask(graphs, *given, target.max_tokens).tokens
            got, want = (session.score(*given, tokens[:-1]) for session in (engines, graphs))
            errors.append(tensor_error(sample.name, got, want))
    tolerance = bounds_of(target.kinds).whole
    return CheckResult(
        failure=first_wrong(errors, tolerance),
        errors=tuple(errors),
        facts={"prompts": len(target.samples), "tolerance": tolerance},
    )
