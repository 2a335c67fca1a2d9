"""Engines in sets, one for each context length that the bundle was compiled for.

A set is loaded when a prompt first needs it, and the smallest that fits is used: attention costs
time for every slot there is. Engines share no weights, so sets stay together on the device
only while its memory suffices.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...graphs.bundle import Manifest
from ...graphs.caches import SLOT_STEP
from ...graphs.errors import CapacityError
from .calls import Loaded, LooseCall, share_scratch
from .memory import Memory
from .protocol import Compiled, EngineApi
from .stage import DeviceStage, Workspace

LOAD_MARGIN = 1.2
"""A set is expected to take this much of its files' bytes, caches and scratch included."""


class EngineSet:
    """Loaded engines for one context length (None: any), and the caches that they work on."""

    def __init__(
        self, manifest: Manifest, memory: Memory, api: EngineApi, engines: Sequence[Compiled]
    ):
        self.context = engines[0].context
        loaded = {engine.graph: Loaded(engine, api.load(engine)) for engine in engines}
        share_scratch(memory.device, list(loaded.values()))
        workspace = Workspace(memory)
        self.stages = [
            DeviceStage(memory, workspace, [loaded.pop(name) for name in manifest.parts_of(index)])
            for index in range(len(manifest.plan.stages))
        ]
        self.calls = {graph: LooseCall(memory, engine) for graph, engine in loaded.items()}


class EngineSets:
    """All sets of a bundle, the loaded ones, and the one in use."""

    def __init__(
        self, manifest: Manifest, memory: Memory, api: EngineApi, compiled: Sequence[Compiled]
    ):
        self.manifest, self.memory, self.api = manifest, memory, api
        # Graphs of images, which read no cache, are the same for every context length.
        rest = [engine for engine in compiled if engine.spec.follows_context]
        self.sets: dict[int | None, list[Compiled]] = {}
        for context in sorted({engine.context for engine in rest}, key=lambda c: c or 0):
            self.sets[context] = [engine for engine in rest if engine.context == context]
        loaded = [Loaded(engine, api.load(engine)) for engine in compiled if engine not in rest]
        share_scratch(memory.device, loaded)
        self.encoding = {engine.compiled.graph: LooseCall(memory, engine) for engine in loaded}
        self.loaded: dict[int | None, EngineSet] = {}
        self._current: EngineSet | None = None

    @property
    def current(self) -> EngineSet:
        """The set in use; the smallest before a prompt chose."""
        if self._current is None:
            self._current = self._load(next(iter(self.sets)))
        return self._current

    def choose(self, needs: Sequence[int]) -> bool:
        """Use the smallest set with room for ``needs`` slots in each stage.

        Returns whether it is another than before.

        Raises:
            CapacityError: there is none; or the device has no memory for it.
        """
        for context in self.sets:
            if all(
                not most or need <= most
                for need, most in zip(needs, self._most(context), strict=True)
            ):
                changed = self._current is None or self._current.context != context
                self._current = self._load(context)
                return changed
        raise self._too_small(needs)

    def close(self) -> None:
        """Free every engine."""
        self._current = None
        self.loaded.clear()
        self.encoding.clear()

    def _load(self, context: int | None) -> EngineSet:
        if context not in self.loaded:
            wanted = LOAD_MARGIN * sum(engine.nbytes for engine in self.sets[context])
            if self.memory.device.free_bytes() < wanted:
                self._current = None
                self.memory.device.synchronize()
                self.loaded.clear()
            self.memory.device.trim()
            engine_set = EngineSet(self.manifest, self.memory, self.api, self.sets[context])
            self.loaded[context] = engine_set
        return self.loaded[context]

    def _most(self, context: int | None) -> list[int]:
        """Return the slots that each stage of a set has; 0: any number."""
        slots = {engine.graph: engine.slots for engine in self.sets[context]}
        stages = range(len(self.manifest.plan.stages))
        return [slots[self.manifest.parts_of(stage)[0]] for stage in stages]

    def _too_small(self, needs: Sequence[int]) -> CapacityError:
        largest = list(self.sets)[-1]
        most = self._most(largest)
        over = max(need - slots for need, slots in zip(needs, most, strict=True))
        longest = self.manifest.contexts[-1]
        again = -(-(longest + over) // SLOT_STEP) * SLOT_STEP
        return CapacityError(
            f"the prompt and its answer are {over} rows too long for the engines, which were "
            f"compiled for contexts of {', '.join(map(str, self.manifest.contexts))} rows. Ask for "
            f"fewer tokens, shorten the prompt, or build again with --context {again}"
        )
