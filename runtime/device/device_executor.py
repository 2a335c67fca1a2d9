"""An executor on a device: engines over memory that never leaves it.

What goes up in a call is a few kilobytes of positions, orders and gates, and the rows of text;
what comes down is the logits of the last row, and of a selection which rows it kept. Sampling,
penalties and stops look at logits on the host, so an argmax on the device would spare 128 KB of a
step that reads gigabytes of weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.chain.executor import StageResult
from ...graphs.vision_contract import TILES
from ..backends.feeds import PromptCalls, sizes_of, stored_cache_scales
from .engine_sets import EngineSet, EngineSets
from .memory import DeviceArray, Memory, nbytes_of
from .protocol import Compiled, Device, EngineApi, Event

DECODE_ROWS = 8
PREFILL_STEP = 32
"""Numbers of rows that a question is padded to, so that few different calls are captured: 8, which
the profile for decoding takes, and multiples of 32."""

MOST_EVENTS = 512
"""Pairs of events that wait to be read."""


class DeviceExecutor(PromptCalls):
    """One prompt at a time. ``elapsed_ms`` is the device's own time, by graph."""

    def __init__(
        self, bundle: Bundle, device: Device, api: EngineApi, compiled: Sequence[Compiled]
    ):
        manifest = self.manifest = bundle.manifest
        self.plan, self.scales = manifest.plan, stored_cache_scales(bundle)
        self.device, self.api = device, api
        self.device_name: str | None = device.name
        self.threads: int | None = None
        self.memory = Memory(device)
        self.engine_sets = EngineSets(manifest, self.memory, api, compiled)
        stage0 = manifest.graphs[manifest.parts_of(0)[0]].spec
        self.rows_dtype = np.dtype(next(s.dtype for s in stage0.inputs if s.name == "rows"))
        self.slack = [0] * len(self.plan.stages)
        self._events: list[tuple[str, Event, Event]] = []
        self._elapsed: dict[str, float] = defaultdict(float)

    @property
    def engine_set(self) -> EngineSet:
        """The engines in use."""
        return self.engine_sets.current

    def activate(self) -> None:
        self.device.activate()

    def prepare(self, needs: Sequence[int]) -> bool:
        changed = self.engine_sets.choose(needs)
        self.slack = [
            stage.most - need if stage.most else PREFILL_STEP
            for stage, need in zip(self.engine_set.stages, needs, strict=True)
        ]
        return changed

    def free_bytes(self) -> int:
        return self.device.free_bytes()

    def padding(self, stage: int, count: int) -> int:
        if not self.engine_set.stages[stage].captures:
            return 0
        step = DECODE_ROWS if count <= DECODE_ROWS else PREFILL_STEP
        padding = -count % step
        return padding if padding <= self.slack[stage] else 0

    def ensure_slots(self, stage: int, slots: int) -> int:
        return self.engine_set.stages[stage].ensure_slots(slots)

    def trim_slots(self, stage: int, used: int, wanted: int) -> int:
        return self.engine_set.stages[stage].slots  # engines are compiled for so many

    def append(
        self, stage, rows, positions, order, slot_order, write_index, by_layer, inject
    ) -> StageResult:
        with self.timed(f"stage{stage}"):
            return self.engine_set.stages[stage].append(
                rows, positions, order, slot_order, write_index, by_layer, inject
            )

    def cache(self, stage: int, name: str) -> DeviceArray:
        return self.engine_set.stages[stage].cache(name)

    def call_graph(
        self, graph: str, stage: int, feeds: Mapping[str, np.ndarray | DeviceArray]
    ) -> dict[str, DeviceArray]:
        encodes = graph in self.engine_sets.encoding
        call = (self.engine_sets.encoding if encodes else self.engine_set.calls)[graph]
        sizes = sizes_of(call.loaded.spec, feeds)
        if TILES in sizes:
            sizes.setdefault("N", self.manifest.config.rows_of(sizes[TILES]))
        with self.timed(graph.split(".")[0]):
            return call(feeds, sizes)

    def to_host(self, arrays: Sequence[DeviceArray]) -> list[np.ndarray]:
        return self.memory.download_all(arrays)

    def take(self, rows: np.ndarray | DeviceArray, index: np.ndarray):
        """Take rows ``index`` along Q; neighbours are copied together."""
        index = index.reshape(-1)  # of one prompt
        if isinstance(rows, np.ndarray):  # not uploaded yet
            return rows[:, index]
        out = self.memory.empty((1, len(index), *rows.shape[2:]), rows.dtype)
        row = nbytes_of(rows.shape[2:], rows.dtype)
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        at = 0
        for run in np.split(index, breaks):
            if len(run):
                source = rows.address + int(run[0]) * row
                self.device.copy(out.address + at * row, source, len(run) * row)
            at += len(run)
        return out

    def concatenate(self, parts: Sequence[np.ndarray | DeviceArray]):
        """Join rows along Q, wherever they are."""
        if len(parts) == 1:
            return parts[0]
        count = sum(part.shape[1] for part in parts)
        out = self.memory.empty((1, count, *parts[0].shape[2:]), parts[0].dtype)
        at = out.address
        for part in parts:
            self.memory.put(at, part)
            at += part.nbytes
        return out

    def snapshot(self, stage: int, start: int, stop: int) -> dict[str, DeviceArray]:
        return self.engine_set.stages[stage].snapshot(start, stop)

    def restore(
        self, stage: int, start: int, saved: Mapping[str, np.ndarray | DeviceArray]
    ) -> None:
        self.engine_set.stages[stage].restore(start, saved)

    def reset_elapsed(self) -> dict[str, float]:
        self._read_events()
        elapsed, self._elapsed = dict(self._elapsed), defaultdict(float)
        return elapsed

    def end_profiles(self) -> dict[str, Path]:
        return {}  # nothing here can be asked for them (``registry.find_backend``)

    def close(self) -> None:
        """Free engines, memory and device."""
        self._events.clear()
        self.device.synchronize()
        self.engine_sets.close()
        self.api.close()
        self.device.close()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the device's time from the block's start to its end as that of ``name``."""
        start = self.device.record()
        yield
        self._events.append((name, start, self.device.record()))
        if len(self._events) > MOST_EVENTS:
            self._read_events()

    def _read_events(self) -> None:
        if self._events:
            self._events[-1][2].wait()
        for name, start, stop in self._events:
            self._elapsed[name] += stop.since(start)
        self._events.clear()
