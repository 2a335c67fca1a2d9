"""One stage of the chain on a device: its caches, its fixed buffers, one call after another.

Everything that a call reads or writes is at an address that does not change between growths, so a
call with the same number of rows can be replayed. The llm lowering updates the caches in place
(key.l and key.l.out have one address); the portable one, and any over an INT8 cache, returns new
rows, which are copied to their slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from ...graphs.caches import appended, is_cache
from ...graphs.chain.executor import StageResult
from ...graphs.contract import BY_LAYER, TensorSpec, inject_name, injected_of, returns_new_rows
from ...graphs.errors import CapacityError
from ...graphs.selectors.edge import ROW_READINGS
from ..backends.feeds import layers_taking, shape_of, stage_feeds
from .calls import BATCH, Loaded, Replay
from .memory import DeviceArray, Layers, Memory, Place, nbytes_of
from .protocol import Buffer, ExecutionContext, aligned

GROWTH = 512
"""Slots are added in multiples of this where their number is open: growth copies every cache, and
everything captured before is worthless after it."""

MOST_REPLAYS = 12
"""Numbers of rows that a stage stays ready for."""

ROWS_IN, ROWS_OUT = "rows", "rows.out"


class Workspace:
    """Buffers that the stages share, because one runs at a time: rows on their way in, and new
    cache rows on their way to their slots.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.generation = 0
        self._buffers: dict[str, Buffer] = {}

    def require(self, name: str, nbytes: int) -> None:
        """Make buffer ``name`` at least this large; zeros, so that padding rows are finite."""
        held = self._buffers.get(name)
        if held is None or held.nbytes < nbytes:
            buffer = self.memory.device.allocate(nbytes)
            self.memory.device.zero(buffer.address, nbytes)
            self._buffers[name] = buffer
            self.generation += 1

    def address(self, name: str) -> int:
        """Return the address of a buffer."""
        return self._buffers[name].address


