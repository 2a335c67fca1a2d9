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
from ..contract import INVISIBLE
from ..families.family import ImageLayout
from ..plan.plan import StagePlan
from ..plan.stages import Entry
from ..selectors.entry import PADDING, READINGS, EncoderReadings, Entered
from ..selectors.registry import ENTRY_SELECTORS
from ..vision_contract import vision_spec
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


def positioned(
    plan: StagePlan, segments: Sequence[AppendedRows], lags: Sequence[Any] = ()
) -> tuple[list[AppendedRows], np.ndarray]:
    """Return a prompt's segments at the positions that the plan and the images have for them, and
    by how much (B, 1) positions of its answer lie behind orders. Of a run of an image's rows none
    may have entered.

    ``lags``: what each image adds to that (``StagePlan.lag_of``), one number or (B, 1); by default
    that of an image of as many rows as one may have, on one axis.
    """
    each = iter(lags)
    out, lag = [], np.zeros((len(segments[0].order), 1), np.int32)
    for segment in segments:
        out.append(replace(segment, positions=_behind(segment, lag)))
        if segment.visual:
            real = (segment.order != INVISIBLE).any(1, keepdims=True) | (not segment.count)
            more = next(each, plan.lag_of(plan.span, plan.span))
            lag = lag + (more * real).astype(np.int32)
    return out, lag


def _behind(segment: AppendedRows, lag: Any) -> np.ndarray:
    """Return a segment's positions, ``lag`` behind what they are; 0 of padding."""
    positions, order = segment.positions, segment.order
    if positions.ndim == 3:
        order, lag = order[..., None], np.asarray(lag)[..., None]
    return np.where(order == INVISIBLE, 0, positions - lag).astype(np.int32)


def encoded(rows: Rows, chosen: Sequence[Entered], inject: Mapping[int, Rows]) -> Encoded:
    """Return ``rows`` (B, K0, D) with what is known of them, by image, and added to them."""
    classes = [entered.matched for entered in chosen if entered.matched is not None]
    matched = np.stack(classes) if len(classes) == len(chosen) else None
    return Encoded(rows, np.stack([entered.index for entered in chosen]), inject, matched)


def run_of(image: Encoded, layout: ImageLayout, run: int) -> Encoded:
    """Return what entered of one run of an image's rows; padding is the last run's."""
    if len(layout.spans) == 1:
        return image
    start, stop = layout.spans[run]
    padding = image.patches == PADDING
    places = np.where(padding, layout.rows - 1, image.patches)[0]  # they rise
    own = slice(*np.searchsorted(places, (start, stop)).tolist())
    inject = {layer: rows[:, own] for layer, rows in image.inject.items()}
    patches = np.where(padding, PADDING, image.patches - start)[:, own]
    matched = None if image.matched is None else image.matched[:, own]
    return Encoded(image.rows[:, own], patches, inject, matched)


def entered_rows(
    plan: StagePlan, image: Encoded, first: int, layout: ImageLayout | None = None, lag: int = 0
) -> AppendedRows:
    """Return the rows of an image with their places in a prompt.

    Args:
        plan: says which places of the image they take.
        image: what entered of it.
        first: order of the image's first row.
        layout: of the image; None: its positions follow each other.
        lag: by how much positions are behind orders there.
    """
    patches = image.patches
    places = patches.clip(0)
    if plan.span != plan.visual_tokens:
        places = np.broadcast_to(np.arange(patches.shape[1]), patches.shape)
    own = places if layout is None else layout.positions[places]
    if own.ndim > places.ndim and own.shape[-1] == 1:
        own = own[..., 0]
    order = np.where(patches == PADDING, INVISIBLE, first + places).astype(np.int32)
    positions = (first - lag + own).astype(np.int32)
    return AppendedRows(True, image.rows, positions, order, image.inject, matched=image.matched)
