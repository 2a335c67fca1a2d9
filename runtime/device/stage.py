"""One stage of the chain on a device: its caches, its fixed buffers, one call after another.

Everything that a call reads or writes lies at an address that does not change between growths, so
a call with the same number of rows can be replayed. The llm lowering updates the caches where they
lie (key.l and key.l.out have one address); the portable one, and any over an INT8 cache, hands back
new rows, which are copied to their slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from ...graphs.chain.executor import StageResult
from ...graphs.contract import TensorSpec, appended
from ...graphs.errors import CapacityError
from .calls import BATCH, Loaded, Replay
from .memory import DeviceArray, Layers, Memory, Place, nbytes_of, offsets_of
from .protocol import Buffer, aligned

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
        """Where a buffer lies."""
        return self._buffers[name].address


class Control:
    """What the host says in a call, in one upload: where to write, who sees whom, which gates."""

    def __init__(self, memory: Memory, specs: Sequence[TensorSpec], slots: int):
        self.memory = memory
        sizes = {"B": BATCH, "Q": slots, "S": slots}
        shapes = [[sizes[d] if isinstance(d, str) else d for d in one.shape] for one in specs]
        offsets, total = offsets_of(
            [nbytes_of(s, np.dtype(one.dtype)) for s, one in zip(shapes, specs, strict=True)]
        )
        self.host = np.zeros(total, np.uint8)
        self.buffer = memory.device.allocate(total)
        self._places = {
            one.name: (offset, np.dtype(one.dtype))
            for one, offset in zip(specs, offsets, strict=True)
        }

    def address(self, name: str) -> int:
        """Where one of them lies."""
        return self.buffer.address + self._places[name][0]

    def send(self, values: Mapping[str, np.ndarray]) -> None:
        """Upload the values of one call."""
        for name, (offset, dtype) in self._places.items():
            data = np.ascontiguousarray(values[name], dtype).reshape(-1).view(np.uint8)
            self.host[offset : offset + data.nbytes] = data
        self.memory.write(self.buffer.address, self.host)


class DeviceStage:
    """A stage made of ``parts`` (engines of consecutive layers).

    ``most``: slots it may have; 0: any number. ``fixed``: it has exactly those. ``rows_back``: new
    cache rows are handed back (``contract.returns_new_rows``).
    """

    def __init__(
        self,
        memory: Memory,
        workspace: Workspace,
        parts: Sequence[Loaded],
        *,
        most: int,
        fixed: bool,
        rows_back: bool,
    ):
        self.memory, self.workspace, self.parts = memory, workspace, list(parts)
        self.most, self.fixed, self.rows_back = most, fixed, rows_back
        self.slots = 0
        self.caches: dict[str, Buffer] = {}
        self.replays: OrderedDict[int, Replay] = OrderedDict()
        self.rejected: str | None = None  # why nothing is captured here
        specs = {one.name: one for part in parts for one in part.spec.inputs}
        outputs = {one.name: one for part in parts for one in part.spec.outputs}
        self.cache_specs = {
            n: s for n, s in specs.items() if appended(n) in outputs and n != ROWS_IN
        }
        self.rows_spec = specs[ROWS_IN]
        self.logits_spec = outputs.get("logits")
        self.query_specs = [_find(part.spec.outputs, "queries") for part in parts]
        self._gates = [one for p in parts for one in p.spec.inputs if one.name == "gates"]
        self._generation = -1

    @property
    def captures(self) -> bool:
        """Whether its calls are replayed, as far as is known."""
        return self.rejected is None

    @property
    def dtype(self) -> np.dtype:
        """Of the caches."""
        return np.dtype(next(iter(self.cache_specs.values())).dtype)

    def ensure_slots(self, slots: int) -> int:
        """Make room for ``slots``, keeping what is there; returns how many there are now.

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
        gates: np.ndarray | None,
    ) -> StageResult:
        """One call; where there are more orders than rows, those on the left are padding."""
        count, padding = order.shape[1], order.shape[1] - rows.shape[1]
        assert write_index + count <= self.slots
        device, memory = self.memory.device, self.memory
        replay = self._replay(count)
        for place in self._places:
            place.reclaim()
        values = {
            "positions": positions,
            "order": order,
            "slot_order": slot_order,
            "write_index": np.full(BATCH, write_index),
        }
        if gates is not None:
            values |= _split_gates(gates, self._gates)
        self._control.send(values)
        start = self.workspace.address("in")
        row_nbytes = self._nbytes(self.rows_spec, 1)
        if padding:
            device.zero(start, padding * row_nbytes)
        memory.put(start + padding * row_nbytes, rows)
        replay.run()
        if replay.rejected is not None:
            self.rejected = replay.rejected
        if self.rows_back:
            self._scatter(write_index, count)
        out = self._lend(self._rows, self.rows_spec, count)
        queries = Layers(
            [
                self._lend(place, spec, count)
                for place, spec in zip(self._queries, self.query_specs, strict=True)
            ]
        )
        logits = None
        if self.logits_spec is not None:
            logits = self._lend(self._places[-1], self.logits_spec, count)
        return StageResult(out[:, padding:] if padding else out, queries, logits)

    def cache(self, name: str) -> DeviceArray:
        """The whole cache of a layer, for a selection or a probe to read."""
        return self.memory.view(self.caches[name], self._cache_shape(name), self.dtype)

    def snapshot(self, start: int, stop: int) -> dict[str, DeviceArray]:
        """Copies of slots [start, stop) of every cache, in one piece of memory."""
        shapes = {name: self._cache_shape(name, stop - start) for name in self.caches}
        copies = self.memory.pack([(shape, self.dtype) for shape in shapes.values()])
        for name, copy in zip(shapes, copies, strict=True):
            self._copy(name, start, stop - start, copy.address, to_cache=False)
        return dict(zip(shapes, copies, strict=True))

    def restore(self, start: int, saved: Mapping[str, np.ndarray | DeviceArray]) -> None:
        """Write such copies back, or arrays of the host."""
        for name, rows in saved.items():
            if isinstance(rows, DeviceArray):
                source = rows
            else:
                source = self.memory.empty(rows.shape, self.dtype)
                self.memory.write(source.address, rows.astype(self.dtype, copy=False))
            self._copy(name, start, source.shape[2], source.address, to_cache=True)

    def _replay(self, count: int) -> Replay:
        """The call with ``count`` rows, ready to run."""
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

    def _contexts(self, count: int) -> list:
        """A context for each part, from the first part's rows to the last part's."""
        sizes = {"B": BATCH, "Q": count, "S": self.slots}
        contexts = []
        last = len(self.parts) - 1
        hops = ("between", "in")  # the first part has read its input when the second writes it
        source = self.workspace.address("in")
        for number, part in enumerate(self.parts):
            to = self._rows.address if number == last else self.workspace.address(hops[number % 2])
            addresses = {ROWS_IN: source, ROWS_OUT: to}
            addresses["queries"] = self._queries[number].address
            if self.logits_spec is not None and number == last:
                addresses["logits"] = self._places[-1].address
            for one in part.spec.inputs:
                if one.name in self.caches:
                    addresses[one.name] = self.caches[one.name].address
                    out = self._fresh_address(one.name) if self.rows_back else addresses[one.name]
                    addresses[appended(one.name)] = out
                elif one.name == "gates":
                    addresses["gates"] = self._control.address(_gates_name(self._gates, one))
                elif one.name != ROWS_IN:
                    addresses[one.name] = self._control.address(one.name)
            contexts.append(part.context(sizes, addresses))
            source = to
        return contexts

    def _grow(self, slots: int) -> None:
        """Caches and buffers for ``slots``; everything captured is worthless afterwards."""
        old, before = dict(self.caches), self.slots
        old_shapes = {name: self._cache_shape(name) for name in old}
        self._forget_replays()
        device = self.memory.device
        self.slots = slots
        for name in self.cache_specs:
            nbytes = nbytes_of(self._cache_shape(name), self.dtype)
            self.caches[name] = device.allocate(nbytes)
            # Zeros, not garbage: a NaN in an invisible slot would poison attention (0 x NaN).
            device.zero(self.caches[name].address, nbytes)
            if before:
                width = before * old_shapes[name][3] * self.dtype.itemsize
                pitch = nbytes // old_shapes[name][1]
                device.copy_rows(
                    self.caches[name].address, pitch, old[name].address, width, width,
                    old_shapes[name][1],
                )  # fmt: skip
        for name in ("in", "between") if len(self.parts) > 1 else ("in",):
            self.workspace.require(name, self._nbytes(self.rows_spec, slots))
        if self.rows_back:
            self.workspace.require("fresh", self._fresh_nbytes() * len(self.caches))
        outputs = [self.rows_spec, *self.query_specs]
        outputs += [self.logits_spec] if self.logits_spec is not None else []
        self._places = [Place(self.memory, self._nbytes(spec, slots)) for spec in outputs]
        self._rows, self._queries = self._places[0], self._places[1 : 1 + len(self.parts)]
        first = self.parts[0].spec.inputs
        plain = [s for s in first if s.name not in (*self.caches, ROWS_IN, "gates")]
        gates = [
            TensorSpec(_gates_name(self._gates, one), one.dtype, one.shape) for one in self._gates
        ]
        self._control = Control(self.memory, [*plain, *gates], slots)

    def _forget_replays(self) -> None:
        if self.replays:
            self.memory.device.synchronize()
            self.replays.clear()

    def _scatter(self, write_index: int, count: int) -> None:
        """Copy the rows that were handed back to their slots."""
        for name in self.caches:
            self._copy(name, write_index, count, self._fresh_address(name), to_cache=True)

    def _copy(self, name: str, start: int, count: int, other: int, *, to_cache: bool) -> None:
        """Copy slots between a cache and a compact array at ``other``."""
        _, groups, slots, width = self._cache_shape(name)
        slot = width * self.dtype.itemsize
        cache, pitch = self.caches[name].address + start * slot, slots * slot
        if to_cache:
            self.memory.device.copy_rows(cache, pitch, other, count * slot, count * slot, groups)
        else:
            self.memory.device.copy_rows(other, count * slot, cache, pitch, count * slot, groups)

    def _fresh_nbytes(self) -> int:
        return aligned(nbytes_of(self._cache_shape(next(iter(self.cache_specs))), self.dtype))

    def _fresh_address(self, name: str) -> int:
        return (
            self.workspace.address("fresh") + list(self.caches).index(name) * self._fresh_nbytes()
        )

    def _cache_shape(self, name: str, slots: int | None = None) -> tuple[int, ...]:
        sizes = {"B": BATCH, "S": self.slots if slots is None else slots}
        shape = self.cache_specs[name].shape
        return tuple(sizes[d] if isinstance(d, str) else d for d in shape)

    def _shape(self, spec: TensorSpec, count: int) -> tuple[int, ...]:
        sizes = {"B": BATCH, "Q": count}
        return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)

    def _lend(self, place: Place, spec: TensorSpec, count: int) -> DeviceArray:
        return place.lend(self._shape(spec, count), np.dtype(spec.dtype))

    def _nbytes(self, spec: TensorSpec, count: int) -> int:
        return nbytes_of(self._shape(spec, count), np.dtype(spec.dtype))


def _gates_name(gates: Sequence[TensorSpec], one: TensorSpec) -> str:
    """Parts take the gates of their own layers; each has a place of its own."""
    return f"gates{next(n for n, other in enumerate(gates) if other is one)}"


def _split_gates(gates: np.ndarray, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    out, at = {}, 0
    for number, spec in enumerate(specs):
        depth = int(spec.shape[0])
        out[f"gates{number}"] = gates[at : at + depth]
        at += depth
    return out


def _find(specs: Sequence[TensorSpec], name: str) -> TensorSpec:
    return next(spec for spec in specs if spec.name == name)
