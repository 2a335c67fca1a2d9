"""Bundled images: a few held-out scenes, drawn large, with questions and right answers.

`python -m visistage.demo.gallery` writes them again.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from .questions import KINDS, ask
from .scenes import make_scene, render_scene

IMAGES_FOLDER = Path(__file__).parent / "pictures"

GENERAL = ("What is shown in this picture?", "Which colours do you see, and where?")
"""Asked about the bundled images where a model has no questions of its own."""


@dataclass(frozen=True)
class BundledImage:
    """One bundled image, with its questions and answers."""

    path: Path
    questions: tuple[tuple[str, str], ...]


def bundled() -> list[BundledImage]:
    """Return the bundled images, each with its (question, answer) pairs."""
    index = json.loads((IMAGES_FOLDER / "pictures.json").read_text(encoding="utf-8"))
    return [
        BundledImage(IMAGES_FOLDER / name, tuple((q["question"], q["answer"]) for q in questions))
        for name, questions in index.items()
    ]


def demo_questions() -> list[tuple[Path, str]]:
    """Return every bundled image with each of its questions."""
    return [(image.path, question) for image in bundled() for question, _ in image.questions]


def general_questions(count: int) -> list[tuple[Path, str]]:
    """Return up to ``count`` bundled images with a general question, all images with the first."""
    return [
        (image.path, question) for question, image in islice(product(GENERAL, bundled()), count)
    ]


def write_gallery(folder: Path = IMAGES_FOLDER, size: int = 384) -> None:
    """Draw four held-out scenes of three to six objects; one question of each kind for each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, index = random.Random("gallery"), {}
    for things in range(3, 7):
        made: list = [None]
        while not all(made):
            scene = make_scene(rng, things=things, held_out=True)
            made = [ask(scene, kind, rng) for kind in KINDS]
        name = f"scene-{things}.png"
        render_scene(scene, size).save(folder / name, optimize=True)
        index[name] = [{"question": q.text, "answer": q.answer, "kind": q.kind} for q in made]
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / "pictures.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_gallery()
