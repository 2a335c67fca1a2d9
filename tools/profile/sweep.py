"""How the prefill grows with visual tokens: parts of a picture, the whole of it, several.

The rows of one picture are computed once and cut, so that only the decoder is timed: its stages and
selections, with the question. Engines are compiled for whole pictures, so they get no parts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.plan.call_cost import GraphCall
from ...graphs.plan.plan import StagePlan
from ...runtime.reuse import PromptImage, PromptPart
from .call_timer import observe_calls
from .fresh_prompts import FIRST
from .spread import Spread

if TYPE_CHECKING:
    from ...runtime.session import Session

PARTS = (0.25, 0.5, 0.75)
IMAGES = (1, 2, 4)


@dataclass(frozen=True)
class SweepPoint:
    """Visual tokens of a prompt, milliseconds of its prefill, and its calls."""

    visual_tokens: int
    ms: Spread
    calls: tuple[GraphCall, ...]


def counts_of(plan: StagePlan, context: int, text: int, *, parts: bool) -> list[int]:
    """Visual tokens to try: not fewer than a selection keeps, none beyond the context."""
    whole = plan.visual_tokens
    fewest = max((edge.keep or 0 for edge in plan.edges), default=0)
    counts = [round(share * whole) for share in PARTS] if parts else []
    counts += [number * whole for number in IMAGES]
    return [count for count in counts if count >= max(fewest, 1) and count + text <= context]


def sweep(
    sessions: Mapping[str, Session], repetitions: int, *, parts: bool
) -> dict[str, list[SweepPoint]]:
    """Time the prefill of every session for every number of tokens, the sessions in turns."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    calls: dict[tuple[str, int], tuple[GraphCall, ...]] = {}
    rows = {name: _rows(session) for name, session in sessions.items()}
    for round_ in range(repetitions + 1):
        for name, session in sessions.items():
            manifest = session.bundle.manifest
            text = session.encoder.encode(FIRST.format(number=100), images=1)
            length = sum(len(one.ids) for one in text.segments if not one.is_image)
            limit = manifest.config.text.max_positions
            for count in counts_of(manifest.plan, limit, length, parts=parts):
                prompt = _prompt(session, rows[name], count, f"{round_}.{count}")
                session.context.ensure_capacity(prompt, 0)
                with observe_calls(session.executor) as events:
                    start = time.perf_counter()
                    session.context.prefill(prompt)
                    stop = time.perf_counter()
                if round_:  # the first one grows buffers
                    times[name, count].append((stop - start) * 1e3)
                    calls[name, count] = tuple(event.call for event in events)
    return {
        name: [
            SweepPoint(count, Spread.of(ms), calls[owner, count])
            for (owner, count), ms in times.items()
            if owner == name
        ]
        for name in sessions
    }


def _rows(session: Session) -> Any:
    """Visual rows (1, N, D) of a picture of noise."""
    spec = session.bundle.manifest.graphs["vision"].spec.inputs[0]
    shape = [1 if isinstance(d, str) else d for d in spec.shape]
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return session.executor.encode(noise)


def _prompt(session: Session, rows: Any, count: int, key: str) -> list[PromptPart]:
    """A question about ``count`` visual tokens: pictures, or the beginning of one."""
    whole = rows.shape[1]
    sizes = [whole] * (count // whole) or [count]
    encoded = session.encoder.encode(FIRST.format(number=100), images=len(sizes))
    images = iter(
        PromptImage(f"sweep {key}.{number}", partial(_cut, session.executor, rows, size))
        for number, size in enumerate(sizes)
    )
    return [next(images) if one.is_image else one.ids for one in encoded.segments]


def _cut(executor: Any, rows: Any, count: int) -> Any:
    return rows if count == rows.shape[1] else executor.take(rows, np.arange(count))
