"""The rung that needs the runtime alone: a bundle loads, and answers the same however it is asked.

A picture that is new, one whose rows are kept, one that another picture pushed aside, and a session
of its own must make no difference; logits must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...calib.samples import Sample
from .verify_report import CheckResult

if TYPE_CHECKING:
    from ...runtime import Session


def compare_repeats(
    load: Callable[[], Session], samples: Sequence[Sample], steps: int
) -> CheckResult:
    """Ask every sample twice in one session, and once in another in reverse order.

    Args:
        load: opens the bundle; called twice, one after the other.
        samples: at least one.
        steps: longest answer in tokens.
    """

    def tokens(session: Session, sample: Sample) -> tuple[int, ...]:
        # A checkpoint's own settings may draw at random.
        greedy = replace(session.sampling, temperature=0.0)
        given = (sample.image, sample.prompt)
        return session.infer(*given, max_tokens=steps, sampling=greedy).tokens

    failure = ""
    with load() as session:
        first = [tokens(session, sample) for sample in samples]
        again = [tokens(session, sample) for sample in samples]
        for sample, said in zip(samples, first, strict=True):
            if not np.isfinite(session.score(sample.image, sample.prompt, said[:-1])).all():
                failure = failure or f"{sample.name}: the logits are not finite"
        files = tuple(fact.file for fact in session.bundle.manifest.graphs.values())
    with load() as session:
        alone = [tokens(session, sample) for sample in reversed(samples)][::-1]
    for sample, *answers in zip(samples, first, again, alone, strict=True):
        if len(set(answers)) > 1:
            failure = failure or (
                f"{sample.name}: the answer is {answers[0]}, asked again {answers[1]}, by a new "
                f"session {answers[2]}"
            )
    facts = {"prompts": len(samples), "tokens": sum(map(len, first))}
    return CheckResult(failure, files, facts=facts)