class DeviceStage:
    """A stage made of ``parts`` (engines of consecutive layers).

    Attributes:
        most: slots it may have; 0: any number.
        fixed: whether it has exactly those.
        rows_back: whether new cache rows are returned (``contract.returns_new_rows``).
    """

    def __init__(self, memory: Memory, workspace: Workspace, parts: Sequence[Loaded]):
        self.memory, self.workspace, self.parts = memory, workspace, list(parts)
        self.most = parts[0].compiled.slots
        self.fixed = parts[0].compiled.context is not None
        self.rows_back = returns_new_rows(parts[0].spec)
        self.slots = 0
        self.caches: dict[str, Buffer] = {}
        self.replays: OrderedDict[int, Replay] = OrderedDict()
        self.rejected: str | None = None  # why nothing is captured here
        inputs = {tensor.name: tensor for part in parts for tensor in part.spec.inputs}
        outputs = {tensor.name: tensor for part in parts for tensor in part.spec.outputs}
        self.rows_spec = inputs[ROWS_IN]
        queries = [
            tensor for part in parts for tensor in part.spec.outputs if tensor.name == "queries"
        ]
        # Layers at whose input features are added, and how many rows their buffers hold now.
        self._injected = dict.fromkeys(injected_of(inputs), 0)
        self._outputs = [self.rows_spec, *queries]
        # Of the last part: logits, or what the edge behind reads of the rows.
        self._extras = [n for n in ("logits", *ROW_READINGS) if n in outputs]
        self._outputs += [outputs[name] for name in self._extras]
        self.cache_names = [n.removesuffix(appended("")) for n in outputs if is_cache(n)]
        self.cache_spec = inputs[self.cache_names[0]]  # one for all
        self.dtype = np.dtype(self.cache_spec.dtype)
        self._generation = -1

    @property
    def captures(self) -> bool:
        """Return whether its calls are replayed, as far as is known."""
        return self.rejected is None

    def ensure_slots(self, slots: int) -> int:
        """Make room for ``slots``, keeping what is there; return how many there are now.

        Raises:
            CapacityError: more than it may have, or than the device has memory for.
        """
        if self.most and slots > self.most:
            raise CapacityError(
                f"a stage needs {slots} cache slots, its engines have room for {self.most}. Ask "
                "for fewer tokens, or build the bundle with a longer --context"
            )
        if slots <= self.slots and self.slots:
            return self.slots
        wanted = self.most if self.fixed else -(-max(slots, 1) // GROWTH) * GROWTH
        self._grow(min(wanted, self.most) if self.most else wanted)
        return self.slots

    def append(
        self,
        rows: np.ndarray | DeviceArray,
        positions: np.ndarray,
        order: np.ndarray,
        slot_order: np.ndarray,
        write_index: int,
        by_layer: Mapping[str, np.ndarray],
        inject: Mapping[int, np.ndarray | DeviceArray],
    ) -> StageResult:
        """Call the stage once; with more orders than rows, those on the left are padding."""
        count, padding = order.shape[1], order.shape[1] - rows.shape[1]
        assert write_index + count <= self.slots
        device, memory = self.memory.device, self.memory
        replay = self._replay(count)
        for place in self._places:
            place.reclaim()
        own = self._by_part(by_layer)
        values = stage_feeds(positions, order, slot_order, write_index, own)
        memory.upload(list(self._control.values()), [values[name] for name in self._control])
        start = self.workspace.address("in")
        row_nbytes = self._nbytes(self.rows_spec, 1)
        if padding:
            device.zero(start, padding * row_nbytes)
        memory.put(start + padding * row_nbytes, rows)
        self._put_injected(inject, padding)
        replay.run()
        if replay.rejected is not None or replay.graph is not None:
            self.rejected = replay.rejected
        if self.rows_back:
            for name in self.caches:
                self._copy(name, write_index, count, self._fresh_address(name), to_cache=True)
        out, *rest = (
            place.lend(shape_of(spec, {"B": BATCH, "Q": count}), np.dtype(spec.dtype))
            for place, spec in zip(self._places, self._outputs, strict=True)
        )
        queries, extras = rest[: len(self.parts)], rest[len(self.parts) :]
        readings = dict(zip(self._extras, extras, strict=True))
        logits = readings.pop("logits", None)
        if padding:
            out = out[:, padding:]
            readings = {name: values[:, padding:] for name, values in readings.items()}
        return StageResult(out, Layers(queries), logits, readings)

    def cache(self, name: str) -> DeviceArray:
        """Return the whole cache of a layer, for a selection or a probe to read."""
        return self.memory.view(self.caches[name], self._cache_shape(self.slots), self.dtype)

    def snapshot(self, start: int, stop: int) -> dict[str, DeviceArray]:
        """Copy slots [start, stop) of every cache, into one piece of memory."""
        shape = self._cache_shape(stop - start)
        copies = self.memory.pack([(shape, self.dtype) for _ in self.caches])
        for name, copy in zip(self.caches, copies, strict=True):
            self._copy(name, start, stop - start, copy.address, to_cache=False)
        return dict(zip(self.caches, copies, strict=True))

    def restore(self, start: int, saved: Mapping[str, np.ndarray | DeviceArray]) -> None:
        """Write such copies back, or arrays of the host."""
        for name, rows in saved.items():
            if not isinstance(rows, DeviceArray):
                (source,) = self.memory.pack([(rows.shape, self.dtype)])
                self.memory.upload([source], [rows])
                rows = source
            self._copy(name, start, rows.shape[2], rows.address, to_cache=True)

    def _replay(self, count: int) -> Replay:
        """Return the call with ``count`` rows, ready to run."""
        if self._generation != self.workspace.generation:
            self._forget_replays()
            self._generation = self.workspace.generation
        if count not in self.replays:
            if len(self.replays) == MOST_REPLAYS:
                self.memory.device.synchronize()  # its contexts may still be at work
                self.replays.popitem(last=False)
            self.replays[count] = Replay(self.memory.device, self._contexts(count))
        self.replays.move_to_end(count)
        return self.replays[count]

    def _contexts(self, count: int) -> list[ExecutionContext]:
        """Return a context for each part, from the first part's rows to the last part's."""
        rows, *outputs = self._places
        fixed = {name: array.address for name, array in self._control.items()}
        for name, cache in self.caches.items():
            fixed[name] = cache.address
            fixed[appended(name)] = self._fresh_address(name) if self.rows_back else cache.address
        extras = outputs[len(self.parts) :]
        fixed |= {name: at.address for name, at in zip(self._extras, extras, strict=True)}
        contexts = []
        hops = ("between", "in")  # the first part has read its input when the second writes it
        source = self.workspace.address("in")
        for number, part in enumerate(self.parts):
            last = number == len(self.parts) - 1
            to = rows.address if last else self.workspace.address(hops[number % 2])
            own = {ROWS_IN: source, ROWS_OUT: to, "queries": outputs[number].address}
            own |= {
                name: self.workspace.address(name)
                for name in map(inject_name, self._injected)
                if any(tensor.name == name for tensor in part.spec.inputs)
            }
            own |= {name: fixed[_of_part(name, number)] for name in layers_taking(part.spec)}
            sizes = {"B": BATCH, "Q": count, "S": self.slots}
            contexts.append(part.context(sizes, fixed | own, replayed=True))
            source = to
        return contexts

    def _grow(self, slots: int) -> None:
        """Reallocate caches and buffers for ``slots``; what was captured is worthless then."""
        old, before = dict(self.caches), self.slots
        self._forget_replays()
        device = self.memory.device
        self.slots = slots
        nbytes = nbytes_of(self._cache_shape(slots), self.dtype)
        for name in self.cache_names:
            self.caches[name] = device.allocate(nbytes)
            # Zeros, not garbage: a NaN in an invisible slot would poison attention (0 x NaN).
            device.zero(self.caches[name].address, nbytes)
            if before:
                self._copy(name, 0, before, old[name].address, to_cache=True)
        for name in ("in", "between") if len(self.parts) > 1 else ("in",):
            self.workspace.require(name, self._nbytes(self.rows_spec, slots))
        for name in map(inject_name, self._injected):
            self.workspace.require(name, self._nbytes(self.rows_spec, slots))
        if self.rows_back:
            self.workspace.require("fresh", aligned(nbytes) * len(self.caches))
        self._places = [Place(self.memory, self._nbytes(spec, slots)) for spec in self._outputs]
        plain = {tensor.name: tensor for tensor in self.parts[0].spec.inputs}
        apart = {*self.caches, ROWS_IN, *BY_LAYER, *map(inject_name, self._injected)}
        control = {name: tensor for name, tensor in plain.items() if name not in apart}
        for number, part in enumerate(self.parts):
            own = [tensor for tensor in part.spec.inputs if tensor.name in BY_LAYER]
            control |= {_of_part(tensor.name, number): tensor for tensor in own}
        sizes = {"B": BATCH, "Q": slots, "S": slots}
        arrays = [(shape_of(tensor, sizes), np.dtype(tensor.dtype)) for tensor in control.values()]
        self._control = dict(zip(control, self.memory.pack(arrays), strict=True))

    def _put_injected(self, inject: Mapping[int, np.ndarray | DeviceArray], padding: int) -> None:
        """Bring what is added to the rows of a call to its place, and zeros around it."""
        row = self._nbytes(self.rows_spec, 1)
        for layer, held in self._injected.items():
            start, given = self.workspace.address(inject_name(layer)), inject.get(layer)
            if held:  # of a call before; buffers are zeros otherwise
                self.memory.device.zero(start, held * row)
                self._injected[layer] = 0
            if given is not None:
                self.memory.put(start + padding * row, given)
                self._injected[layer] = padding + given.shape[1]

    def _forget_replays(self) -> None:
        if self.replays:
            self.memory.device.synchronize()
            self.replays.clear()

    def _by_part(self, by_layer: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Give each part the gates and gains of its own layers, in a place of its own."""
        out, rest = {}, dict(by_layer)
        for number, part in enumerate(self.parts):
            for name, depth in layers_taking(part.spec).items():
                out[_of_part(name, number)] = rest[name][:depth]
                rest[name] = rest[name][depth:]
        return out

    def _copy(self, name: str, start: int, count: int, other: int, *, to_cache: bool) -> None:
        """Copy slots between a cache and a compact array at ``other``."""
        _, groups, slots, width = self._cache_shape(self.slots)
        slot = width * self.dtype.itemsize
        cache = (self.caches[name].address + start * slot, slots * slot)
        compact = (other, count * slot)
        to, source = (cache, compact) if to_cache else (compact, cache)
        self.memory.device.copy_rows(*to, *source, count * slot, groups)

    def _fresh_address(self, name: str) -> int:
        """Return where the new rows of a cache are written before they are copied to it."""
        nbytes = aligned(nbytes_of(self._cache_shape(self.slots), self.dtype))
        return self.workspace.address("fresh") + self.cache_names.index(name) * nbytes

    def _cache_shape(self, slots: int) -> tuple[int, ...]:
        return shape_of(self.cache_spec, {"B": BATCH, "S": slots})

    def _nbytes(self, spec: TensorSpec, count: int) -> int:
        return nbytes_of(shape_of(spec, {"B": BATCH, "Q": count}), np.dtype(spec.dtype))


def _of_part(name: str, number: int) -> str:
    return f"{name}{number}"
