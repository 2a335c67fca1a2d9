"""Accuracy and speed of a bundle over samples with known answers.

An answer is right if it is equal after ``samples.normalise_answer``: case, punctuation and spacing
do not count, every word does. Samples are asked through the public runtime API only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graphs.errors import ImageError, PromptError, VisistageError
from ..graphs.progress import Advance, no_advance
from ..runtime.image.image import load_image
from .answer_file import AnswerFile, Heard
from .samples import Sample, normalise_answer, reject_unreadable

if TYPE_CHECKING:
    from ..runtime import Answer, Session

UNTYPED = "untyped"
EVALUATE_MAX_TOKENS = 32

Refused = tuple[str, str]
"""A sample's name, and why it cannot be asked."""

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Share:
    """``right`` of ``total``, with a 95 % interval."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """0 to 1; 1 where there was nothing to count."""
        return self.right / self.total if self.total else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %; [0, 1] where there was nothing to count.

        Tokens of one answer are not independent of each other, so theirs is somewhat too narrow.

        Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
        """
        if not self.total:
            return 0.0, 1.0
        square = Z95**2 / self.total
        centre = (self.share + square / 2) / (1 + square)
        spread = self.share * (1 - self.share) / self.total + square / (4 * self.total)
        half = Z95 * math.sqrt(spread) / (1 + square)
        # Nothing wrong means an upper end of 1, rounding or not.
        low = 0.0 if self.right == 0 else centre - half
        high = 1.0 if self.right == self.total else centre + half
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        low, high = self.interval
        return {**vars(self), "share": self.share, "low": low, "high": high}


@dataclass(frozen=True)
class Miss:
    """A question that was answered otherwise than expected."""

    name: str
    prompt: str
    expected: str
    given: str


@dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation.

    unreadable: (sample, reason) of those that could not be asked; they are in no count.
    per_token_ms: mean over the answers that have a second token; None where none has.
    """

    overall: Share
    by_type: dict[str, Share]
    misses: tuple[Miss, ...]
    unreadable: tuple[tuple[str, str], ...]
    first_token_ms: float
    per_token_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""

        def count(share: Share) -> dict[str, Any]:
            return {**vars(share), "accuracy": share.share}

        return {
            **count(self.overall),
            "by_type": {name: count(share) for name, share in self.by_type.items()},
            "misses": [vars(miss) for miss in self.misses],
            "unreadable": [{"sample": name, "reason": why} for name, why in self.unreadable],
            "first_token_ms": self.first_token_ms,
            "per_token_ms": self.per_token_ms,
        }


def evaluate(
    session: Session,
    samples: Iterable[Sample],
    *,
    max_tokens: int = EVALUATE_MAX_TOKENS,
    advance: Advance = no_advance,
    heard: Callable[[Answer], None] = lambda answer: None,
    kept: AnswerFile | None = None,
    unreadable: Sequence[Refused] = (),
) -> EvaluationReport:
    """Ask every sample once, greedily, and compare.

    Args:
        session: a loaded bundle.
        samples: asked in their order.
        max_tokens: longest answer; what is longer is cut, and then seldom right.
        advance: called before each sample.
        heard: called with each answer that is new.
        kept: answers of earlier runs, which are not asked for again; gets those of this one.
        unreadable: samples that ``check_samples`` refused.

    Raises:
        DataError: no sample could be asked.
    """
    asked: list[tuple[Sample, Heard]] = []
    unreadable = list(unreadable)
    # A checkpoint's own settings may draw at random; two evaluations must agree.
    greedy = replace(session.sampling, temperature=0.0)
    for sample in samples:
        advance(1)
        known = kept and kept.find(sample)
        if known:
            asked.append((sample, known))
            continue
        try:
            answer = session.infer(
                sample.image, sample.prompt, max_tokens=max_tokens, sampling=greedy
            )
        except VisistageError as error:  # one sample's trouble is not that of the others
            unreadable.append((sample.name, str(error)))
            continue
        asked.append((sample, Heard.of(answer)))
        if kept is not None:
            kept.add(*asked[-1])
        heard(answer)
    if not asked:
        reject_unreadable(unreadable)
    return _report(asked, unreadable)


def check_samples(
    session: Session, samples: Iterable[Sample]
) -> tuple[list[Sample], list[Refused]]:
    """Return the samples that can be asked, as far as it shows before, and the others."""
    good: list[Sample] = []
    refused: list[Refused] = []
    for sample in samples:
        try:
            session.encoder.encode(sample.prompt, images=1)
            if isinstance(sample.image, Path) and not os.path.isfile(sample.image):
                load_image(sample.image)  # says why it is none
            good.append(sample)
        except (ImageError, PromptError) as error:
            refused.append((sample.name, str(error)))
    return good, refused


def _report(
    asked: list[tuple[Sample, Heard]], unreadable: list[tuple[str, str]]
) -> EvaluationReport:
    misses = []
    counts: dict[str, list[int]] = {}
    for sample, answer in asked:
        count = counts.setdefault(sample.type or UNTYPED, [0, 0])
        right = normalise_answer(answer.text) == normalise_answer(sample.answer)
        count[0] += right
        count[1] += 1
        if not right:
            misses.append(Miss(sample.name, sample.prompt, sample.answer, answer.text))
    by_type = {name: Share(*counts[name]) for name in sorted(counts)}
    steps = [answer.per_token_ms for _, answer in asked]
    later = [ms for ms in steps if ms is not None]
    return EvaluationReport(
        overall=Share(len(asked) - len(misses), len(asked)),
        by_type=by_type,
        misses=tuple(misses),
        unreadable=tuple(unreadable),
        first_token_ms=sum(answer.first_token_ms for _, answer in asked) / len(asked),
        per_token_ms=sum(later) / len(later) if later else None,
    )
