"""Pairs of questions about one image, for what a second question costs and whether it is answered.

The second question is about another part of the image than the first, so that what a plan kept for
the first one does not help. It is asked right after it, while the image is cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo.heldout import second_questions
from ..demo.worlds import WORLDS
from .samples import Sample, evaluation_samples


@dataclass(frozen=True)
class Turns:
    """A question, and a second one about the same image, where there is one."""

    first: Sample
    second: Sample | None

    @property
    def samples(self) -> tuple[Sample, ...]:
        """One question or two, in the order in which they are asked."""
        return (self.first,) if self.second is None else (self.first, self.second)


def evaluation_turns(model: str, data: Path | None, count: int | None) -> list[Turns]:
    """Return the samples of an evaluation, each with a second question.

    The demo's is about other things in the scene. In a file it is the next line about the same
    image with another prompt, from the last line on the first one again.

    Raises:
        DataError: as ``evaluation_samples``.
    """
    samples = evaluation_samples(model, data, count)
    if data is not None:
        return paired(samples)
    turns = []
    made = second_questions(len(samples), world=WORLDS[model])
    for first, found in zip(samples, made, strict=True):
        name = f"{first.name}, second question"
        second = (
            None
            if found is None
            else Sample(name, first.image, found.text, found.answer, found.kind)
        )
        turns.append(Turns(first, second))
    return turns


def paired(samples: Sequence[Sample]) -> list[Turns]:
    """Give each sample the next one about its image as a second question."""
    of_image: dict[Any, list[Sample]] = {}
    for sample in samples:
        of_image.setdefault(_identity(sample.image), []).append(sample)
    turns = []
    for sample in samples:
        own = of_image[_identity(sample.image)]
        at = next(index for index, other in enumerate(own) if other is sample)
        later = [*own[at + 1 :], *own[:at]]
        second = next((other for other in later if other.prompt != sample.prompt), None)
        turns.append(Turns(sample, second))
    return turns


def _identity(image: Any) -> Any:
    return image if isinstance(image, Path) else hashlib.sha256(image.tobytes()).hexdigest()
