"""Images between questions: slots of the stages that are blind to the question, within a limit.

Sizes are counted in bytes, orders and positions included, and the least recently used go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np

from ..graphs.chain.executor import Rows, StageResult
from ..graphs.chain.rows import AppendedRows, PrefilledPart

FREE_SHARE = 16
"""Images take one part in so many of the memory that is free once the model is loaded."""

LEAST_CACHE_BYTES = 64 << 20
"""Images may take as much as the weights do, and this much where the model is small."""

Value = TypeVar("Value")


def default_cache_bytes(free_bytes: int, weight_bytes: int) -> int:
    """Return how many bytes images may take by default."""
    return min(free_bytes // FREE_SHARE, max(weight_bytes, LEAST_CACHE_BYTES))


@dataclass(frozen=True)
class HeldSlots:
    """Consecutive slots of one stage: (n,) orders, which of them are visual, keys and values."""

    order: np.ndarray
    visual: np.ndarray
    caches: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        arrays = (self.order, self.visual, *self.caches.values())
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True)
class CachedPrefix:
    """A prompt up to and including an image, in every stage that is blind to the question.

    Attributes:
        begin: the first slot, the same in each stage; what comes before is the bundle's prefix.
        stages: the slots from there on, by stage.
        rows: (1, n, D), as the last of these stages left them; None where no stage follows.
        readings: what the edge behind it reads of them, (1, n, ...) each.
        order, visual: (n,) of these rows, as in ``HeldSlots``; those of the last stage's slots,
            unless visual rows passed it by.
        positions: (n,) int32 of these rows, or (n, A) where rows have several.
        inject: what later stages add to those of them that are visual, by layer.
    """

    begin: int
    stages: tuple[HeldSlots, ...]
    rows: Rows | None
    order: np.ndarray
    visual: np.ndarray
    positions: np.ndarray
    readings: Mapping[str, Any] = field(default_factory=dict)
    inject: Mapping[int, Rows] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes this takes in the cache."""
        rows = 0 if self.rows is None else self.rows.nbytes
        added = (*self.readings.values(), *self.inject.values())
        rows += sum(values.nbytes for values in added)
        rows += sum(array.nbytes for array in (self.order, self.visual, self.positions))
        return rows + sum(held.nbytes for held in self.stages)

    def parts(self) -> list[PrefilledPart]:
        """Return the rows that the next stage needs, in runs of one kind."""
        if self.rows is None:
            return []
        # Slots that a selection will look up; of rows that passed by, any.
        begin = self.begin
        # What ends in an image has visual rows; text before the first of them is apart.
        prefix = ~self.visual & (self.order < self.order[self.visual].min())
        changes = np.diff(self.visual) | np.diff(prefix)
        cuts = [0, *(np.flatnonzero(changes) + 1), len(self.visual)]
        return [
            PrefilledPart(
                AppendedRows(
                    bool(self.visual[start]),
                    None,
                    self.positions[None, start:stop],
                    self.order[None, start:stop],
                    self._injected(start, stop),
                    prefix=bool(prefix[start]),
                ),
                StageResult(
                    self.rows[:, start:stop],
                    None,
                    None,
                    {name: values[:, start:stop] for name, values in self.readings.items()},
                ),
                begin + int(start),
                begin + int(stop),
            )
            for start, stop in pairwise(cuts)
        ]

    def _injected(self, start: int, stop: int) -> dict[int, Rows]:
        """Return what is added to the visual rows among [start, stop)."""
        visual = self.visual
        own = slice(int(visual[:start].sum()), int(visual[:stop].sum()))
        return {layer: rows[:, own] for layer, rows in self.inject.items()} if visual[start] else {}


class ByteCache(Generic[Value]):
    """Keeps the values last used whose sizes together stay within ``limit`` bytes.

    A value larger than the limit is not kept at all. ``hits``: how often ``get`` found one.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = self.hits = 0
        self._items: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """Return the value, now the most recently used; None when it is not (or no longer) here."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        self.hits += 1
        return self._items[key][0]

    def put(self, key: str, value: Value, nbytes: int) -> None:
        """Keep ``value``, dropping the least recently used until it fits."""
        self.drop(key)
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self.drop(next(iter(self._items)))
        self._items[key] = (value, nbytes)
        self.nbytes += nbytes

    def drop(self, key: str) -> None:
        """Forget ``key`` if it is here."""
        _, nbytes = self._items.pop(key, (None, 0))
        self.nbytes -= nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)
