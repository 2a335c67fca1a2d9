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
from .scenes import COLOURS, SHAPES, Scene, make_scene, render_scene
from .worlds import DEMO, World

PROMPT = "USER: <image>\n{question} ASSISTANT:"


@dataclass(frozen=True)
class HeldOutSample:
    """One question of the test: an image, a prompt and the right answer."""

    image: Image.Image
    prompt: str
    answer: str
    kind: str
    question: str
    scene: Scene | None = None


def held_out(
    count: int, seed: int = 0, size: int | None = None, world: World = DEMO
) -> Iterator[HeldOutSample]:
    """Yield `count` samples, one question a scene, the kinds in turn; the same for the same seed.

    Args:
        count: number of samples.
        seed: selects the series.
        size: side of the images in pixels, that of `world` where None.
        world: what scenes and questions are like.
    """
    for scene, made in _series(count, f"held out {seed}", True, world):
        image, prompt = render_scene(scene, size), PROMPT.format(question=made.text)
        yield HeldOutSample(image, prompt, made.answer, made.kind, made.text, scene)


def second_questions(count: int, seed: int = 0, world: World = DEMO) -> Iterator[Question | None]:
    """Yield for each of `held_out(count, seed, world=world)` a question about other things.

    It is of another kind and about nothing that the first one is about; None where 40 draws give
    no such question, as after one about all things.
    """
    rng = random.Random(f"second {seed}")
    for index, (scene, first) in enumerate(_series(count, f"held out {seed}", True, world)):
        drawn = (
            ask(scene, KINDS[(index + 1 + turn % (len(KINDS) - 1)) % len(KINDS)], rng)
            for turn in range(40)
        )
        apart = (
            made for made in drawn if made and made.about and not {*made.about} & {*first.about}
        )
        yield next(apart, None)


def _series(count: int, name: str, unseen: bool, world: World) -> Iterator[tuple[Scene, Question]]:
    rng = random.Random(name)
    for index in range(count):
        question = None
        while question is None:
            scene = make_scene(rng, held_out=unseen, world=world)
            question = ask(scene, KINDS[index % len(KINDS)], rng)
        yield scene, question


def blind_accuracy(
    count: int = 2000, seed: int = 0, learn: int = 20000, world: World = DEMO
) -> dict[str, float]:
    """Return the accuracy on held-out questions without the image, by kind and "all".

    The questions are `held_out(count, seed, world=world)`. The guess is the commonest answer, over
    `learn` training questions, to the same text or, where that was asked fewer than 20 times, to
    the same text without its colours, shapes and sizes.
    """
    by_text, by_form = defaultdict(Counter), defaultdict(Counter)
    for _, made in _series(learn, "blind", False, world):
        by_text[made.text][made.answer] += 1
        by_form[_form(made, world)][made.answer] += 1
    hits: dict[str, list[bool]] = defaultdict(list)
    for _, made in _series(count, f"held out {seed}", True, world):
        tally = by_text[made.text]
        if tally.total() < 20:
            tally = by_form[_form(made, world)]
        hit = bool(tally) and tally.most_common(1)[0][0] == made.answer
        hits[made.kind].append(hit)
        hits["all"].append(hit)
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def _form(made: Question, world: World) -> str:
    words = "|".join((*COLOURS, *SHAPES, *world.radii))
    return re.sub(rf"\b({words})(e?s)?\b", "·", made.text)
