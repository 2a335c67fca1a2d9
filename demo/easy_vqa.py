"""easy-VQA (Victor Zhou, MIT): an outside data set of images and questions.

One shape on a light background, 64 pixels wide; 38 575 training and 9 673 test questions with 13
answers. The demo is trained on some of the training split; the test split measures it. The data
come with the package `easy-vqa` (extra `easy-vqa`), which is never needed to run a model.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from .heldout import PROMPT, HeldOutSample
from .worlds import DEMO

QUESTIONS = {"train": 38_575, "test": 9_673}
"""Number of questions in each split."""


class EasyQuestions:
    """The images and questions of one split.

    Args:
        split: "train" or "test".
        side: side of the images that are returned, in pixels.
    """

    def __init__(self, split: str, side: int = DEMO.side):
        self.folder, self.side = data_folder() / split, side

    @cached_property
    def rows(self) -> list[tuple[str, str, int]]:
        """Return (question, answer, number of the image), in the order of the file."""
        text = (self.folder / "questions.json").read_text(encoding="utf-8")
        return [(question, answer, image) for question, answer, image in json.loads(text)]

    @cached_property
    def questions(self) -> dict[int, list[tuple[str, str]]]:
        """Return the (question, answer) pairs of each image."""
        found = defaultdict(list)
        for question, answer, image in self.rows:
            found[image].append((question, answer))
        return dict(found)

    @cached_property
    def images(self) -> list[int]:
        """Return the numbers of the images."""
        return sorted(self.questions)

    def image(self, number: int) -> Image.Image:
        """Return an image, enlarged with a cubic filter."""
        with Image.open(self.folder / "images" / f"{number}.png") as image:
            return image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)


def data_folder() -> Path:
    """Return the folder with the data of the package `easy-vqa`.

    Raises:
        ModuleNotFoundError: it is not installed; says how to get it.
    """
    found = find_spec("easy_vqa")
    if found is None or not found.origin:
        raise ModuleNotFoundError(
            "easy-VQA's images are in the package easy-vqa, which is not installed. Install it: "
            "pip install 'visistage[easy-vqa]'"
        )
    return Path(found.origin).parent / "data"


def easy_vqa_samples(
    count: int | None = None, split: str = "test", side: int = DEMO.side
) -> Iterator[HeldOutSample]:
    """Yield the questions of a split as they are worded, each with its image.

    Where `count` is given, so many of them, evenly spread over the split.

    Raises:
        ModuleNotFoundError: `easy-vqa` is not installed.
    """
    source = EasyQuestions(split, side)
    rows = source.rows
    count = len(rows) if count is None else min(count, len(rows))
    for index in range(count):
        text, answer, image = rows[index * len(rows) // count]
        prompt = PROMPT.format(question=text)
        yield HeldOutSample(source.image(image), prompt, answer, question_kind(text, answer), text)


def question_kind(text: str, answer: str) -> str:
    """Return "colour", "shape", "yes/no" or "negated", as in "is there not a red shape?"."""
    if answer in ("yes", "no"):
        return "negated" if re.search(r"\bnot?\b", text) else "yes/no"
    return "colour" if "color" in text else "shape"


def blind_easy_vqa() -> dict[str, float]:
    """Return the accuracy on the test split without the images, by kind and "all".

    The guess is the commonest training answer to the same text.
    """
    tallies, hits = defaultdict(Counter), defaultdict(list)
    for text, answer, _ in EasyQuestions("train").rows:
        tallies[text][answer] += 1
    for text, answer, _ in EasyQuestions("test").rows:
        hit = bool(tallies[text]) and tallies[text].most_common(1)[0][0] == answer
        hits[question_kind(text, answer)].append(hit)
        hits["all"].append(hit)
    return {kind: sum(found) / len(found) for kind, found in hits.items()}
