"""Words of the vocabulary that an image's rows resemble, whatever the image shows.

EmbedLens tells rows apart by a few such ids, which are known of one model. Of another they are
those that many rows of many images have among their nearest; what they are worth, measurements say.

Source: docs/methods.md, "EmbedLens".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..compile.checkpoint.checkpoint import Checkpoint
from ..compile.export.texts import text_facts
from ..graphs.chain.torch_reference import load_weights
from ..graphs.modules.encoders import make_vision
from ..graphs.modules.ops import Eager
from ..graphs.progress import Advance, no_advance
from ..runtime.image.preprocessing import Preprocessing
from .sample_prompts import SampleImage, prepare
from .samples import Sample

READS = ("saliency", "vocabulary", "rows")
"""Readings of each image (``selectors.entry.EncoderReadings``)."""


@dataclass(frozen=True)
class Word:
    """An id of the vocabulary, and the rows that have it among their three nearest.

    Attributes:
        id: of the vocabulary.
        text: as the tokeniser spells it.
        share: of all rows, those that have it among their nearest.
        images: share of the images that have such a row.
        norm: mean length of these rows, the mean over all rows being 1.
        attention: mean attention that they get in the encoder's layer that is read, likewise.
    """

    id: int
    text: str
    share: float
    images: float
    norm: float
    attention: float


def frequent_words(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    most: int = 20,
    advance: Advance = no_advance,
) -> list[Word]:
    """Return the ids that most rows have among their nearest, the most frequent first.

    Args:
        checkpoint: its encoder and its input embeddings are loaded in FP32.
        samples: of which only the images count.
        most: how many ids.
        advance: called after each image.

    Raises:
        DataError: no sample can be read.
    """
    texts = text_facts(checkpoint)
    preprocessing = Preprocessing.from_dict(texts.preprocessing)
    prompts, _ = prepare(samples, texts.encoder, preprocessing, checkpoint.config)
    vision = make_vision(checkpoint.config, Eager(), readings=READS)
    load_weights(vision, {name: checkpoint.load(name).float() for name in vision.state_dict()})
    ids, lengths, attention = [], [], []
    for prompt in prompts:
        (image,) = (part for part in prompt.parts if isinstance(part, SampleImage))
        with torch.no_grad():
            saliency, nearest, rows = vision(torch.from_numpy(image.pixels))
        ids.append(nearest[0].numpy())
        lengths.append(rows[0].norm(dim=-1).numpy())
        attention.append(saliency[0].numpy())
        advance(1)
    spelt = texts.encoder.tokenizer.id_to_token
    return counted(np.stack(ids), np.stack(lengths), np.stack(attention), most, spelt)


def counted(ids, lengths, attention, most, spelt) -> list[Word]:
    """Return words from what was read of images.

    Args:
        ids: (images, N, 3), nearest of each row.
        lengths: (images, N), of the rows.
        attention: (images, N).
        most: how many words, at most.
        spelt: the text of an id, or None.
    """
    found, counts = np.unique(ids, return_counts=True)  # no row has an id twice
    words = []
    for at in np.argsort(-counts, kind="stable")[:most]:
        has = (ids == found[at]).any(-1)
        words.append(
            Word(
                id=int(found[at]),
                text=spelt(int(found[at])) or "",
                share=float(has.mean()),
                images=float(has.any(1).mean()),
                norm=float(lengths[has].mean() / lengths.mean()),
                attention=float(attention[has].mean() / attention.mean()),
            )
        )
    return words
