"""What executors on this CPU share: caches that are NumPy arrays, and the time of every graph.

A stage's keys and values lie in one block, so that new rows of all its layers are written in one
assignment. A cache is read, rewound and copied back without asking the library that runs graphs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ...graphs.bundle import Manifest
from ...graphs.contract import cache_names

BUCKET = 128
"""Slots are added in multiples of this: growth copies, and attention pays for every slot."""


class Timed:
    """Adds the time of a block to ``sums[name]``; steps are short, so it does no more."""

    def __init__(self, sums: dict[str, float], name: str):
        self.sums, self.name = sums, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.sums[self.name] += (time.perf_counter() - self.start) * 1e3


class HostExecutor:
    """The part of ``backend.Backend`` that no library has a say in.

    Attributes:
        caches: by stage, (B, G, S, d) views of its block by input name.
        blocks: by stage, (2 * layers, B, G, S, d): key and value of each layer in turn.
        elapsed_ms: time of every graph by name until ``reset_elapsed``.
    """

    device_name: str | None = None

    def __init__(self, manifest: Manifest, batch: int = 1):
        self.plan, self.text, self.batch = manifest.plan, manifest.config.text, batch
        self.dtype, self.cache_dtype = np.dtype(manifest.dtype), np.dtype(manifest.cache_dtype)
        self.rows_dtype = np.dtype(manifest.fallback.rows_dtype(self.dtype.name))
        self.elapsed_ms: dict[str, float] = defaultdict(float)
        self.blocks: list[np.ndarray] = []
        self.caches: list[dict[str, np.ndarray]] = []
        for index in range(len(self.plan.stages)):
            self.blocks.append(self._empty(index, 0))
            self.caches.append(self._views(index))

    def prepare(self, needs: Sequence[int]) -> bool:
        """Nothing to prepare: caches grow as they are needed."""
        return False

    def padding(self, stage: int, count: int) -> int:
        """No padding rows, unless a library makes calls of some sizes dearer than others."""
        return 0

    def ensure_slots(self, stage: int, slots: int) -> int:
        """Grow a stage's caches to the next bucket, keeping what they hold; zeros elsewhere."""
        held = self.blocks[stage].shape[3]
        return held if slots <= held else self._resize(stage, slots, held)

    def trim_slots(self, stage: int, used: int, wanted: int) -> int:
        """Give slots back where less than half of them are wanted; ``used`` of them are kept."""
        held = self.blocks[stage].shape[3]
        return held if held <= 2 * _bucket(wanted) else self._resize(stage, wanted, used)

    def _resize(self, stage: int, slots: int, kept: int) -> int:
        """Move the first ``kept`` slots of a stage's caches to new ones; returns their size."""
        old = self.blocks[stage]
        self.blocks[stage] = self._empty(stage, _bucket(slots))
        self.blocks[stage][:, :, :, :kept] = old[:, :, :, :kept]
        self.caches[stage] = self._views(stage)
        self._moved(stage)
        return _bucket(slots)

    def _moved(self, stage: int) -> None:
        """The caches of ``stage`` lie elsewhere now: whoever bound them binds them again."""

    def take(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Rows ``index`` along Q."""
        return rows[:, index]

    def concatenate(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Join rows along Q."""
        return parts[0] if len(parts) == 1 else np.concatenate(list(parts), axis=1)

    def snapshot(self, stage: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of a stage's cache slots [start, stop)."""
        return {name: c[:, :, start:stop].copy() for name, c in self.caches[stage].items()}

    def restore(self, stage: int, start: int, saved: dict[str, np.ndarray]) -> None:
        """Write a snapshot back; the slots must exist."""
        for name, rows in saved.items():
            self.caches[stage][name][:, :, start : start + rows.shape[2]] = rows

    def reset_elapsed(self) -> dict[str, float]:
        """Milliseconds per graph since the last call."""
        elapsed, self.elapsed_ms = dict(self.elapsed_ms), defaultdict(float)
        return elapsed

    def _timed(self, name: str) -> Timed:
        return Timed(self.elapsed_ms, name)

    def _empty(self, stage: int, slots: int) -> np.ndarray:
        """Zeros, not garbage: a NaN in an invisible slot would poison attention (0 x NaN)."""
        first, stop = self.plan.stages[stage].layers
        shape = (2 * (stop - first), self.batch, self.text.kv_heads, slots, self.text.head_dim)
        return np.zeros(shape, self.cache_dtype)

    def _views(self, stage: int) -> dict[str, np.ndarray]:
        names = [name for pair in cache_names(self.plan.stages[stage].layers) for name in pair]
        return dict(zip(names, self.blocks[stage], strict=True))


def _bucket(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET
