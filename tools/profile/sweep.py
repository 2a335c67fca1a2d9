"""Prefills of more and more visual tokens: parts of an image, the whole of it, several.

The rows of one image are computed once and cut, so that only the decoder is timed: its stages and
selections, with the question. Engines are compiled for whole images, so they get no parts; nor has
an image parts whose rows stand in several runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...graphs.chain.executor import Encoded
from ...graphs.plan.call_cost import GraphCall
from ...graphs.plan.plan import StagePlan
from ...graphs.vision_contract import pixel_shape
from ...runtime.prompt_parts import PromptImage, PromptPart
from .timing import FIRST_QUESTION, Spread, image_layout, timed_calls, timed_ms

if TYPE_CHECKING:
    from ...runtime.session import Session

PARTS = (0.25, 0.5, 0.75)
IMAGES = (1, 2, 4)
QUESTION = FIRST_QUESTION.format(number=100)


@dataclass(frozen=True)
class SweepPoint:
    """Visual tokens of a prompt, milliseconds of its prefill, and its calls."""

    visual_tokens: int
    ms: Spread
    calls: tuple[GraphCall, ...]


def counts_of(plan: StagePlan, whole: int, context: int, text: int, *, parts: bool) -> list[int]:
    """Return visual tokens to try, of images of ``whole`` that enter: not fewer than a selection
    keeps, none beyond the context.
    """
    fewest = max((edge.keep or 0 for edge in plan.edges), default=0)
    counts = [round(share * whole) for share in PARTS] if parts else []
    counts += [number * whole for number in IMAGES]
    return [count for count in counts if count >= max(fewest, 1) and count + text <= context]


def sweep(
    sessions: Mapping[str, Session], repetitions: int, *, parts: bool
) -> dict[str, list[SweepPoint]]:
    """Time the prefill of every session for every number of tokens, the sessions in turns."""
    times: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in sessions}
    calls: dict[tuple[str, int], tuple[GraphCall, ...]] = {}
    rows = {name: _visual_rows(session) for name, session in sessions.items()}
    for repetition in range(repetitions + 1):
        for name, session in sessions.items():
            manifest = session.bundle.manifest
            layout = image_layout(manifest.config)
            encoded = session.encoder.encode(QUESTION, 1, [layout])
            length = sum(len(segment.ids) for segment in encoded.segments if not segment.is_image)
            limit = manifest.config.text.max_positions
            whole = rows[name].rows.shape[1]
            cut = parts and len(layout.spans) == 1
            for count in counts_of(manifest.plan, whole, limit, length, parts=cut):
                prompt = _prompt(session, rows[name], count, f"{repetition}.{count}")
                session.context.ensure_capacity(prompt, 0)
                with timed_calls(session.executor) as events:
                    ms = timed_ms(partial(session.context.prefill, prompt))
                if repetition:  # the first one grows buffers
                    times[name][count].append(ms)
                    calls[name, count] = tuple(event.call for event in events)
    return {
        name: [SweepPoint(count, Spread.of(ms), calls[name, count]) for count, ms in own.items()]
        for name, own in times.items()
    }


def _visual_rows(session: Session) -> Encoded:
    """Return the visual rows that enter of an image of noise."""
    config = session.bundle.manifest.config
    layout = image_layout(config)
    shape = [int(size) for size in pixel_shape(config, layout.tiles)]
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return session.executor.encode(noise, feeds=layout.feeds)


def _prompt(session: Session, encoded: Encoded, count: int, key: str) -> list[PromptPart]:
    """Return a question about ``count`` visual tokens: images, or the beginning of one."""
    whole = encoded.rows.shape[1]
    sizes = [whole] * (count // whole) or [count]

    def cut(size: int) -> Encoded:
        index = np.arange(size)
        if size == whole:
            return encoded._replace(patches=index[None])
        rows, *inject = (
            session.executor.take(rows, index) for rows in (encoded.rows, *encoded.inject.values())
        )
        return Encoded(rows, index[None], dict(zip(encoded.inject, inject, strict=True)))

    layout = image_layout(session.bundle.manifest.config)
    asked = session.encoder.encode(QUESTION, len(sizes), [layout] * len(sizes))
    images = iter(
        PromptImage(f"sweep {key}.{number}", partial(cut, size), layout, run=run)
        for number, size in enumerate(sizes)
        for run in range(len(layout.spans))
    )
    return [next(images) if segment.is_image else segment.ids for segment in asked.segments]
