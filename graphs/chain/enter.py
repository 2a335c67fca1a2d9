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
from ..plan.stages import Entry
from ..selectors.entry import PADDING, READINGS, EncoderReadings, Entered
from ..selectors.registry import ENTRY_SELECTORS
from .executor import ANY_IMAGE, Encoded, Rows
from .rows import AppendedRows

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
            value = np.asarray(outputs[OUTPUTS[name]])[sample]
            read[name] = value if value.dtype.kind == "i" else value.astype(np.float32)
    return chosen_by(plan.entry, EncoderReadings(image=image, **read))


def chosen_by(entry: Entry, given: EncoderReadings) -> Entered:
    """Return what an entry lets in of an image."""
    selector = ENTRY_SELECTORS[entry.selector]
    more = {name: getattr(entry, name) for name in selector.takes}
    return selector.choose(given, min(entry.keep, given.patches), **more)


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
    plan: StagePlan, segments: Sequence[AppendedRows], sizes: Sequence[Any] = ()
) -> tuple[list[AppendedRows], np.ndarray]:
    """Return a prompt's segments at the positions that the plan has for them, and the orders (B, 1)
    that images take of it, for rows of the answer (``positions_at``).

    ``sizes``: rows of each image, one number or (B, 1); by default the most that one has.
    """
    rows_of = iter(sizes)
    out, images = [], np.zeros((len(segments[0].order), 1), np.int32)
    for segment in segments:
        order = segment.order
        positions = np.where(order == INVISIBLE, 0, positions_at(plan, order, images))
        out.append(replace(segment, positions=positions.astype(np.int32)))
        if segment.visual:
            real = (order != INVISIBLE).any(1, keepdims=True)
            span = np.minimum(plan.span, next(rows_of, plan.span))
            images = images + (span * real).astype(np.int32)
    return out, images


def encoded(rows: Rows, chosen: Sequence[Entered], inject: Mapping[int, Rows]) -> Encoded:
    """Return ``rows`` (B, K0, D) with what is known of them, by image, and added to them."""
    classes = [entered.matched for entered in chosen if entered.matched is not None]
    matched = np.stack(classes) if len(classes) == len(chosen) else None
    return Encoded(rows, np.stack([entered.index for entered in chosen]), inject, matched)


def entered_rows(plan: StagePlan, image: Encoded, first: int) -> AppendedRows:
    """Return the rows of an image with their places in a prompt.

    Args:
        plan: says which places of the image they take.
        image: what entered of it.
        first: position of the image's first row.
    """
    patches = image.patches
    places = patches.clip(0)
    if plan.span != plan.visual_tokens:
        places = np.broadcast_to(np.arange(patches.shape[1]), patches.shape)
    positions = (first + places).astype(np.int32)
    order = np.where(patches == PADDING, INVISIBLE, positions).astype(np.int32)
    return AppendedRows(True, image.rows, positions, order, image.inject, matched=image.matched)
