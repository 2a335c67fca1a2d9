"""Executors on this CPU: caches that are NumPy arrays, and the time of every graph.

A stage's keys and values are one block, so that new rows of all its layers are written in one
assignment. A cache is read, rewound and copied back without asking the library that runs graphs.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from ...graphs.bundle import Bundle
from ...graphs.caches import stage_caches
from .feeds import PromptCalls, stored_cache_scales

BUCKET = 128
"""Slots are added in multiples of this: growth copies, and attention pays for every slot."""

LANES_BUCKET = 16
"""The same where there are several lanes, whose slots are the most of any of them: an engine has
them grow for whole answers.
"""


class Timed:
    """Adds the time of a block to ``sums[name]``; steps are short, so it does no more."""

    def __init__(self, sums: dict[str, float], name: str):
        self.sums, self.name = sums, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.sums[self.name] += (time.perf_counter() - self.start) * 1e3


class CacheBlocks:
    """Keys and values of every stage for a number of lanes, each lane one prompt's.

    A stage has one block, (caches, lanes, G, S, d): key and value of each layer in turn, and
    perhaps keys of the next. ``owners`` look into it, and are told when it is a new one.
    """

    def __init__(self, counts: Sequence[int], lanes: int, groups: int, width: int, dtype: np.dtype):
        self.counts, self.lanes = counts, lanes
        self.groups, self.width, self.dtype = groups, width, dtype
        self.owners: list[HostExecutor] = []
        self.blocks = [self._empty(stage, 0) for stage in range(len(counts))]

    def slots(self, stage: int) -> int:
        """Return how many slots each lane has in a stage."""
        return self.blocks[stage].shape[3]

    def resize(self, stage: int, slots: int, kept: int) -> int:
        """Move the first ``kept`` slots of a stage to new ones; return their number."""
        old = self.blocks[stage]
        self.blocks[stage] = self._empty(stage, self.rounded(slots))
        self.blocks[stage][:, :, :, :kept] = old[:, :, :, :kept]
        for owner in self.owners:
            owner.look(stage)
        return self.slots(stage)

    def rounded(self, slots: int) -> int:
        """Return the next number of slots that there may be."""
        bucket = BUCKET if self.lanes == 1 else LANES_BUCKET
        return -(-slots // bucket) * bucket

    def move(self, source: int, target: int, used: Sequence[int]) -> None:
        """Copy the first slots, ``used`` by stage, of a lane to another one."""
        for block, count in zip(self.blocks, used, strict=True):
            block[:, target, :, :count] = block[:, source, :, :count]

    def _empty(self, stage: int, slots: int) -> np.ndarray:
        """Return zeros: a NaN in an invisible slot would poison attention (0 x NaN)."""
        shape = (self.counts[stage], self.lanes, self.groups, slots, self.width)
        return np.zeros(shape, self.dtype)


class HostExecutor(PromptCalls):
    """The part of ``backend.Backend`` that is the same for every library on a CPU.

    Attributes:
        store: the caches, perhaps of more lanes than this executor runs.
        caches: by stage, (B, G, S, d) views of its block by input name.
        blocks: by stage, (caches, B, G, S, d), of this executor's lanes.
        elapsed_ms: time of every graph by name until ``reset_elapsed``.
    """

    device_name: str | None = None

    def __init__(self, bundle: Bundle, threads: int, batch: int = 1):
        manifest = self.manifest = bundle.manifest
        self.plan, self.text, self.batch = manifest.plan, manifest.config.text, batch
        self.threads: int | None = threads
        self.cache_names = stage_caches(self.plan)
        self.graphs = manifest.graphs
        self.scales = stored_cache_scales(bundle)
        self.cache_dtype = np.dtype(manifest.cache_dtype)
        self.rows_dtype = np.dtype(manifest.fallback.rows_dtype(manifest.dtype))
        counts = [len(names) for names in self.cache_names]
        groups, width = self.text.kv_heads, self.text.head_dim
        self.store = CacheBlocks(counts, batch, groups, width, self.cache_dtype)
        self._own(slice(0, batch))

    def of_lanes(self, first: int, count: int) -> HostExecutor:
        """Return an executor of ``count`` lanes, which shares graphs and caches with this one."""
        other = copy.copy(self)
        other.batch = count
        other._own(slice(first, first + count))
        other.split()
        return other

    def split(self) -> None:
        """Replace what belongs to the lanes of the executor that this one is a copy of."""

    def look(self, stage: int) -> None:
        """Look into a new block of ``stage``."""
        self.blocks[stage] = self.store.blocks[stage][:, self.lanes]
        self.caches[stage] = dict(zip(self.cache_names[stage], self.blocks[stage], strict=True))
        self.rebind(stage)

    def _own(self, lanes: slice) -> None:
        self.lanes = lanes
        self.elapsed_ms: dict[str, float] = defaultdict(float)
        self.blocks = [block[:, lanes] for block in self.store.blocks]
        self.caches = [
            dict(zip(names, block, strict=True))
            for names, block in zip(self.cache_names, self.blocks, strict=True)
        ]
        self.store.owners.append(self)

    def activate(self) -> None:
        pass  # this CPU serves every thread

    def prepare(self, needs: Sequence[int]) -> bool:
        return False  # caches grow as they are needed

    def free_bytes(self) -> int:
        return psutil.virtual_memory().available

    def padding(self, stage: int, count: int) -> int:
        return 0  # unless a library makes calls of some sizes dearer

    def ensure_slots(self, stage: int, slots: int) -> int:
        """Grow a stage's caches to the next bucket, keeping what they hold; zeros elsewhere."""
        held = self.store.slots(stage)
        return held if slots <= held else self.store.resize(stage, slots, held)

    def trim_slots(self, stage: int, used: int, wanted: int) -> int:
        """Give slots up where less than half of them are wanted; ``used`` of them are kept.

        Other lanes may want them.
        """
        held = self.store.slots(stage)
        if held <= 2 * self.store.rounded(wanted) or self.store.lanes > 1:
            return held
        return self.store.resize(stage, wanted, used)

    def cache(self, stage: int, name: str) -> np.ndarray:
        return self.caches[stage][name]

    def take(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        return rows[:, index] if index.ndim == 1 else np.take_along_axis(rows, index[..., None], 1)

    def concatenate(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0] if len(parts) == 1 else np.concatenate(list(parts), axis=1)

    def snapshot(self, stage: int, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: c[:, :, start:stop].copy() for name, c in self.caches[stage].items()}

    def restore(self, stage: int, start: int, saved: Mapping[str, np.ndarray]) -> None:
        for name, rows in saved.items():
            self.caches[stage][name][:, :, start : start + rows.shape[2]] = rows

    def reset_elapsed(self) -> dict[str, float]:
        elapsed, self.elapsed_ms = dict(self.elapsed_ms), defaultdict(float)
        return elapsed

    def end_profiles(self) -> dict[str, Path]:
        return {}  # unless a library can be asked for them

    def close(self) -> None:
        """Drop the caches; subclasses drop what the library holds, too."""
        self.caches.clear()
        self.blocks.clear()

    def timed(self, name: str) -> Timed:
        """Time a block as a call of graph ``name``."""
        return Timed(self.elapsed_ms, name)

    def rebind(self, stage: int) -> None:
        """Bind the caches of ``stage`` again, which have been reallocated."""
