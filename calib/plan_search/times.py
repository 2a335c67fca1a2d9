"""Times of two questions about one image, from the bundle that is measured anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..samples import Sample

if TYPE_CHECKING:
    from ...runtime import Session

TIMED = 8
"""Images that are timed."""


@dataclass(frozen=True)
class QuestionTimes:
    """Milliseconds to the first token: about a new image, and about one just asked about.

    The least of several, since bundles are timed one after another, whatever else the machine does.
    """

    first_ms: float
    second_ms: float

    @property
    def both_ms(self) -> float:
        """Milliseconds of the two questions."""
        return self.first_ms + self.second_ms


def about_times(taken: QuestionTimes | None, dense: QuestionTimes) -> list[str]:
    """Return a warning where a chosen plan does not save time here; None: dense was chosen."""
    if taken is None or taken.both_ms < dense.both_ms:
        return []
    return [
        f"On this machine the plan saves no time: two questions about an image took "
        f"{taken.both_ms:.1f} ms to their first tokens, {dense.both_ms:.1f} ms dense. FLOPs are "
        "not all there is to it, or the machine was busy: visistage profile takes both in turns."
    ]


def question_times(session: Session, samples: Sequence[Sample]) -> QuestionTimes:
    """Return the times of a session that has seen none of the samples' images.

    The first image warms up and does not count, unless it is the only one. The second question
    about an image is that of the next sample.
    """
    images = {str(sample.image): sample for sample in samples}
    chosen = [*images.values()][: TIMED + 1]
    found = []
    for sample, following in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        first, second = (
            session.infer(sample.image, asked.prompt, max_tokens=1).timings.first_token_ms
            for asked in (sample, following)
        )
        found.append((first, second))
    counted = found[1:] or found
    return QuestionTimes(*map(min, zip(*counted, strict=True)))
