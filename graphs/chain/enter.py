"""The visual rows of an image that enter the decoder, between the encoder's graphs and stage 0.

NumPy only, and the same for every executor: selectors run on the host, once per image.

Source: docs/design.md, "The entry".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..contract import INVISIBLE, vision_spec
from ..plan.plan import StagePlan
from ..selectors.entry import READINGS, EncoderReadings, Entered
from ..selectors.registry import ENTRY_SELECTORS
from .chain import AppendedRows
from .executor import ANY_IMAGE

OUTPUTS = {name: "visual_rows" if name == "rows" else name for name in READINGS}
"""The vision graph's outputs by what they are to a selector."""


def choose_rows(
    plan: StagePlan, outputs: Mapping[str, Any], image: str, sample: int = 0
) -> Entered:
    """Return which rows of an encoded image enter stage 0.

    Args:
        plan: one with an entry.
        outputs: of the vision graph, (B, ...) each, wherever they are; only those that the
            selector reads come to the host.
        image: the digest of its pixels.
        sample: the image's place in the batch.
    """
    assert plan.entry is not None
    selector = ENTRY_SELECTORS[plan.entry.selector]
    wanted = selector.reads or READINGS  # who reads nothing still counts the patches
    read: dict[str, Any] = dict.fromkeys(READINGS)
    for name in wanted:
        if OUTPUTS[name] in outputs:
            read[name] = np.asarray(outputs[OUTPUTS[name]])[sample].astype(np.float32)
    return selector.choose(EncoderReadings(image=image, **read), plan.entry.keep)


def warm_up(plan: StagePlan, config: ModelConfig) -> None:
    """Pay what a selector's first choice in a process costs, before anything is timed."""
    if plan.entry is not None:
        specs = vision_spec(config, plan, "float32").outputs
        blank = {
            spec.name: np.zeros([dim if isinstance(dim, int) else 1 for dim in spec.shape])
            for spec in specs
        }
        choose_rows(plan, blank, ANY_IMAGE)


def positions_at(plan: StagePlan, order: np.ndarray, images: Any) -> np.ndarray:
    """Return the positions of rows with these orders (B, Q), of a prompt or of its answer.

    ``images``: orders that images before them take, one number or (B, 1).
    """
    return order - images if plan.positions == "separate" else order


def positioned(
    plan: StagePlan, segments: Sequence[AppendedRows]
) -> tuple[list[AppendedRows], np.ndarray]:
    """Return a prompt's segments at the positions that the plan has for them, and the orders (B, 1)
    that images take of it, for rows of the answer (``positions_at``).
    """
    out, images = [], np.zeros((len(segments[0].order), 1), np.int32)
    for segment in segments:
        order = segment.order
        positions = np.where(order == INVISIBLE, 0, positions_at(plan, order, images))
        out.append(replace(segment, positions=positions.astype(np.int32)))
        if segment.visual:
            real = (order != INVISIBLE).any(1, keepdims=True)
            images = images + (plan.span * real).astype(np.int32)
    return out, images


def places_of(plan: StagePlan, patches: np.ndarray) -> np.ndarray:
    """Return the positions (B, K0) int32 of an image's rows, counted from the image's first one.

    ``patches``: those that they stand for (``Encoded``).
    """
    if plan.span == plan.visual_tokens:
        return patches.astype(np.int32)
    return np.broadcast_to(np.arange(plan.entering, dtype=np.int32), patches.shape)
