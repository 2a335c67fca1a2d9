"""Held-out samples: images of scenes that training never drew, each with one question.

`blind_accuracy` measures what the wording of the same questions gives away.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from .questions import KINDS, Question, ask
from .scenes import COLOURS, SHAPES, SIZES, Scene, make_scene, render_scene

PROMPT = "USER: <image>\n{question} ASSISTANT:"


@dataclass(frozen=True)
class HeldOutSample:
    """One question of the test: an image, a prompt and the right answer."""

    image: Image.Image
    prompt: str
    answer: str
    kind: str
    question: str
    scene: Scene


def held_out(count: int, seed: int = 0, size: int = 96) -> Iterator[HeldOutSample]:
    """Yield `count` samples, one question a scene, the kinds in turn; the same for the same seed.

    Args:
        count: number of samples.
        seed: selects the series.
        size: side of the images in pixels.
    """
    for scene, made in _series(count, f"held out {seed}", True):
        image, prompt = render_scene(scene, size), PROMPT.format(question=made.text)
        yield HeldOutSample(image, prompt, made.answer, made.kind, made.text, scene)


def _series(count: int, name: str, unseen: bool) -> Iterator[tuple[Scene, Question]]:
    rng = random.Random(name)
    for index in range(count):
        question = None
        while question is None:
            scene = make_scene(rng, held_out=unseen)
            question = ask(scene, KINDS[index % len(KINDS)], rng)
        yield scene, question


def blind_accuracy(count: int = 2000, seed: int = 0, learn: int = 20000) -> dict[str, float]:
    """Return the accuracy on `held_out(count, seed)` without the image, by kind and "all".

    The guess is the commonest answer, over `learn` training questions, to the same text or, where
    that was asked fewer than 20 times, to the same text without its colours, shapes and sizes.
    """
    by_text, by_form = defaultdict(Counter), defaultdict(Counter)
    for _, made in _series(learn, "blind", False):
        by_text[made.text][made.answer] += 1
        by_form[_form(made)][made.answer] += 1
    hits: dict[str, list[bool]] = defaultdict(list)
    for _, made in _series(count, f"held out {seed}", True):
        tally = by_text[made.text]
        if tally.total() < 20:
            tally = by_form[_form(made)]
        hit = bool(tally) and tally.most_common(1)[0][0] == made.answer
        hits[made.kind].append(hit)
        hits["all"].append(hit)
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def _form(made: Question) -> str:
    words = "|".join((*COLOURS, *SHAPES, *SIZES))
    return re.sub(rf"\b({words})(e?s)?\b", "·", made.text)
