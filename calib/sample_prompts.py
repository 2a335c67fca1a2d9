"""Samples prepared to run: token ids and pixels, with a hash of what they show.

    {"image": "photo.jpg", "prompt": "How many?", "answer": "2"}
        ──▶ parts: ids, pixels, ids; answer ids

The tokeniser and the preprocessing are the runtime's own, so what is measured is what will run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..graphs.config import ModelConfig
from ..graphs.errors import ImageError, PromptError
from ..graphs.families.family import ImageLayout
from ..graphs.progress import Advance, no_advance
from ..runtime.image.image import load_image, pixel_key
from ..runtime.image.image import prepare as prepare_image
from ..runtime.image.preprocessing import Preprocessing
from ..runtime.text.prompt import PromptEncoder
from .samples import Sample, reject_unreadable


@dataclass(frozen=True, eq=False)
class SampleImage:
    """An image of a prompt: its pixels as the vision graph takes them, and its layout; or one of
    several runs of its rows.
    """

    pixels: np.ndarray
    layout: ImageLayout
    run: int = 0

    @property
    def rows(self) -> int:
        """N of the run."""
        start, stop = self.layout.spans[self.run]
        return stop - start


SamplePart = Sequence[int] | SampleImage
"""One stretch of a prompt: token ids, or an image."""


@dataclass(frozen=True, eq=False)
class SamplePrompt:
    """A tokenised prompt.

    Attributes:
        name: of the sample, without folders.
        parts: texts and images in their order; the last one is text.
        answer_ids: the answer as the model would have written it, without an end token; empty
            where no answer is known.
        digest: SHA-256 (hex) of image, prompt and answer.
    """

    name: str
    parts: tuple[SamplePart, ...]
    answer_ids: tuple[int, ...] = ()
    digest: str = ""

    @property
    def question(self) -> Sequence[int]:
        """Ids of its last part."""
        last = self.parts[-1]
        assert not isinstance(last, SampleImage)
        return last

    @property
    def text_rows(self) -> int:
        """Rows of its texts and its answer."""
        texts = (part for part in self.parts if not isinstance(part, SampleImage))
        return sum(map(len, texts)) + len(self.answer_ids)


def usual_image(prompts: Iterable[SamplePrompt]) -> int:
    """Return the median N of the images of prompts; 0 where there is none."""
    images = [part for prompt in prompts for part in prompt.parts if isinstance(part, SampleImage)]
    return round(np.median([image.layout.rows for image in images if not image.run] or [0]))


def prepare(
    samples: Iterable[Sample],
    encoder: PromptEncoder,
    preprocessing: Preprocessing,
    config: ModelConfig,
    advance: Advance = no_advance,
    most_rows: int | None = None,
) -> tuple[list[SamplePrompt], list[tuple[str, str]]]:
    """Open, preprocess and tokenise samples in their order.

    Args:
        samples: read once, in their order.
        encoder: of the checkpoint.
        preprocessing: of the checkpoint.
        config: the model's, which lays images out.
        advance: called after each sample.
        most_rows: text rows of a prompt and its answer that the model has room for; None: any.

    Returns:
        The prompts, and (name, reason) of each sample that cannot be used.

    Raises:
        DataError: no sample can be used.
    """
    prompts: list[SamplePrompt] = []
    unreadable: list[tuple[str, str]] = []
    for sample in samples:
        name = Path(sample.name).name
        try:
            image = load_image(sample.image)
            layout = config.layout(image.height, image.width)
            shown = SampleImage(prepare_image(image, preprocessing, layout), layout)
            key = pixel_key(image, preprocessing, layout)
            prompt = _prompt(name, sample.prompt, sample.answer, key, shown, encoder)
            if most_rows is not None and prompt.text_rows > most_rows:
                raise PromptError(
                    f"prompt and answer take {prompt.text_rows} rows, the model has room for "
                    f"{most_rows} beside the image"
                )
            prompts.append(prompt)
        except (ImageError, PromptError) as error:
            # Files travel, and so do their names; the folders of this machine do not.
            file = str(sample.image)
            unreadable.append((name, str(error).replace(file, Path(file).name)))
        advance(1)
    if not prompts:
        reject_unreadable(unreadable)
    return prompts, unreadable


def order_hash(prompts: Iterable[SamplePrompt]) -> str:
    """Return the SHA-256 (hex) of what the prompts show, ask and answer, in their order."""
    digests = [prompt.digest for prompt in prompts]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _prompt(
    name: str, text: str, answer: str, key: str, image: SampleImage, encoder: PromptEncoder
) -> SamplePrompt:
    encoded = encoder.encode(text, 1, [image.layout])
    runs = (replace(image, run=run) for run in range(len(image.layout.spans)))
    parts = tuple(next(runs) if segment.is_image else segment.ids for segment in encoded.segments)
    digest = hashlib.sha256(json.dumps([key, text, answer]).encode()).hexdigest()
    answer_ids = _answer_ids(encoded.text, answer.strip(), encoder.tokenizer)
    return SamplePrompt(name, parts, answer_ids, digest)


def _answer_ids(text: str, answer: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids after the prompt's when the answer follows its text.

    Tokenisers tell a word at the beginning of a text from one behind a space; an answer is the
    latter, unless the template ends its line: ``ASSISTANT: Yes``.
    """
    if not answer:
        return ()
    behind = answer if text[-1:].isspace() else f" {answer}"
    before = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(text + behind, add_special_tokens=False).ids
    ids = whole[len(before) :]
    if whole[: len(before)] != before:  # the prompt's last token would have grown
        ids = tokenizer.encode(behind, add_special_tokens=False).ids
    added = tokenizer.get_added_tokens_decoder()
    control = [added[i].content for i in ids if i in added and added[i].special]
    if control:
        raise PromptError(
            f"the answer contains the control token {control[0]!r}, which no answer has. Remove it"
        )
    return tuple(ids)
