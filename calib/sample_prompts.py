"""Samples made ready to be run: token ids and pixels, with a hash that says what was seen.

    {"image": "photo.jpg", "prompt": "How many?", "answer": "2"}
        ──▶ parts: ids, pixels, ids; answer ids

It uses the runtime's own tokeniser and preprocessing, so that what is measured is what will run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..graphs.errors import DataError, ImageError, PromptError
from ..runtime.image.image import load_image, pixel_key, preprocess
from ..runtime.image.preprocessing import Preprocessing
from ..runtime.text.prompt import PromptEncoder

SamplePart = Sequence[int] | np.ndarray
"""One stretch of a prompt: token ids, or pixel values (3, H, W) float32."""


@dataclass(frozen=True, eq=False)
class SamplePrompt:
    """A tokenised prompt.

    Attributes:
        name: of the sample, without folders.
        parts: texts and pictures in their order; the last one is text.
        answer_ids: the answer as the model would have written it, without an end token; empty
            where no answer is known.
        digest: SHA-256 (hex) of picture, prompt and answer.
    """

    name: str
    parts: tuple[SamplePart, ...]
    answer_ids: tuple[int, ...] = ()
    digest: str = ""


def prepare(
    samples: Iterable[Any],
    encoder: PromptEncoder,
    preprocessing: Preprocessing,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[SamplePrompt], list[tuple[str, str]]]:
    """Open, preprocess and tokenise samples in their order.

    Args:
        samples: with ``name``, ``image`` (whatever ``load_image`` takes), ``prompt`` and ``answer``
            (None or empty: not known), as ``samples.Sample``.
        encoder: of the checkpoint.
        preprocessing: of the checkpoint.
        progress: called after each sample.

    Returns:
        The prompts, and (name, reason) of each sample whose picture could not be opened.

    Raises:
        DataError: a prompt or an answer that cannot be used, or no picture at all could be opened.
    """
    prompts: list[SamplePrompt] = []
    unreadable: list[tuple[str, str]] = []
    for sample in samples:
        name = Path(sample.name).name
        try:
            image = load_image(sample.image)
            pixels = preprocess(image, preprocessing)
        except ImageError as error:
            # Files travel, and so do their names; the folders of this machine do not.
            shown = str(sample.image)
            unreadable.append((name, str(error).replace(shown, Path(shown).name)))
        else:
            key = pixel_key(image, preprocessing)
            prompts.append(_prompt(name, sample.prompt, sample.answer or "", key, pixels, encoder))
        progress()
    if not prompts:
        first = f", the first because: {unreadable[0][1]}" if unreadable else ""
        raise DataError(f"none of {len(unreadable)} pictures could be opened{first}")
    return prompts, unreadable


def order_hash(prompts: Iterable[SamplePrompt]) -> str:
    """SHA-256 (hex) of what the prompts show, ask and answer, in their order."""
    digests = [prompt.digest for prompt in prompts]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _prompt(
    name: str, text: str, answer: str, key: str, pixels: np.ndarray, encoder: PromptEncoder
) -> SamplePrompt:
    try:
        encoded = encoder.encode(text, images=1)
    except PromptError as error:
        raise DataError(f"{name}: {error}") from None
    parts = tuple(pixels if segment.is_image else segment.ids for segment in encoded.segments)
    digest = hashlib.sha256(json.dumps([key, text, answer]).encode()).hexdigest()
    answer_ids = _answer_ids(name, encoded.text, answer.strip(), encoder.tokenizer)
    return SamplePrompt(name, parts, answer_ids, digest)


def _answer_ids(name: str, text: str, answer: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What comes after the prompt's ids when the answer stands behind its text.

    Tokenisers tell a word at the beginning of a text from one behind a space; an answer is the
    latter, unless the template ends its line: ``ASSISTANT: Yes``.
    """
    if not answer:
        return ()
    behind = answer if text[-1:].isspace() else f" {answer}"
    before, whole = (
        tokenizer.encode(one, add_special_tokens=False).ids for one in (text, text + behind)
    )
    ids = whole[len(before) :]
    if whole[: len(before)] != before:  # the prompt's last token would have grown
        ids = tokenizer.encode(behind, add_special_tokens=False).ids
    added = tokenizer.get_added_tokens_decoder()
    control = [added[i].content for i in ids if i in added and added[i].special]
    if control:
        raise DataError(
            f"{name}: the answer contains the control token {control[0]!r}, which no answer has. "
            "Remove it."
        )
    return tuple(ids)
