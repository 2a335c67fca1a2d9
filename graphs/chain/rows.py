"""Rows of a prompt on their way through the chain, and the slots that they take.

NumPy only; hidden states are whatever the executor keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..contract import INVISIBLE
from ..plan.plan import StagePlan
from ..plan.probing import Decision
from .executor import Rows, StageResult


@dataclass(frozen=True)
class AppendedRows:
    """Rows of one kind: a stretch of text, or the visual rows of one image.

    positions: (B, Q) int32, or (B, Q, A) where rows have several (``on_axes``); order: (B, Q)
    int32, ``INVISIBLE`` where a row is left padding.
    inject: of visual rows, what is added to them, (B, Q, D) each, by the layer at whose input.
    joins: whether it belongs to one image with what comes before it.
    prefix: whether it is text before the first image of its prompt. matched: (B, Q) bool, which
    visual rows the entry's selector matched; None: none, or not told apart.
    """

    visual: bool
    rows: Rows
    positions: np.ndarray
    order: np.ndarray
    inject: Mapping[int, Rows] = field(default_factory=dict)
    prefix: bool = False
    matched: np.ndarray | None = None
    joins: bool = False

    @property
    def count(self) -> int:
        """Q."""
        return self.order.shape[1]


@dataclass(frozen=True)
class PrefilledPart:
    """A part of a prompt after a stage: its rows, their result, and the slots [start, end) that
    they took, none where they passed by.
    """

    segment: AppendedRows
    result: StageResult
    start: int
    end: int

    @property
    def leaving(self) -> AppendedRows:
        """The rows as the stage left them."""
        return replace(self.segment, rows=self.result.rows)


@dataclass
class StageSlots:
    """Contents of the slots of one stage's cache: (B, S) arrays and the next free slot."""

    order: np.ndarray
    visual: np.ndarray
    used: int = 0

    def grow(self, slots: int) -> None:
        """Add invisible slots up to ``slots``."""
        extra = slots - self.order.shape[1]
        if extra > 0:
            width = ((0, 0), (0, extra))
            self.order = np.pad(self.order, width, constant_values=INVISIBLE)
            self.visual = np.pad(self.visual, width)

    def shrink(self, slots: int) -> None:
        """Forget slots from ``slots`` on, none of which may be in use."""
        self.order, self.visual = self.order[:, :slots].copy(), self.visual[:, :slots].copy()

    def write(self, segment: AppendedRows) -> int:
        """Note ``segment`` in the next free slots; returns the first of them."""
        start = self.used
        stop = start + segment.count
        self.order[:, start:stop] = segment.order
        if segment.visual:  # free slots are not
            self.visual[:, start:stop] = segment.order != INVISIBLE
        self.used = stop
        return start

    def fill(self, order: np.ndarray, visual: np.ndarray) -> None:
        """Note rows (n,) of both kinds in the next free slots, of every sample alike."""
        stop = self.used + len(order)
        self.order[:, self.used : stop] = order
        self.visual[:, self.used : stop] = visual
        self.used = stop

    def rewind(self, used: int) -> None:
        """Forget every slot from ``used`` on."""
        self.order[:, used:] = INVISIBLE
        self.visual[:, used:] = False
        self.used = used


@dataclass
class Prefilled:
    """Facts known once a prompt has gone through every stage.

    kept: for each selection that took place, the orders (B, K) of the rows it left.
    visual_tokens: for each stage, the visual rows that it took, padding included. Where the
    plan decides per prompt and there was something to decide on: decision, and the stage after
    which its selection took place.
    """

    logits: Any = None
    kept: list[np.ndarray] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    decision: Decision | None = None
    selected_after: int | None = None


def on_axes(positions: np.ndarray, axes: int) -> np.ndarray:
    """Return positions as graphs take them: text stands at the same place on all of its axes."""
    if axes == 1 or positions.ndim == 3:
        return positions
    return np.repeat(positions[..., None], axes, 2)


def all_kept(plan: StagePlan, visual: AppendedRows) -> AppendedRows:
    """Return rows that are fewer than a selection keeps: there is nothing to select."""
    if plan.positions != "renumbered":
        return visual
    return replace(visual, positions=closed_up(visual, visual.count))


def closed_up(offered: AppendedRows, count: int) -> np.ndarray:
    """Return positions (B, K) one after another, from that of the first row offered on."""
    real = np.where(offered.order == INVISIBLE, INVISIBLE, offered.positions)
    first = real.min(1, keepdims=True) % INVISIBLE  # 0 for a sample without images
    return (first + np.arange(count)).astype(np.int32)


def places_in(offered: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the places (B, K) among rows of orders ``offered`` (B, N) of those ``kept`` (B, K)."""
    return np.argmax(kept[:, :, None] == offered[:, None, :], -1)


def row_kinds(parts: Sequence[AppendedRows]) -> dict[str, np.ndarray]:
    """Return which rows of a call are of each kind of ``stages.FROZEN_ROWS``, (B, Q) bool each."""

    def rows(values: Callable[[AppendedRows], Any]) -> np.ndarray:
        return np.concatenate(
            [np.broadcast_to(np.asarray(values(part), bool), part.order.shape) for part in parts], 1
        )

    visual = rows(lambda part: part.visual)
    matched = rows(lambda part: part.matched if part.matched is not None else False)
    return {
        "visual": visual,
        "matched": matched,
        "unmatched": visual & ~matched,
        "prefix": rows(lambda part: part.prefix),
    }


def last_layers(plan: StagePlan, done: Prefilled) -> tuple[int, int]:
    """Return (t, e) of a prompt: its last layer with all visual tokens, its last layer with any.

    A prompt whose probe never selects, or that has no image, keeps all it has to the end.
    """
    if plan.trigger is not None and plan.exit is not None:
        return plan.trigger, plan.exit
    last = [stage.layers[1] - 1 for stage in plan.stages]
    if done.selected_after is None:
        return last[-1], last[-1]
    seen = [layer for layer, count in zip(last, done.visual_tokens, strict=True) if count]
    return last[done.selected_after], seen[-1]
