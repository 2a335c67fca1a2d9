"""Classes of visual rows for prompts that come as embeddings: what a selector by vocabulary reads
is in them, and in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..modules.readings import NearestWords
from ..plan.plan import StagePlan
from ..selectors.entry import READINGS, EncoderReadings, Entered
from .enter import chosen_by
from .executor import ANY_IMAGE

TABLE = "model.embed_tokens.weight"


def told_apart(
    plan: StagePlan,
    weights: Mapping[str, Tensor],
    embeds: Tensor,
    spans: Sequence[tuple[int, int]],
) -> list[Entered]:
    """Return what enters of each image of a prompt.

    Args:
        plan: one whose entry's selector reads the vocabulary alone.
        weights: LlamaForCausalLM parameter names to tensors.
        embeds: (S, D), visual rows in place.
        spans: (start, stop) of each image's rows.
    """
    assert plan.entry is not None
    words = NearestWords(*weights[TABLE].shape)
    words.load_state_dict({"weight": weights[TABLE].detach()}, assign=True)
    blank: dict[str, Any] = dict.fromkeys(READINGS)
    found = []
    for start, stop in spans:
        ids = words(embeds[None, start:stop])[0].numpy()
        given = EncoderReadings(**{**blank, "image": ANY_IMAGE, "vocabulary": ids})
        found.append(chosen_by(plan.entry, given))
    return found


def entered_patches(chosen: Sequence[Sequence[Entered]]) -> list[list[list[int]]]:
    """Return the indices that enter by sample and image, padding left out."""
    return [[image.index[image.index >= 0].tolist() for image in own] for own in chosen]


def matched_rows(
    length: int, spans: Sequence[Sequence[tuple[int, int]]], chosen: Sequence[Sequence[Entered]]
) -> np.ndarray:
    """Return which rows of prompts of ``length`` rows were matched, (B, S) bool."""
    matched = np.zeros((len(spans), length), bool)
    for own, runs, entered in zip(matched, spans, chosen, strict=True):
        for (start, _), image in zip(runs, entered, strict=True):
            assert image.matched is not None
            real = image.index >= 0
            own[start + image.index[real]] = image.matched[real]
    return matched
